"""What every engine has in common: the scale of a loss, and a loss that is not finite leaves no finite gradient."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.train.engines.base import Engine, Update, poisoned, weighted


def test_the_loss_is_the_weighted_sum_times_the_scale() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    loss = poisoned(weighted(losses, torch.tensor([1.0, 0.0, 0.5])), 0.25)
    loss.backward()
    assert loss.item() == 0.75 and losses.grad is not None and losses.grad.tolist() == [0.25, 0.0, 0.125]
    assert weighted(losses, None) is losses


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_no_gradient_is_finite_where_the_loss_is_not(bad: float) -> None:
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    poisoned(torch.cat([losses, torch.tensor([bad])]), 1.0).backward()
    assert losses.grad is not None and losses.grad.isnan().all()
    # Without it the gradient would be finite, and a step would be taken on a loss that says nothing.
    plain = torch.tensor([1.0], requires_grad=True)
    (plain.sum() + bad).backward()
    assert plain.grad is not None and plain.grad.isfinite().all()


def test_a_loss_too_large_for_its_format_is_found_too() -> None:
    losses = torch.full((4,), 3e38, requires_grad=True)
    poisoned(losses, 1e-30).backward()
    assert losses.grad is not None and losses.grad.isnan().all()


def test_alone_sums_and_verdicts_are_ones_own() -> None:
    alone: Any = SimpleNamespace(world=1)
    alone.all_sum = lambda values: Engine.all_sum(alone, values)
    assert Engine.all_sum(alone, (0.1, 2)) == [0.1, 2]
    assert Engine.all_true(alone, True) is True and Engine.all_true(alone, False) is False


def test_ranks_on_cuda_sum_numbers_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def reduce(total: torch.Tensor, group: Any) -> None:
        told.append((total.device.type, total.dtype, group))
        total.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    ranks: Any = SimpleNamespace(world=2, device=torch.device("cuda"), numbers="over gloo")
    assert Engine.all_sum(ranks, (0.1, 2**53)) == [0.2, 2**54]
    assert told == [("cpu", torch.float64, "over gloo")]


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_gets_what_the_run_says(fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    groups = [{"params": [parameter], "lr": 0.5}]
    made = Update(betas=(0.8, 0.9), eps=1e-4, weight_decay=0.2, clip=None).adamw(groups, fused=fused)
    (group,) = made.param_groups
    told = (group["lr"], group["betas"], group["eps"], group["weight_decay"], bool(group["fused"]))
    assert told == (0.5, (0.8, 0.9), 1e-4, 0.2, fused)
