"""`mmit export`, `mmit merge` and `mmit import-model`: models to and from other projects, and without their adapters.

In: a run or checkpoint and a format, or another project's folder. Out: a folder, written whole or not at all, after a
comparison of its logits with those of the source.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.loading import AllowCode, OwnRunArgument
from mmit.errors import ConfigError, nearest
from mmit.io import write_atomic
from mmit.text import echo, plain

if TYPE_CHECKING:
    import torch

    from mmit.interop.export import Companions
    from mmit.train.checkpoint.model import Loaded

FORMATS = ("llava-hf", "gguf", "llava", "peft", "mmit")
NUMBERS = {"llava-hf": ("fp32", "bf16", "fp16"), "gguf": ("fp16", "q8_0", "bf16", "fp32")}  # the default first
WHOLE = ("fp32", "bf16", "fp16")  # of a checkpoint with its base inside

DtypeOption = Annotated[
    str | None,
    typer.Option(help="Number format of weights. llava-hf: fp32 (default), bf16, fp16; gguf: fp16, q8_0, bf16, fp32."),
]
PushToHubOption = Annotated[
    str | None, typer.Option(metavar="REPO", help="Upload the folder to this repository, owner/name.")
]


def export(
    run: OwnRunArgument,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist.")],
    format: Annotated[str, typer.Option("--format", "-f", help=f"One of {', '.join(FORMATS)}.")] = "llava-hf",
    dtype: DtypeOption = None,
    llm_only: Annotated[bool, typer.Option("--llm-only", help="gguf: leave out what sees pictures.")] = False,
    image_token: Annotated[str, typer.Option(help="Image token of llava-hf, if the chat format has none.")] = "<image>",
    licence: Annotated[str | None, typer.Option(help="The model's licence for its card, as the hub names it.")] = None,
    push_to_hub: PushToHubOption = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what --push-to-hub would upload.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Write a trained model for other software.

    llava-hf: a folder for transformers and vLLM, adapters merged. gguf: files for llama.cpp, the LLM and an mmproj for
    pictures, adapters merged. llava: LLaVA's own files (mm_projector.bin, adapter, non_lora_trainables.bin).
    peft: the LLM's adapter alone. mmit: one checkpoint with the base weights inside.

    What was written is loaded again, and its logits of a fixed batch are compared with the source; the largest
    difference is printed, and beyond rounding the export fails and leaves nothing behind. Every export holds a model
    card, README.md: parts, data, recipe, evaluation, licences.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown export format '{format}'", where="--format", remedy=nearest(format, FORMATS))
    numbers = _numbers(format, dtype, llm_only=llm_only)
    import torch

    from mmit.interop.export import source_logits
    from mmit.models.hub import model_folder
    from mmit.train.checkpoint.model import find, load_model, read_config
    from mmit.train.checkpoint.portable import refuse_existing
    from mmit.train.checks.exporting import check_format

    _check_push(push_to_hub, private=private, dry_run=dry_run)
    refuse_existing(out)
    config = read_config(find(model_folder(run)))
    check_format(config, format, llm_only=llm_only)
    kept = None if format == "mmit" else torch.float32  # as trained, where numbers are copied and not computed with
    plain = format in ("llava-hf", "gguf", "mmit")
    found = load_model(run, device="cpu", dtype=kept, plain=plain, allow_code=allow_code)
    if format == "mmit":
        expected = source_logits(found.vlm, found.tokenizer, found.chat, found.image)
        _write_whole(found, out, expected, about=found, licence=licence)
    else:
        writers: dict[str, Callable[[Loaded, Path], None]] = {
            "llava-hf": partial(_llava_hf, dtype=numbers, image_token=image_token),
            "gguf": partial(_gguf, dtype=numbers, llm_only=llm_only),
            "llava": _llava,
            "peft": _peft,
        }
        with _whole_or_nothing(out) as draft:
            writers[format](found, draft)
            _card(found, draft, format=format, licence=licence)
        echo(f"wrote {out}")
    _push(out, push_to_hub, private=private, dry_run=dry_run)


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends well, and is removed when it does not."""
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:  # Ctrl-C too: a comparison that was not made must leave nothing that looks finished
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()  # it is empty
    draft.rename(out)


