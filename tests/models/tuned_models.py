"""Tiny composites for tests of tuning: a random Llama with a random CLIP tower, and a row with shared beginnings."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch

from mmit.config import Config
from mmit.models.assemble import assemble
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from tests.tiny_run import two_layers as tiny_config

# A picture with two questions, one of which goes on in two ways, and a text of its own.
NODES = torch.tensor([[0, 7, -1], [7, 4, 0], [11, 3, 1], [14, 2, 1], [16, 5, 0], [21, 6, -1]])
POSITIONS = torch.tensor([*range(7), *range(7, 11), *range(11, 14), 11, 12, *range(7, 12), *range(6)])
PATHS = [[*range(14)], [*range(11), 14, 15], [*range(7), *range(16, 21)], [*range(21, 27)]]
PREDICT_AT = torch.tensor([12, 13, 15, 19, 20, 25, 26])


def tune_plan(component: str, mode: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """A plan that trains one component alone."""
    plan: dict[str, Any] = {c: {"mode": "frozen", "lr": None, "options": {}} for c in ("vision", "projector", "llm")}
    plan[component] = {"mode": mode, "lr": 1e-3, "options": options or {}}
    return plan


def config_for(folder: Path, plan: dict[str, Any]) -> Config:
    """The config of a run with this plan."""
    return tiny_config(folder, tune=plan)


def composite(config: Config) -> tuple[VLM, Any]:
    """The untuned model and its tokenizer; the same weights at every call."""
    made = copy.deepcopy(_composite(json.dumps(config.model.model_dump())))
    torch.manual_seed(0)
    return made


@functools.lru_cache(maxsize=4)
def _composite(model: str) -> tuple[VLM, Any]:
    return assemble(json.loads(model), dtype=torch.float32, seed=0)


def row() -> dict[str, Any]:
    """Arguments of VLM.forward for the row above."""
    draw = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 200, (27,), generator=draw),
        "positions": POSITIONS,
        "nodes": NODES,
        "predict_at": PREDICT_AT,
        "targets": torch.randint(1, 200, (len(PREDICT_AT),), generator=draw),
        "image_positions": torch.arange(1, 5),
        "image_index": torch.arange(4),
        "image_tokens": 4,
        "pixels": torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=draw),
    }


def logits(vlm: VLM, *, path: list[int] | None = None) -> torch.Tensor:
    """Logits at every position of the row, or of one of its records run alone."""
    given = row()
    embeddings = vlm.embed(
        given["input_ids"],
        image_positions=given["image_positions"],
        image_index=given["image_index"],
        image_tokens=4,
        features=vlm.encode_images(given["pixels"]),
    )
    if path is None:
        return vlm.row_logits(embeddings, positions=POSITIONS, nodes=NODES, at=torch.arange(27))
    places = torch.tensor(path)
    alone = torch.tensor([[0, len(path), -1]])
    return vlm.row_logits(embeddings[places], positions=POSITIONS[places], nodes=alone, at=torch.arange(len(path)))


def disturb(vlm: VLM) -> None:
    """Move every trained parameter, so that what a method does can be seen."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def tuned(config: Config) -> VLM:
    """The composite with the config's plan applied and its trained parameters moved."""
    vlm, _ = composite(config)
    apply_tuning(vlm, config.tune.model_dump())
    disturb(vlm)
    return vlm.eval()
