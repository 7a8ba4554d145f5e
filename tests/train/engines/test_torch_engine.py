"""The engine of one process: the gradient of a whole step, masters for bf16, nothing changed by what is not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmit.errors import ConfigError
from mmit.models.tuning import Group
from mmit.train.engines.base import Update
from mmit.train.engines.torch_engine import TorchEngine


class Losses(nn.Module):
    """(S, 3) inputs -> (S,) losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().sum(-1)


def engine(model: nn.Module, **update: object) -> TorchEngine:
    group = Group("projector", 0.1, list(model.named_parameters()))
    return TorchEngine(model, [group], device=torch.device("cpu"), precision="fp32", update=Update(**update))  # type: ignore[arg-type]


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("cuts", [[6], [2, 4], [1, 2, 3]])
def test_micro_batches_add_up_to_the_gradient_of_the_step(cuts: list[int]) -> None:
    model, reference = Losses(), Losses()
    (reference(X) * WEIGHTS).sum().div(WEIGHTS.sum()).backward()
    run = engine(model)
    pairs = list(zip(X.split(cuts), WEIGHTS.split(cuts), strict=True))
    found = [
        run.forward_backward({"x": x}, scale=1 / float(WEIGHTS.sum()), last=n == len(pairs) - 1, weights=w)
        for n, (x, w) in enumerate(pairs)
    ]
    torch.testing.assert_close(torch.cat(found), reference(X).detach())  # not weighted
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_step_is_adamw_s_at_the_factor_s_rate() -> None:
    model, reference = Losses(), Losses()
    options = {"lr": 0.05, "betas": Update().betas, "weight_decay": Update().weight_decay}
    theirs, run = torch.optim.AdamW(reference.parameters(), **options), engine(model, clip=None)
    for _ in range(3):
        reference(X).mean().backward()
        theirs.step()
        theirs.zero_grad()
        run.forward_backward({"x": X}, scale=1 / 6, last=True)
        assert run.step(0.5) > 0
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)
        assert mine.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = Losses()
    before, run = copy.deepcopy(model.state_dict()), engine(model)
    run.forward_backward({"x": torch.full((1, 3), float("inf"))}, scale=1.0, last=True)
    assert not torch.isfinite(torch.tensor(run.step(1.0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    run.forward_backward({"x": X}, scale=1 / 6, last=True)  # and the next step is sound
    assert run.step(1.0) > 0


def test_masters_take_updates_that_bf16_would_lose_and_come_back_with_the_state() -> None:
    plain, split = Losses(), Losses().to(torch.bfloat16)
    with torch.no_grad():
        for mine, other in zip(plain.parameters(), split.parameters(), strict=True):
            mine.copy_(other)
    runs = [engine(plain, clip=None), engine(split, clip=None)]
    assert not runs[0].split and runs[1].split
    for _ in range(20):
        for run, x in zip(runs, (X, X.to(torch.bfloat16)), strict=True):
            for part in x.split(3):
                run.forward_backward({"x": part}, scale=1 / 6, last=True)
            run.step(1e-3)
    for mine, master in zip(plain.parameters(), runs[1].masters, strict=True):
        torch.testing.assert_close(mine, master, atol=3e-4, rtol=0)
        assert not torch.equal(master, master.bfloat16().float())
    again = engine(copy.deepcopy(split), clip=None)
    again.take_states([(name, dict(state)) for name, state in runs[1].states()])
    for one, other in zip(again.masters, runs[1].masters, strict=True):
        assert torch.equal(one, other)


def test_fp16_needs_the_other_engine() -> None:
    with pytest.raises(ConfigError, match="loss scaling"):
        TorchEngine(Losses(), [], device=torch.device("cpu"), precision="fp16")
