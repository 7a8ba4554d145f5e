"""Checkpoints that refer to nothing outside: imports of other projects' models, exports with every part inside, merged
models.

Goes in: a foreign model, or a loaded checkpoint, with the config to store. Comes out: a checkpoint folder that
`load_model` and `run.init_from` take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.errors import CheckpointError, ModelError
from mmit.models.assemble import with_own_towers
from mmit.models.interop.hf_parts import write_tower, write_tower_config
from mmit.models.projectors import FusedMLP
from mmit.models.vision import FUSED
from mmit.models.vision_fused import parts_of
from mmit.train.checkpoint.model import Loaded, write_folder, write_model

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.interop.foreign import Foreign

# What a checkpoint holds of methods that tune something beside, or a part of, the weights.
BESIDE = ("adapter", "vision_adapter", "llm_tuned.safetensors", "vision_tuned.safetensors")


def refuse_existing(folder: Path) -> None:
    """Raise CheckpointError if a folder is there and holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError("is there already", where=str(folder), remedy="give a new folder, or remove this one")


def imported_sections(found: Foreign, folder: Path) -> dict[str, Any]:
    """Sections of a config that describe an imported model in `folder`, and start a run from it."""
    folder = folder.resolve()
    return {
        "run": {"dir": f"runs/{folder.name}", "init_from": str(folder)},
        "model": {
            "vision": _vision_section(found, folder / "vision"),
            "projector": _projector_section(found.vlm.projector),
            "llm": {"name": str(folder / "llm")},
            "chat": {"format": str(folder / "chat.json")},
        },
        "tune": {"llm": {"mode": "frozen"}},
    }


def _vision_section(found: Foreign, folder: Path) -> dict[str, Any]:
    options = dict(found.vision_options)
    assert found.vlm.vision is not None
    if found.vlm.vision.kind != FUSED:
        return {"kind": "hf", "name": str(folder), **options}
    layer, _ = options.pop("layer"), options.pop("select")
    names = _tower_folders(folder, len(parts_of(found.vlm.vision.as_encoder())))
    return {"kind": FUSED, "towers": [{"kind": "hf", "name": str(name), "layer": layer} for name in names], **options}


def _tower_folders(folder: Path, count: int) -> list[Path]:
    """Where a checkpoint keeps the encoders of its tower: in its vision/, or in numbered folders of it."""
    return [folder] if count == 1 else [folder / str(number) for number in range(count)]


def _projector_section(projector: Any) -> dict[str, Any]:
    if isinstance(projector, FusedMLP):
        return {"kind": "fused_mlp", "options": {"widen": projector.widen}}
    return {"kind": "mlp", "options": {"depth": (len(projector.layers) + 1) // 2}}


def save_imported(found: Foreign, folder: Path, config: Config) -> None:
    """Write an imported model as a checkpoint: llm/, vision/, projector, tokenizer, chat.json and `config`."""
    refuse_existing(folder)
    vision, towers = found.vlm.vision, found.towers
    assert vision is not None
    if isinstance(towers, ModelError):
        problem = f"an imported checkpoint holds CLIP, SigLIP and DINOv2 towers, and this encoder {towers.problem}"
        remedy = "use it from its own folder: mmit chat, mmit eval, mmit.load"
        raise ModelError(problem, where=towers.where, remedy=remedy) from towers
    encoders = parts_of(vision.as_encoder())
    imported = Loaded(found.vlm, found.tokenizer, found.chat, found.image, folder, {}, config)

    # No adapter is on it and nothing was trained: LLM and tower are written beside what `write_model` writes.
    def fill(draft: Path) -> None:
        write_model(draft, imported, step=0)
        found.vlm.llm.save_pretrained(str(draft / "llm"))
        found.tokenizer.save_pretrained(draft / "llm")
        folders = _tower_folders(draft / "vision", len(encoders))
        for place, tower, encoder in zip(folders, towers, encoders, strict=True):
            own = {"size": list(encoder.image_size)} if len(encoders) > 1 else {}
            write_tower(place, *tower, image={**found.image, **own, "mean": encoder.mean, "std": encoder.std})
        (draft / "chat.json").write_text(json.dumps(found.chat.to_json(), indent=1), encoding="utf-8")

    write_folder(folder, [fill])


def check_mergeable(checkpoint: Path) -> None:
    """Raise CheckpointError if a checkpoint holds nothing beside the weights of its LLM and its tower."""
    if not any((checkpoint / name).exists() for name in BESIDE):
        remedy = "use it as it is; mmit export --format mmit writes it with its base inside"
        raise CheckpointError("there is nothing to merge: it holds no adapter", where=str(checkpoint), remedy=remedy)


def merged_sections(config: Config, folder: Path) -> dict[str, Any]:
    """Sections of a config of a model merged into `folder`: its LLM is there, and a run that begins with it is new."""
    raw, folder = config.model_dump(), folder.resolve()
    raw["run"].update(dir=f"runs/{folder.name}", init_from=str(folder), resume=None)
    raw["model"]["llm"].update(name=str(folder / "llm"), revision=None, random_init=None)
    for part in ("llm", "vision"):
        if raw["tune"][part]["mode"] != "full":
            raw["tune"][part] = {"mode": "frozen"}
    return {**raw, "align": None}


def save_whole(found: Loaded, folder: Path, *, merged: bool = False) -> None:
    """Write a checkpoint with its base weights inside, so that it can be moved; `merged` as in `write_model`."""
    refuse_existing(folder)
    vlm, config = found.vlm, found.config

    def fill(draft: Path) -> None:
        write_model(draft, found, step=found.meta.get("step", 0), include_base=True, merged=merged)
        found.tokenizer.save_pretrained(draft / "llm")  # a run that begins with it reads it as any other LLM
        # Towers of transformers are built from a folder with their config, those of other libraries from code by a
        # name.
        if vlm.vision is not None and config.model.vision is not None:
            section = with_own_towers(config.model.vision.model_dump(), found.folder)
            named = section["towers"] or [section]
            folders = _tower_folders(draft / "vision", len(named))
            for place, tower, encoder in zip(folders, named, parts_of(vlm.vision.as_encoder()), strict=True):
                if tower["kind"] == "hf":
                    write_tower_config(place, tower["name"], encoder)

    write_folder(folder, [fill])