def _numbers(format: str, dtype: str | None, *, llm_only: bool) -> str:
    """The number format of the weights written; raises ConfigError for an option that a format does not have."""
    if llm_only and format != "gguf":
        raise ConfigError("is for --format gguf", where="--llm-only", remedy="leave it out, or use --format peft")
    known = NUMBERS.get(format, ("fp32",))
    if dtype is not None and dtype not in known:
        problem = f"{format} is not written in '{dtype}'"
        remedy = nearest(dtype, known) if format in NUMBERS else "leave it out: numbers stay as they were trained"
        raise ConfigError(problem, where="--dtype", remedy=remedy)
    return dtype or known[0]


def _card(found: Loaded, folder: Path, *, format: str, licence: str | None) -> None:
    from mmit.interop.card import model_card

    told: dict[str, Any] = {"step": found.meta.get("step", 0), "checkpoint": found.folder, "licence": licence}
    if found.vlm.vision is not None and found.image:
        height, width = found.image["size"]
        shown = f"{width} x {height} pixels, {found.image['mode']}, {found.vlm.image_tokens} tokens"
        told["image"] = shown if found.image["mode"] in ("resize", "pad", "crop") else f"crops of {shown} each"
    text = model_card(found.config.model_dump(), format=format, **told)
    write_atomic(folder / "README.md", plain(text))


def _check_push(name: str | None, *, private: bool, dry_run: bool) -> None:
    """Raise ConfigError for a repository that cannot be, or for options of an upload where there is none."""
    from mmit.interop.push import check_repository

    if name is not None:
        check_repository(name)
    elif dry_run or private:
        raise ConfigError("is for --push-to-hub", where="--dry-run" if dry_run else "--private", remedy="name a REPO")


def _push(folder: Path, name: str | None, *, private: bool, dry_run: bool) -> None:
    from mmit.interop.push import listing, push

    if name is None:
        return
    if not dry_run:
        echo(f"uploaded to {push(folder, name, private=private)}")
        return
    files = listing(folder)
    for file, size in files:
        echo(f"{size:>14,}  {file}")
    echo(f"{len(files)} files, {sum(size for _, size in files):,} bytes would go to {name}; nothing was uploaded")


def _beside(found: Loaded) -> Companions:
    from mmit.interop.export import Companions
    from mmit.models.generation import end_ids

    ends = end_ids(found.chat.end_ids, found.tokenizer, found.vlm.llm)
    return Companions(found.tokenizer, found.chat, found.image, ends)


def _gguf(found: Loaded, folder: Path, *, dtype: str, llm_only: bool) -> None:
    from mmit.interop.gguf import export_gguf

    name = Path(found.config.run.dir).name
    written = export_gguf(folder, found.vlm, _beside(found), dtype=dtype, name=name, llm_only=llm_only)
    for file in written.files:
        echo(f"{file.stat().st_size:>14,}  {file.name}")
    if written.logits is None:
        echo("every number was read back; no logits were compared: transformers does not read such an LLM from GGUF")
    else:
        _tell(written.logits.logits, written.logits.limit)


def _llava_hf(found: Loaded, folder: Path, *, dtype: str, image_token: str) -> None:
    from mmit.interop.export import export_llava_hf
    from mmit.models.llm import DTYPES

    options: dict[str, Any] = {"dtype": DTYPES[dtype], "image_token": image_token}
    seen = export_llava_hf(folder, found.vlm, _beside(found), **options)
    _tell(seen.logits, seen.limit)
    echo(f"largest difference of a pixel, normalised: {seen.pixels:.3g}; ids of the processor: the same")
    if seen.pixels > 1e-3:
        echo(f"transformers pads with the tower's mean, rounded down; this run pads with {found.image['fill']}")


