"""A padded batch of records == each record alone, in loss and gradient, whatever the architecture."""

from __future__ import annotations

import random

import pytest
import torch

from mmit.errors import ModelError
from mmit.models import head
from mmit.models.llm import load_llm
from mmit.models.padded import is_flat
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from tests.models.small_llms import described
from tests.models.test_attention import LLAMA, row_losses, sample
from tests.models.tuned_models import disturb, tune_plan

MODELS = {
    "llama": {},
    "mamba": {"model_type": "mamba", "state_size": 4},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "bloom": {"model_type": "bloom", "n_head": 2, "n_layer": 1},
    "soft-capped": {"model_type": "gemma2", "head_dim": 4, "attn_logit_softcapping": 5.0, "pad_token_id": 0},
}


def build(options, *, padded):
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=described(LLAMA, options), dtype=torch.float32, packed=False)
    return VLM(llm, vision=None, projector=None, padded=padded)


def losses_and_gradients(vlm, groups):
    """Of rows of samples, in order; the model is left without gradients."""
    losses = torch.cat([losses_of(vlm, group) for group in groups])
    losses.sum().backward()
    gradients = {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    return losses.detach(), gradients


def losses_of(vlm, samples):
    return row_losses(vlm.llm, samples, share=False, vlm=vlm)[0]


def assert_as_alone(vlm):
    rng = random.Random(1)
    samples = [sample(rng, length=n, record=r) for r, n in enumerate([9, 4, 30, 17])]
    alone, apart = losses_and_gradients(vlm, [[s] for s in samples])
    together, summed = losses_and_gradients(vlm, [samples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert apart.keys() == summed.keys()
    for name, gradient in apart.items():
        torch.testing.assert_close(summed[name], gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_padded_equals_alone(model):
    assert_as_alone(build(MODELS[model], padded=True))


@pytest.mark.parametrize("method", ["soft_prompt", "prefix"])
def test_every_record_gets_the_virtual_tokens(method):
    vlm = build({}, padded=True)
    apply_tuning(vlm, tune_plan("llm", method, {"tokens": 3}))
    disturb(vlm)
    assert_as_alone(vlm)


def test_without_padding_such_a_row_is_refused():
    rng = random.Random(2)
    with pytest.raises(ModelError, match="would see each other"):
        losses_of(build({}, padded=False), [sample(rng, record=r) for r in range(2)])


def test_logits_that_cannot_be_cut_are_bounded(monkeypatch):
    rng = random.Random(3)
    vlm = build(MODELS["soft-capped"] | {"final_logit_softcapping": 5.0}, padded=True)
    samples = [sample(rng, length=n, record=r) for r, n in enumerate([9, 20])]
    monkeypatch.setattr(head, "MAX_LOGIT_ROWS", 11)  # 6 targets, but 6 places in each of 2 records
    with pytest.raises(ModelError, match="12 supervised tokens"):
        losses_of(vlm, samples)


def test_only_records_that_share_nothing_are_flat():
    assert is_flat(torch.tensor([[0, 3, -1], [3, 2, -1]]))
    assert not is_flat(torch.tensor([[0, 3, -1]]))
    assert not is_flat(torch.tensor([[0, 3, -1], [3, 2, 0]]))
