"""Checkpoints that refer to nothing outside: imports of other projects' models, and exports with every part inside.

Goes in: a foreign model, or a loaded checkpoint, with the config to store. Comes out: a checkpoint folder that
`load_model` and `run.init_from` take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.errors import CheckpointError, ModelError
from mmit.models.interop.hf_parts import write_tower, write_tower_config
from mmit.models.vision import FUSED
from mmit.train.checkpoint.model import Loaded, write_folder, write_model

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.interop.foreign import Foreign


def refuse_existing(folder: Path) -> None:
    """Raise CheckpointError if a folder is there and holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError("is there already", where=str(folder), remedy="give a new folder, or remove this one")


def imported_sections(found: Foreign, folder: Path) -> dict[str, Any]:
    """Sections of a config that describe an imported model in `folder`, and start a run from it."""
    folder = folder.resolve()
    projector: Any = found.vlm.projector
    return {
        "run": {"dir": f"runs/{folder.name}", "init_from": str(folder)},
        "model": {
            "vision": {"kind": "hf", "name": str(folder / "vision"), **found.vision_options},
            "projector": {"kind": "mlp", "options": {"depth": (len(projector.layers) + 1) // 2}},
            "llm": {"name": str(folder / "llm")},
            "chat": {"format": str(folder / "chat.json")},
        },
        "tune": {"llm": {"mode": "frozen"}},
    }


def save_imported(found: Foreign, folder: Path, config: Config) -> None:
    """Write an imported model as a checkpoint: llm/, vision/, projector, tokenizer, chat.json and `config`."""
    refuse_existing(folder)
    vision, tower = found.vlm.vision, found.tower
    assert vision is not None
    if isinstance(tower, ModelError):
        problem = f"an imported checkpoint holds one CLIP or SigLIP tower, and this encoder {tower.problem}"
        remedy = "use it from its own folder: mmit chat, mmit eval, mmit.load"
        if vision.kind == FUSED:
            problem = "an imported checkpoint holds one CLIP or SigLIP tower, and this model has fused towers"
            remedy += "; to train such a model from its towers, set model.vision.kind=fused and list them under towers"
        raise ModelError(problem, where=tower.where, remedy=remedy) from tower

    def fill(draft: Path) -> None:
        write_model(draft, found.vlm, config=config, tokenizer=found.tokenizer, chat=found.chat, step=0)
        found.vlm.llm.save_pretrained(str(draft / "llm"))  # type: ignore[operator]
        found.tokenizer.save_pretrained(draft / "llm")
        told = {**found.image, "mean": vision.mean, "std": vision.std}
        write_tower(draft / "vision", *tower, image=told)
        (draft / "chat.json").write_text(json.dumps(found.chat.to_json(), indent=1), encoding="utf-8")

    write_folder(folder, [fill])


def save_whole(found: Loaded, folder: Path) -> None:
    """Write a checkpoint with its base weights inside, so that it can be moved anywhere."""
    refuse_existing(folder)
    vlm, config = found.vlm, found.config

    def fill(draft: Path) -> None:
        write_model(
            draft,
            vlm,
            config=config,
            tokenizer=found.tokenizer,
            chat=found.chat,
            step=found.meta.get("step", 0),
            include_base=True,
        )
        if vlm.vision is not None and vlm.vision.kind == "hf" and config.model.vision is not None:
            name = found.folder / "vision"
            write_tower_config(draft / "vision", str(name) if name.exists() else config.model.vision.name, vlm.vision)

    write_folder(folder, [fill])