def _llava(found: Loaded, folder: Path) -> None:
    from mmit.models.interop.hf_parts import read_llava_projector, write_llava

    model, vlm = found.config.model, found.vlm
    if model.vision is None or vlm.projector is None:
        raise ConfigError("a text-only model is no LLaVA", where="--format llava", remedy="use --format peft or mmit")
    files = write_llava(
        folder,
        vlm,
        tokenizer=found.tokenizer,
        tower_name=model.vision.name,
        base=model.llm.name,
        fit=model.vision.fit,
        max_length=found.config.data.max_length,
    )
    for name in files:
        echo(name)
    before = {key: value.clone() for key, value in vlm.projector.state_dict().items()}
    read_llava_projector(folder / "mm_projector.bin", vlm.projector)
    now = vlm.projector.state_dict()
    _tell(max(float((now[key] - before[key]).abs().max()) for key in now), 0.0, what="projector weight")
    if "non_lora_trainables.bin" in files:
        _compare_adapter(found, folder)


def _peft(found: Loaded, folder: Path) -> None:
    from mmit.models.interop.hf_parts import write_adapter

    write_adapter(folder, found.vlm, base=found.config.model.llm.name)
    found.tokenizer.save_pretrained(folder)
    _compare_adapter(found, folder)
    if found.vlm.projector is not None:
        echo("the projector is not part of a peft adapter: pictures need --format llava-hf, llava or mmit")


def _compare_adapter(found: Loaded, folder: Path) -> None:
    """Put the adapter on its base with peft and compare the logits of a text."""
    import torch

    from mmit.data.chat import encode
    from mmit.interop.export import TOLERANCE, compare_logits, fixed_talks, logits_of
    from mmit.models.interop.hf_parts import reload_adapter
    from mmit.models.tuning import quantization
    from mmit.models.tuning.structure import base_model

    base, tune = found.config.model.llm, found.config.tune.llm
    # The adapter of a QLoRA run was learnt on 4-bit weights: on plain ones its logits are others.
    four_bits = getattr(base_model(found.vlm.llm), "is_quantized", False)
    bits = quantization(tune.mode, tune.options) if four_bits else None
    again = reload_adapter(folder, base.name, revision=base.revision, random_init=base.random_init, quantization=bits)
    if again is None:
        echo("not compared: the base was random to begin with (model.llm.random_init)")
        return
    ids = [i for i in encode(fixed_talks(found.chat)[0], found.chat, found.tokenizer, generate=True).ids if i >= 0]
    expected = logits_of(found.vlm, ids, (), preparation=None)
    seen = compare_logits(expected, logits_of(again, ids, (), preparation=None), tolerance=TOLERANCE[torch.float32])
    _tell(seen.logits, seen.limit)


def _write_whole(
    found: Loaded,
    out: Path,
    expected: Sequence[torch.Tensor],
    *,
    about: Loaded,
    licence: str | None,
    merged: torch.dtype | None = None,
) -> None:
    """Write a checkpoint with everything inside and read it again; one that differs is removed.

    Args:
        found: what is written. out: does not exist.
        expected: (T, V) logits of the fixed batch, of the source.
        about: what the model card tells of. licence: for the card.
        merged: number format of an LLM that adapters were folded into, which decides the tolerance; the comparison
            then computes in float32. None where nothing was folded: it computes in the config's format.

    Raises:
        ModelError: the logits differ beyond rounding.
    """
    import torch

    from mmit.interop.export import TOLERANCE, compare_logits, source_logits
    from mmit.train.checkpoint.model import load_model
    from mmit.train.checkpoint.portable import save_whole

    tolerance = TOLERANCE[merged or torch.float32]
    dtype = torch.float32 if merged else None
    save_whole(found, out, merged=merged is not None)
    try:
        _card(about, out, format="mmit", licence=licence)
        again = load_model(out, device="cpu", dtype=dtype, allow_code=True)  # as the source, which has been loaded
        others = source_logits(again.vlm, again.tokenizer, again.chat, again.image)
        seen = [compare_logits(a, b, tolerance=tolerance) for a, b in zip(expected, others, strict=True)]
    except BaseException:  # Ctrl-C too: what was not compared must not look finished
        shutil.rmtree(out)
        raise
    worst = max(seen, key=lambda difference: difference.logits / difference.limit)
    _tell(worst.logits, worst.limit)
    echo(f"wrote {out}")


