"""The shorter RMSNorm rounds as transformers' own does, and is given to nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mmit.models.tuning import fused_norm
from mmit.models.tuning.fused_norm import FusedNorm, fuse_norms


def pair(kind=LlamaRMSNorm, *, dtype=torch.float32, trained=True, eps=1e-5):
    """The norm as transformers has it, and fused."""
    plain = kind(32, eps)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    plain = plain.to(dtype).requires_grad_(trained)
    fused = copy.deepcopy(nn.ModuleList([plain]))
    assert fuse_norms(fused) == 1
    return plain, fused[0]


def results(norm, x, run=lambda norm, x: norm(x)):
    x = x.clone().requires_grad_()
    out = run(norm, x)
    norm.weight.grad = None
    (out.float() * torch.linspace(-1, 1, 32)).sum().backward()
    return [out.detach(), x.grad] + ([norm.weight.grad] if norm.weight.requires_grad else [])


def inputs(dtype=torch.float32, shape=(3, 50, 32)):
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=draw) * torch.logspace(-4, 1, shape[-2])[:, None]).to(dtype)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_as_transformers_does(kind, dtype):
    plain, fused = pair(kind, dtype=dtype)
    expected, ours = (results(m, inputs(dtype)) for m in (plain, fused))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2])
    tolerance = {} if dtype == torch.float32 else {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(ours[1], expected[1], **tolerance)
    assert fused.epsilon == 1e-5


def test_a_frozen_weight_gets_no_gradient():
    plain, fused = pair(trained=False)
    for a, b in zip(results(fused, inputs()), results(plain, inputs()), strict=True):
        torch.testing.assert_close(a, b)
    assert fused.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant):
    _, fused = pair()
    again = results(fused, inputs(), lambda norm, x: checkpoint(norm, x, use_reentrant=reentrant))
    for a, b in zip(again, results(fused, inputs()), strict=True):
        assert torch.equal(a, b)


class Odd(LlamaRMSNorm):
    """Takes the root of something else."""

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) * 1.01)).to(x.dtype)


class Gated(LlamaRMSNorm):
    """Takes two tensors."""

    def forward(self, x, gate):
        return super().forward(x) * gate


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(32),
        lambda: nn.RMSNorm(32),
        lambda: nn.BatchNorm1d(32),
        lambda: GemmaRMSNorm(32),  # scales by 1 + weight
        lambda: Olmo2RMSNorm(32),  # rounds after the weight
        lambda: Odd(32),
        lambda: Gated(32),
    ],
    ids=["LayerNorm", "RMSNorm", "BatchNorm", "Gemma", "Olmo2", "odd", "gated"],
)
def test_anything_else_stays_as_it_is(make):
    model = nn.Sequential(make())
    before = type(model[0])
    fuse_norms(model)
    assert type(model[0]) is before


def test_partitioned_weights_stay_with_their_module():
    model = nn.Sequential(LlamaRMSNorm(32))
    model[0].weight.ds_shape = model[0].weight.shape
    assert fuse_norms(model) == 0


def test_other_number_formats_run_as_in_transformers():
    plain, fused = pair(dtype=torch.float32)
    assert torch.equal(fused(inputs(torch.bfloat16)), plain(inputs(torch.bfloat16)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(inputs()), plain(inputs()))


def test_names_classes_and_copies_stay_and_an_empty_model_is_known_too():
    plain, fused = pair()
    assert list(fused.state_dict()) == ["weight"] and isinstance(fused, LlamaRMSNorm)
    assert type(fused).__name__ == "LlamaRMSNorm" and type(copy.deepcopy(fused)) is type(fused)
    model = nn.Sequential(fused, copy.deepcopy(plain).to("meta"))
    assert fuse_norms(model) == 1 and isinstance(model[1], FusedNorm)
    assert fuse_norms(model) == 0


def test_layers_that_are_alike_are_tried_once_and_others_apart(monkeypatch):
    tried = []
    real = fused_norm._epsilon
    monkeypatch.setattr(fused_norm, "_epsilon", lambda module: tried.append(module) or real(module))
    near, odd = LlamaRMSNorm(32, 1e-5), LlamaRMSNorm(32, 1e-5)
    odd.forward = lambda x: 2 * x  # of this one module alone
    norms = [near, LlamaRMSNorm(32, 1e-5), LlamaRMSNorm(32, 1e-6), LlamaRMSNorm(16, 1e-5), Odd(32), odd]
    assert fuse_norms(nn.ModuleList(norms)) == 4
    assert tried == [near, *norms[2:]]
    assert [norm.epsilon for norm in norms[:4]] == [1e-5, 1e-5, 1e-6, 1e-5]
    assert not any(isinstance(norm, FusedNorm) for norm in (norms[4], odd))
