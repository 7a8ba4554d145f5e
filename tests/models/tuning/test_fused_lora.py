"""Fused LoRA computes what PEFT computes, and hands over to PEFT wherever PEFT does more."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmit.models.tuning import fused_lora
from mmit.models.tuning.fused_lora import FusedLinear, fuse_lora
from mmit.models.tuning.lora import tune_vision_lora

OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": False}


def pair(*, dtype=torch.float32, biased=True, **options):
    """The same adapted model twice: as PEFT makes it, and fused."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=biased), nn.SiLU(), nn.Linear(40, 16, bias=biased)).to(dtype)
    plain = get_peft_model(base, LoraConfig(**{**OPTIONS, **options}), autocast_adapter_dtype=False)
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 2
    return plain, fused


def results(model, x, run=lambda model, x: model(x)):
    """Output, then the gradients of the input and of everything trained."""
    x = x.clone().requires_grad_()
    out = run(model, x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad) and None not in trained
    return [out.detach(), x.grad, *trained]


def inputs(dtype=torch.float32, shape=(2, 7, 24)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """One entry for every layer that ran fused."""
    seen = []
    run = fused_lora._Fused.apply
    monkeypatch.setattr(fused_lora._Fused, "apply", lambda *given: seen.append(1) or run(*given))
    return seen


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (24,), (0, 24)], ids=str)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_output_and_every_gradient_are_those_of_peft(calls, dtype, tolerance, shape, bias):
    plain, fused = pair(dtype=dtype, biased=bias == "all", bias=bias)
    expected, ours = (results(m, inputs(dtype, shape)) for m in (plain, fused))
    assert len(calls) == 2
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    shapes = [(5, 6), (7, 6), (7,), (3, 6), (7, 3)]
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: fused_lora._Fused.apply(*x, 1.5), given)


def test_bf16_rounds_no_more_than_peft_does():
    exact = results(pair(dtype=torch.bfloat16)[0].double(), inputs(torch.bfloat16).double())
    errors = []
    for model in pair(dtype=torch.bfloat16):
        found = results(model, inputs(torch.bfloat16))
        errors.append([(a.double() - b).norm().item() for a, b in zip(found, exact, strict=True)])
    assert sum(errors[1]) <= sum(errors[0])


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.0}], ids=str
)
def test_kinds_of_lora_that_are_plain_products_run_fused(calls, options):
    plain, fused = pair(**options)
    for a, b in zip(results(fused, inputs()), results(plain, inputs()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_kinds_of_lora_that_are_more_run_as_in_peft(calls, options):
    plain, fused = pair(**options)
    found = []
    for model in (fused, plain):
        torch.manual_seed(2)  # dropout draws the same
        found.append(results(model.train(), inputs()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert not calls
    if "lora_dropout" in options:
        torch.testing.assert_close(fused.eval()(inputs()), plain.eval()(inputs()))
        assert len(calls) == 2


def test_adapters_can_be_disabled_merged_added_and_mixed(calls):
    plain, fused = (model.eval() for model in pair())
    x = inputs(shape=(4, 24))
    with fused.disable_adapter():
        assert torch.equal(fused(x), plain.get_base_model()[2].base_layer(plain_base(plain, x)))
    expected = plain(x)
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)
    fused.unmerge_adapter()
    assert not calls
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(**OPTIONS))
    names = ["default", "other", "__base__", "default"]
    torch.testing.assert_close(fused(x, adapter_names=names), plain(x, adapter_names=names))
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(fused(x), plain(x))
    assert len(calls) == 2
    for model in (plain, fused):
        model.set_adapter("other")
    torch.testing.assert_close(fused(x), plain(x), atol=1e-6, rtol=1e-6)
    assert len(calls) == 4
    torch.testing.assert_close(fused.merge_and_unload()(x), plain(x), atol=1e-5, rtol=1e-5)


def plain_base(model, x):
    first = model.get_base_model()[0].base_layer
    return nn.functional.silu(first(x))


def partition(layer):
    layer.base_layer.weight.ds_shape = layer.base_layer.weight.shape


def replace_forward(layer):
    run = layer.base_layer.forward
    layer.base_layer.forward = lambda x: run(x)


@pytest.mark.parametrize(
    "change",
    [
        partition,
        replace_forward,
        lambda layer: layer.base_layer.register_forward_hook(lambda module, given, out: out + 1),
        lambda layer: layer.lora_A["default"].register_forward_pre_hook(lambda module, given: None),
        lambda layer: layer.lora_B["default"].register_full_backward_hook(lambda module, before, after: None),
        lambda layer: layer.base_layer.to(torch.bfloat16),
    ],
    ids=["partitioned", "own forward", "hook", "pre-hook", "backward hook", "number formats"],
)
def test_a_layer_whose_parts_are_watched_or_elsewhere_runs_as_in_peft(calls, change):
    plain, fused = pair()
    for model in (plain, fused):
        change(model.get_base_model()[0])
    x = inputs().to(plain.get_base_model()[0].base_layer.weight.dtype)
    first = [m.get_base_model()[0](x) for m in (plain, fused)]
    assert torch.equal(*first) and not calls


def test_autocast_is_left_to_peft(calls):
    plain, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(inputs()), fused(inputs()))
    assert not calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant):
    plain, fused = pair()
    again = lambda model, x: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    for a, b in zip(results(fused, inputs(), again), results(plain, inputs()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_names_copies_and_other_layers_stay():
    plain, fused = pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert isinstance(fused.get_base_model()[0], Linear)
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        twin.get_base_model()[0].lora_A["default"].weight.zero_()
    assert not torch.equal(twin(inputs()), fused(inputs()))
    assert fuse_lora(fused) == 0


def test_towers_are_fused_too():
    tower = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4))
    adapted = tune_vision_lora(tower, {"r": 2, "alpha": 4, "rslora": False, "dora": False, "targets": None})
    assert [type(m) for m in adapted.modules() if isinstance(m, Linear)] == [FusedLinear]
    assert tune_vision_lora(adapted, {}) is adapted