def _tell(difference: float, limit: float, what: str = "logit") -> None:
    echo(f"largest difference of a {what} from the source: {difference:.3g} (limit {limit:.3g})")


def merge(
    run: OwnRunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint folder to write; must not exist.")],
    *,
    dtype: Annotated[str, typer.Option(help=f"Number format of the LLM: {', '.join(WHOLE)}.")] = WHOLE[0],
    licence: Annotated[str | None, typer.Option(help="The model's licence for its card, as the hub names it.")] = None,
    allow_code: AllowCode = False,
) -> None:
    """Fold a run's adapters into its base weights: a checkpoint with everything inside, to use and to train from.

    LoRA, DoRA, (IA)3, BitFit and LayerNorm fold in, those of the vision encoder too; 4-bit weights of a QLoRA run are
    multiplied out first. Logits of a fixed batch before, after, and read again from OUT are compared; beyond rounding
    the command fails. What no plain weight can express (bottleneck adapters, prompts, prefixes) is refused.
    """
    if dtype not in WHOLE:
        raise ConfigError(f"unknown number format '{dtype}'", where="--dtype", remedy=nearest(dtype, WHOLE))
    import torch

    from mmit.config import Config
    from mmit.interop.export import merged_logits
    from mmit.models.hub import model_folder
    from mmit.models.llm import DTYPES
    from mmit.train.checkpoint.model import find, load_model
    from mmit.train.checkpoint.portable import check_mergeable, merged_sections, refuse_existing

    refuse_existing(out)
    checkpoint = find(model_folder(run))
    check_mergeable(checkpoint)
    trained = load_model(checkpoint, device="cpu", dtype=torch.float32, plain=True, allow_code=allow_code)
    expected = merged_logits(trained.vlm, trained.tokenizer, trained.chat, trained.image)
    trained.vlm.llm.to(DTYPES[dtype])  # type: ignore[arg-type]
    config = Config.from_dict(merged_sections(trained.config, out), where=f"merge of {run}")
    # The card has the recipe of the run, which the merged config no longer states.
    _write_whole(
        replace(trained, config=config),
        out,
        expected,
        about=trained,
        licence=licence,
        merged=DTYPES[dtype],
    )
    echo(_train_from(out))


def import_model(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A folder of llava-hf, LLaVA, TinyLLaVA or Prismatic, or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Checkpoint folder to write; must not exist.")],
    *,
    chat: Annotated[str | None, typer.Option(help="Chat format in place of the folder's template.")] = None,
    base: Annotated[str | None, typer.Option(help="LLM of a LLaVA adapter or projector, or a Prismatic VLM.")] = None,
    tower: Annotated[str | None, typer.Option(help="Vision tower in place of the one that the folder names.")] = None,
) -> None:
    """Make an mmit checkpoint of another project's model, to start training from.

    Strict: a tensor that is missing or left over is an error with the list.
    """
    make_start(source, out, chat=chat, base=base, tower=tower)
    echo(f"wrote {out}")
    echo(_train_from(out))


def _train_from(folder: Path) -> str:
    return (
        f"train from it: mmit train --config {folder / 'config.yaml'} data.train.0.path=YOUR.jsonl "
        "tune.llm.mode=lora tune.llm.lr=2e-4"
    )


def make_start(source: str, out: Path, **options: Any) -> None:
    """Write another project's model as a checkpoint to start from; `options` go to `read_foreign`."""
    import torch

    from mmit.config import Config
    from mmit.interop.foreign import read_foreign
    from mmit.models.hub import model_folder
    from mmit.models.llm import context_length
    from mmit.train.checkpoint.portable import imported_sections, refuse_existing, save_imported

    refuse_existing(out)
    found = read_foreign(model_folder(source), **options)
    length = min(2048, context_length(found.vlm.llm) or 2048)
    precision = "fp32" if found.dtype == torch.float32 else "auto"  # what the machine that trains from it is good at
    raw = {
        **imported_sections(found, out),
        "data": {"train": [{"path": "train.jsonl"}], "max_length": length, "pack_tokens": length},
        "train": {"epochs": 1.0, "precision": precision},
    }
    save_imported(found, out, Config.from_dict(raw, where=f"import of {source}"))
