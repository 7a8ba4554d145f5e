"""State that comes back from disk lies where the optimizer itself would have made it, on CUDA as on the CPU.

Without a GPU: fake tensors have a device and no numbers, and torch's own AdamW, stepping once over the same
parameters, says where each part of its state belongs.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmit.models.tuning import Group
from mmit.train.engines.deepspeed_engine import DeepSpeedEngine
from mmit.train.engines.torch_engine import TorchEngine


class Placed(nn.Module):
    """A fake module that is where it shall be: torch cannot move fake parameters."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, device=device, dtype=dtype)

    def to(self, *args, **kwargs):
        return self


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and torch.version.cuda is None:
        pytest.skip("this build of torch knows no CUDA tensors, not even fake ones")
    return request.param


def fresh(parameters, device):
    """The state that a fused AdamW makes for them."""
    copies = [torch.zeros_like(p, dtype=torch.float32).requires_grad_() for p in parameters]
    for p in copies:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(copies, fused=True)
    optimizer.step()
    return [optimizer.state[p] for p in copies]


def from_disk(parameters):
    """What `read_state` yields: whole tensors on the CPU."""
    return [
        {"step": torch.tensor(3.0), **{k: torch.zeros(p.shape) for k in ("exp_avg", "exp_avg_sq", "master")}}
        for p in parameters
    ]


def assert_alike(state, expected):
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (state[key].device, state[key].dtype, state[key].shape) == (tensor.device, tensor.dtype, tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_step_lies_with_its_parameter(device, dtype):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Placed(device, dtype)
        groups = [Group("llm", 1e-3, list(model.layer.named_parameters()))]
        engine = TorchEngine(model, groups, device=torch.device(device), precision="bf16")
        engine.take_states(zip(engine.names, from_disk(engine.masters), strict=True))
        for master, expected in zip(engine.masters, fresh(engine.masters, device), strict=True):
            assert_alike(engine.optimizer.state[master], expected)
        for master in engine.masters:
            master.grad = torch.zeros_like(master)
        engine.optimizer.step()


def ranked(stage: int, *, plain: bool, masters: list[torch.Tensor], names: list[str]) -> DeepSpeedEngine:
    """An engine whose DeepSpeed optimizer holds just what restoring a state touches."""
    engine = object.__new__(DeepSpeedEngine)
    engine.stage, engine._plain, engine.names, engine.parameters = stage, plain, names, masters
    inner = torch.optim.AdamW(masters, fused=True)
    engine.optimizer = SimpleNamespace(
        optimizer=inner,
        fp32_partitioned_groups_flat=masters,
        _swappable_optimizer_subgroup=lambda number: False,
        _lazy_init_hp_params_optimizer_state=lambda: None,
    )
    return engine


@pytest.mark.parametrize(("stage", "plain"), [(0, True), (1, False), (2, False), (3, False)])
def test_zero_puts_the_step_beside_its_masters(device, stage, plain):
    with FakeTensorMode(allow_non_fake_inputs=True):
        masters = [torch.zeros(8, device=device).requires_grad_() for _ in range(2)]
        engine = ranked(stage, plain=plain, masters=masters, names=["a", "b"])
        states = from_disk(masters) if plain else [{"step": torch.tensor(3.0)} for _ in masters]
        engine.take_states(zip(engine.names, states, strict=True))
        for master, expected in zip(masters, fresh(masters, device), strict=True):
            assert_alike(engine._inner.state[master], expected)


def test_an_optimizer_that_is_not_fused_counts_on_the_cpu():
    """On a device without a fused AdamW (here: none at all) torch keeps the count on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Placed("meta", torch.float32)
        groups = [Group("llm", 1e-3, list(model.layer.named_parameters()))]
        engine = TorchEngine(model, groups, device=torch.device("meta"), precision="fp32")
        engine.take_states(zip(engine.names, from_disk(engine.masters), strict=True))
        assert {engine.optimizer.state[m]["step"].device.type for m in engine.masters} == {"cpu"}
