"""Models without weights: how their attention is called is counted, and nothing stays changed behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmit.errors import ModelError
from mmit.models import shapes
from mmit.models.fakes import CpuFakes
from mmit.models.llm import load_llm
from mmit.models.shapes import free_attention, make_fake
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from tests.models.small_llms import family

LAYERS, HEADS, SIZE, VIRTUAL = 2, 4, 8, 3
FROZEN = {"mode": "frozen", "lr": None, "options": {}}


def empty(**changes: Any) -> VLM:
    llm = load_llm("", dtype=torch.float32, random_init={**family("llama"), **changes}, empty=True)
    return VLM(llm, vision=None, projector=None)


def run(vlm: VLM, *, learn: bool = False) -> shapes.Calls:
    """Calls of a forward pass over five tokens."""
    states = torch.empty(1, 5, 32, device="meta", requires_grad=learn)
    with free_attention(vlm) as calls:
        vlm.llm(inputs_embeds=states, use_cache=False)
    return calls


def test_a_pair_is_counted_once_for_each_head_and_layer() -> None:
    vlm = empty()
    before = vlm.llm.config._attn_implementation
    vlm.requires_grad_(False)
    calls = run(vlm)
    assert (calls.layers, calls.width, calls.virtual) == (LAYERS, LAYERS * HEADS * 2 * SIZE, 0)
    assert not calls.backward and run(vlm, learn=True).backward
    assert vlm.llm.config._attn_implementation == before


def test_a_prefix_counts_apart_and_is_learnt() -> None:
    vlm = empty()
    prefix = {"mode": "prefix", "lr": 1e-3, "options": {"tokens": VIRTUAL}}
    apply_tuning(vlm, {"vision": FROZEN, "projector": FROZEN, "llm": prefix})
    calls = run(vlm)
    assert calls.virtual == calls.width * VIRTUAL and calls.backward


def test_a_model_that_needs_numbers_is_refused_and_left_as_it_was() -> None:
    vlm, autocast = empty(), torch.autocast
    before = vlm.llm.config._attn_implementation
    with pytest.raises(ModelError, match=r"LlamaForCausalLM does not run on shapes alone \(RuntimeError: no numbers"):
        with free_attention(vlm):
            assert torch.autocast is not autocast
            raise RuntimeError("no numbers")
    assert torch.autocast is autocast and vlm.llm.config._attn_implementation == before
    with pytest.raises(KeyError), free_attention(vlm):  # a defect is no property of the model
        raise KeyError("x")


def test_attention_of_its_own_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "takes_attention", lambda kind: False)
    with pytest.raises(ModelError, match="does not route its attention through transformers' attention interface"):
        run(empty())


def test_fakes_have_a_device_and_share_what_was_shared() -> None:
    vlm = empty(tie_word_embeddings=True)
    vlm.llm.model.norm.weight.requires_grad_(False)
    old = dict(vlm.named_parameters())
    made = make_fake(vlm, CpuFakes(allow_non_fake_inputs=True))
    new = dict(vlm.named_parameters())
    assert new.keys() == old.keys() and all(made[id(old[name])] is new[name] for name in new)
    assert vlm.llm.lm_head.weight is vlm.llm.model.embed_tokens.weight
    for name, parameter in new.items():
        assert (parameter.shape, parameter.dtype, parameter.device.type) == (old[name].shape, old[name].dtype, "cpu")
        assert parameter.requires_grad == old[name].requires_grad
    assert not any(tensor.is_meta for tensor in vlm.buffers())
