"""Families of language models, one line each: does mmit train, continue, decode and export them as transformers would?

    python scripts/matrix.py                          # all families of tests/models/small_llms.py
    python scripts/matrix.py --families gemma2 mamba2 --out matrix.jsonl

Tiny random models, on the CPU. The columns:
    rounding                 largest change of a loss in transformers when every number of the embeddings moves by one
                             rounding (fp32): what no other order of additions can be expected to keep
    packed, shared, padded   largest difference of a loss from the record alone in transformers (fp32), with records
                             three windows long: in one row, in a row that shares beginnings, as a padded batch
    leak                     largest gradient that reaches another record of the row
    mode                     what data.packing=auto chooses
    resume                   a run killed after its first checkpoint ends in the same weights, bit by bit
    lora                     all-linear: every adapter tensor has a gradient, and merging changes the logits by so much
    single, batch            greedy answers equal transformers' generate, one by one and all at once
    export                   llava-hf: largest difference of a logit; or "no": refused before a run that lists it starts
Each line is kept in --out as soon as it is known; families found there are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from safetensors.torch import load_file

from mmit.data.packing import Sample, build_row
from mmit.errors import MmitError
from mmit.models import decoding
from mmit.models.interop.llava_hf import read_llava_hf
from mmit.models.tuning import apply_tuning, merge
from mmit.models.vlm import VLM
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checks.exporting import check_exports
from mmit.train.checks.probes import answers, without_gradient
from mmit.train.run import run
from tests.models.small_llms import FAMILIES, FIRST_LIST, VOCABULARY, family
from tests.models.test_families import alone, in_a_row, pair, records
from tests.tiny_run import tiny_config

COLUMNS = ("rounding", "packed", "shared", "padded", "leak", "mode", "resume", "lora", "single", "batch", "export")
PROMPTS, NEW = (3, 11, 30), 8
FROZEN: dict[str, Any] = {"mode": "frozen", "lr": None, "options": {}}
LORA = {"vision": FROZEN, "projector": FROZEN, "llm": {"mode": "lora", "lr": 1e-3, "options": {"r": 4}}}
WIDTH = 24  # of a cell
LIMIT = 1e-4  # of differences of losses, and of logits after a merge and an export
ROUNDINGS = 4  # times the column rounding that a loss may differ by, and logits four times that, where it is more
CLOSE = 1e-3  # two tokens whose logits are nearer than this may change places by rounding


def losses(name: str) -> dict[str, Any]:
    """The columns packed, shared, padded and leak."""
    theirs, vlm = pair(name)
    samples, found = records(), dict[str, Any]()
    share = "longrope" not in name  # such a run sets data.share_prefix=false
    wanted = alone(theirs, samples)
    found["rounding"] = told(lambda: rounding(theirs, samples, wanted))

    def difference(**options: Any) -> float:
        return float((in_a_row(vlm, samples, **options)[0] - wanted).detach().abs().max())

    def packed() -> float:
        got, embeddings, owners, nodes = in_a_row(vlm, samples)
        got[owners == 2].sum().backward()
        gradient = embeddings.grad.clone()
        start, length, _ = nodes[2].tolist()
        gradient[start : start + length] = 0
        found["leak"] = float(gradient.abs().max())
        return float((got - wanted).detach().abs().max())

    found["packed"] = told(packed)
    found["shared"] = told(lambda: difference(share=True)) if share else "off"
    vlm.run_padded()
    found["padded"] = told(difference)
    return found


@torch.no_grad()
def rounding(llm: Any, samples: list[Sample], wanted: torch.Tensor) -> float:
    """Largest change of the losses `wanted` over three draws of roundings of the embeddings."""
    weight, draw, worst = llm.get_input_embeddings().weight, torch.Generator().manual_seed(0), 0.0
    kept = weight.clone()
    for _ in range(3):
        away = torch.where(torch.rand(weight.shape, generator=draw) < 0.5, -torch.inf, torch.inf)
        weight.copy_(torch.nextafter(kept, away))
        worst = max(worst, float((alone(llm, samples) - wanted).abs().max()))
    weight.copy_(kept)
    return worst


def told(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the error it ends with."""
    try:
        return work()
    except MmitError as error:
        return f"refused: {error.problem}"
    except Exception as error:  # noqa: BLE001 - the matrix goes on with the next column
        return f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def trained(name: str, folder: Path) -> dict[str, Any]:
    """The columns mode and resume; leaves a run behind in `folder`."""
    options = family(name)
    sections: dict[str, Any] = {
        "train": {"steps": 4, "rows_per_step": 2, "precision": "fp32", "save_every": 2},
        "data": {"workers": 0, "max_length": 128, "pack_tokens": 160},
    }
    config = tiny_config(folder, **sections)
    from transformers import AutoTokenizer

    count = len(AutoTokenizer.from_pretrained(config.model.llm.name, trust_remote_code=False))
    for key in ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"):
        if key in options:
            options[key] = count
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if key in options:
            options[key] = max(options[key], 256)
    llm = config.model.llm.model_copy(update={"random_init": options})
    config = config.model_copy(update={"model": config.model.model_copy(update={"llm": llm})})
    run(config)
    first = weights(folder)
    shutil.rmtree(checkpoint.checkpoints(folder / "run")[-1])
    for leftover in ("finished.json",):
        (folder / "run" / leftover).unlink(missing_ok=True)
    again = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    run(again)
    second = weights(folder)
    same = first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    packing = checkpoint.read_config(checkpoint.checkpoints(folder / "run")[-1]).data.packing
    return {"mode": "packed" if packing else "padded", "resume": "same" if same and first else "DIFFERS"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint's model."""
    last = checkpoint.checkpoints(folder / "run")[-1]
    files = [f for f in last.rglob("*.safetensors")]
    return {f"{f.relative_to(last)}:{k}": v for f in files for k, v in load_file(f).items()}


def as_trained(name: str) -> tuple[Any, VLM]:
    """transformers' own model and mmit's, which runs padded batches where data.packing=auto would have it so."""
    theirs, vlm = pair(name)
    try:
        vlm.check_isolation()
    except MmitError:
        vlm.run_padded()
    return theirs, vlm


def adapted(name: str) -> str | float:
    """The column lora."""
    _, vlm = as_trained(name)
    apply_tuning(vlm, LORA)
    with torch.no_grad():
        for key, parameter in vlm.llm.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    if idle := without_gradient(vlm):
        return f"no gradient: {idle[0]} and {len(idle) - 1} more"
    before = answers(vlm)
    merge(vlm)
    return float((answers(vlm) - before).abs().max())


@torch.no_grad()
def decoded(name: str) -> dict[str, Any]:
    """The columns single and batch."""
    theirs, vlm = as_trained(name)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, VOCABULARY, (n,), generator=draw).tolist() for n in PROMPTS]
    able = decoding.support(vlm.llm)
    samples = [Sample((*p, 0), (0.0,) * len(p) + (1.0,), (), n, ()) for n, p in enumerate(prompts)]

    def greedy(parts: list[list[Sample]]) -> list[list[int]]:
        out: list[list[int]] = []
        for part in parts:
            rows = []
            for group in [part] if able.shared else [[s] for s in part]:
                row = build_row(group)
                words = vlm.llm.get_input_embeddings()(row.input_ids)  # type: ignore[operator]
                rows.append(decoding.Prompts(words, row.positions, row.nodes, row.predict_at))
            state = decoding.prefill(vlm.llm, rows, support=able)
            out += decoding.decode(vlm.llm, state, limits=[NEW] * len(part), end_ids=())
        return out

    def compare(parts: list[list[Sample]]) -> str:
        bad = [n for n, (p, ids) in enumerate(zip(prompts, greedy(parts), strict=True)) if not same(theirs, p, ids)]
        return "same" if not bad else f"DIFFERS for prompts of {[len(prompts[n]) for n in bad]} tokens"

    found = {"single": told(lambda: compare([[s] for s in samples]))}
    found["batch"] = told(lambda: compare([samples])) if able.batched else "one by one"
    return found


