"""The forecast counts the keys and values that attention on CUDA keeps: shared ones once, repeated ones as often."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from mmit.models import varlen
from mmit.models.assemble import assemble
from mmit.models.fakes import CpuFakes
from mmit.models.prefix_tree import Parts
from mmit.models.shapes import make_fake, planned_attention
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from mmit.train.memory.step_bytes import LiveBytes
from tests.models.test_varlen import part_backward, part_forward, written_out
from tests.models.tuned_models import config_for, row, tune_plan

LAYERS, HEADS, KV, SIZE = 3, 4, 2, 16
PICTURE, QUESTIONS, QUESTION = 200, 80, 6
ONE_PICTURE = torch.tensor(
    [[0, PICTURE, -1], *([PICTURE + QUESTION * n, QUESTION, 0] for n in range(QUESTIONS))]
)  # 80 questions
ALONE = torch.tensor([[0, 300, -1], [300, 280, -1]])


def model(folder: Any, *, empty: bool = False) -> VLM:
    """A composite of three layers with grouped keys; LoRA on its LLM."""
    config = config_for(folder, tune_plan("llm", "lora"))
    given = config.model.model_dump()
    given["llm"]["random_init"] |= {
        "hidden_size": HEADS * SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "max_position_embeddings": 1024,
    }
    vlm, _ = assemble(given, dtype=torch.float32, **({"empty": True} if empty else {"seed": 0}))
    apply_tuning(vlm, config.tune.model_dump())
    vlm.split()
    return vlm.train()


def arguments(nodes: torch.Tensor) -> dict[str, Any]:
    total = int(nodes[-1, 0] + nodes[-1, 1])
    at = nodes[:, 0] + nodes[:, 1] - 1
    places = {"nodes": nodes, "positions": torch.arange(total), "predict_at": at, "targets": at % 100}
    return {**row(), **places, "input_ids": torch.arange(total) % 100}


def kept(vlm: VLM, tensors: dict[str, Any]) -> int:
    """Bytes that a forward pass leaves alive for the backward pass."""
    with LiveBytes() as live:
        live.add([*vlm.parameters(), *vlm.buffers()])
        before = live.now
        losses = vlm(**tensors)
        assert losses.requires_grad
        return live.now - before


def forward(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A part as a kernel lays it out."""
    out, sums = part_forward(*given)
    return out.contiguous(), sums


def told(folder: Any, nodes: torch.Tensor) -> int:
    """The same on shapes alone, as the forecast counts it."""
    vlm, mode = model(folder, empty=True), CpuFakes(allow_non_fake_inputs=True)
    make_fake(vlm, mode)
    tensors = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments(nodes).items()}
    tensors["nodes"] = torch.tensor([[0, len(tensors["input_ids"]), -1]])
    with planned_attention(vlm, nodes, mode=mode, flash=True), mode:
        return kept(vlm, tensors)


def test_many_questions_on_one_picture_keep_what_the_forecast_says(tmp_path, monkeypatch):
    forecast = told(tmp_path, ONE_PICTURE)
    kernel = partial(varlen.varlen_attention, kernels=varlen.Kernels(written_out, Parts(forward, part_backward)))
    monkeypatch.setattr(varlen, "usable", lambda q: True)
    monkeypatch.setattr(varlen, "varlen_attention", kernel)
    vlm, tensors = model(tmp_path), arguments(ONE_PICTURE)
    assert forecast == pytest.approx(kept(vlm, tensors), rel=0.05)
    # Copies of the picture's keys and values, one for each question, are told where they are made.
    monkeypatch.setattr(varlen, "make_levels", lambda table: None)
    heads = KV if varlen._GROUPS else HEADS  # torch 2.11 repeats them for the queries of a group
    copies = LAYERS * 2 * heads * SIZE * 4 * (QUESTIONS - 1) * PICTURE
    assert told(tmp_path, ONE_PICTURE) - forecast == pytest.approx(copies, rel=0.05)


def test_repeated_keys_are_counted_where_torch_repeats_them(tmp_path, monkeypatch):
    monkeypatch.setattr(varlen, "_GROUPS", True)
    grouped = told(tmp_path, ALONE)
    monkeypatch.setattr(varlen, "_GROUPS", False)  # torch 2.11
    tokens = int(ALONE[:, 1].sum())
    assert told(tmp_path, ALONE) - grouped == pytest.approx(LAYERS * 2 * (HEADS - KV) * SIZE * 4 * tokens, rel=0.05)