def same(llm: Any, prompt: list[int], ours: list[int]) -> bool:
    """Whether these are the tokens of transformers' generate, or differ first where two tokens are as likely."""
    ids = torch.tensor([prompt])
    out = llm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    theirs = out.sequences[0, len(prompt) :].tolist()
    first = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), None)
    return first is None or float(out.logits[first][0, theirs[first]] - out.logits[first][0, ours[first]]) < CLOSE


def exported(folder: Path) -> float | str:
    """The column export, of the run in `folder`."""
    from mmit.interop.export import Companions, export_llava_hf
    from mmit.models.generation import end_ids

    config = checkpoint.read_config(checkpoint.checkpoints(folder / "run")[-1])
    try:  # as a run with `export` and `mmit export` ask, before anything is computed
        check_exports(config.model_copy(update={"export": ["llava-hf"]}))
    except MmitError as error:
        return f"no: {error.problem.removeprefix('llava-hf cannot hold this model: ')}"
    found = checkpoint.load_model(folder / "run", device="cpu")
    ends = end_ids(found.chat.end_ids, found.tokenizer, found.vlm.llm)
    beside = Companions(found.tokenizer, found.chat, found.image, ends)
    (folder / "exported").mkdir()
    try:
        difference = export_llava_hf(folder / "exported", found.vlm, beside)
        read_llava_hf(folder / "exported")
    except MmitError as error:
        return f"late: {error.problem}"
    return difference.logits


def line(name: str, *, quick: bool = False) -> dict[str, Any]:
    """All columns of a family, or those that need no run."""
    found: dict[str, Any] = {"family": name}
    with tempfile.TemporaryDirectory() as scratch:
        runs: list[Callable[[], Any]] = [] if quick else [lambda: trained(name, Path(scratch))]
        for work in (lambda: losses(name), lambda: decoded(name), *runs):
            got = told(work)
            found |= got if isinstance(got, dict) else {"error": f"{found.get('error', '')} {got}".strip()}
        found["lora"] = told(lambda: adapted(name))
        if not quick and "mode" in found:
            found["export"] = told(lambda: exported(Path(scratch)))
    return found


def shown(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.0e}"
    text = str(value if value is not None else "-")
    return text if len(text) < WIDTH else text[: WIDTH - 3] + "..."


def main() -> None:
    """Run the families that --out does not hold, then print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("matrix.jsonl"))
    parser.add_argument("--quick", action="store_true", help="leave out what needs a run: mode, resume, export")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    kept = [json.loads(text) for text in given.out.read_text().splitlines()] if given.out.exists() else []
    known = {row["family"]: row for row in kept}
    for name in given.families:
        if name in known:
            continue
        began = time.monotonic()
        known[name] = line(name, quick=given.quick) | {"seconds": round(time.monotonic() - began, 1)}
        with given.out.open("a") as file:
            file.write(json.dumps(known[name]) + "\n")
    report(given.families, known)


def report(families: list[str], known: dict[str, Any]) -> None:
    """Print the table, what its shortened cells say in full, and the sums."""
    print("| family | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name in families:
        print(f"| {name} | " + " | ".join(shown(known[name].get(c)) for c in COLUMNS) + " |")
    print("\nCells that are cut off above, and runs that failed:")
    for name in families:
        for column in (*COLUMNS, "error"):
            if len(text := str(known[name].get(column, ""))) >= WIDTH and not isinstance(known[name][column], float):
                print(f"    {name}, {column}: {text}")
    packed = [n for n in families if known[n].get("mode") == "packed"]
    padded = [n for n in families if known[n].get("mode") == "padded"]
    lead = [n for n in families if n in FIRST_LIST]
    wrong = [f"{n} ({', '.join(bad)})" for n in families if (bad := faults(known[n]))]
    both = len(set(packed) & set(lead))
    print(f"\n{len(packed)} of {len(families)} train packed, {both} of the {len(lead)} that users")
    print(f"lead with; {len(padded)} train padded by themselves: {', '.join(padded) or 'none'}")
    print(f"wrong without a word: {', '.join(wrong) or 'none'}")
    for name in families:
        for column, why in said_by_runs(known[name]).items():
            print(f"a run of {name} says so at its start ({column}): {why}")


def said_by_runs(row: dict[str, Any]) -> dict[str, str]:
    """Columns in which a family is left short, and a run tells: it pads rows by itself, or warns of idle tensors."""
    padded = {c: row[c] for c in ("packed", "shared") if row.get("mode") == "padded" and c in row}
    found = {c: str(v) for c, v in padded.items() if str(v).startswith("FAILED")}
    if str(row.get("lora")).startswith("no gradient"):
        found["lora"] = str(row["lora"])
    return found


def faults(row: dict[str, Any]) -> list[str]:
    """Columns in which a family is wrong; a refusal is not, nor is what a run tells at its start."""
    told_of = said_by_runs(row)
    bad = ["error"] if row.get("error") and not str(row["error"]).startswith("refused") else []
    own = row.get("rounding")
    least = max(LIMIT, ROUNDINGS * own) if isinstance(own, float) else LIMIT
    limits = {"rounding": float("inf"), "leak": 0.0, "lora": 4 * least if least > LIMIT else LIMIT}
    for column in COLUMNS:
        value = row.get(column)
        limit = limits.get(column, least)
        wrong = isinstance(value, float) and not value <= limit
        if wrong or (column not in told_of and str(value).startswith(("DIFFERS", "FAILED", "no gradient", "late"))):
            bad.append(column)
    return bad


if __name__ == "__main__":
    main()
