"""What DeepSpeed would refuse is told first; a step says by its norm whether it was applied; a rank keeps its part."""

from __future__ import annotations

import builtins
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")
from mmit.configs import shipped
from mmit.errors import ConfigError
from mmit.train.engines.deepspeed_engine import DeepSpeedEngine, check_deepspeed, join_deepspeed
from mmit.train.engines.zero import complete, deepspeed_options

# --- before anything is loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        ({"stge": 2}, "did you mean 'stage'"),
        ({"stage": 7}, "stage"),
        ({"stage": 2, "overlap_comm": "perhaps"}, "overlap_comm"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "no such folder"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/no/such/disk"}}, "/no/such/disk"),
        ({"stage": 3, "offload_param": {"device": "floppy"}}, "device"),
    ],
)
def test_what_deepspeed_would_not_take_is_told_before_anything_is_loaded(zero, told):
    whole = complete({"zero_optimization": zero}, precision="bf16" if zero.get("stage") else "fp32", clip=1.0)
    with pytest.raises(ConfigError, match=told) as error:
        check_deepspeed(whole)
    assert error.value.where.startswith("engine.deepspeed") and error.value.remedy


def test_keys_that_deepspeed_knows_by_an_alias_are_taken():
    zero = {"stage": 3, "stage3_max_live_parameters": 1000000, "stage3_prefetch_bucket_size": 1000}
    check_deepspeed(complete({"zero_optimization": zero}, precision="bf16", clip=1.0))


@pytest.mark.parametrize("name", sorted(shipped("deepspeed")))
def test_deepspeed_reads_every_json_of_ours(name, tmp_path):
    whole = complete(deepspeed_options(name), precision="fp32", clip=1.0)
    if "nvme" not in name:
        check_deepspeed(whole)
        return
    for section in ("offload_optimizer", "offload_param"):
        whole["zero_optimization"][section]["nvme_path"] = str(tmp_path)
    try:
        check_deepspeed(whole)
    except ConfigError as error:
        assert "libaio" in error.problem  # all that this machine may lack


def test_where_deepspeed_has_no_fp16_that_is_said_before_anything_is_loaded(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    with pytest.raises(ConfigError, match="train.precision=bf16") as error:
        check_deepspeed(complete({"zero_optimization": {"stage": 2}}, precision="fp16", clip=1.0))
    assert error.value.where == "train.precision"


def test_without_deepspeed_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def missing(name: str, *more: Any) -> Any:
        if name == "deepspeed":
            raise ImportError(name)
        return whole(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed\nrun: pip install 'mmit-tune\[deepspeed\]'"):
        join_deepspeed(cuda=False)


# --- a step, with DeepSpeed's part played by a stub -------------------------------------------------------------------


class Deep(nn.Module):
    """Says of a step what DeepSpeed's engine would, and does what it does to the model: frees children."""

    def __init__(self, model: nn.Module, *, norm: Any = 2.0, applied: bool = True) -> None:
        super().__init__()
        self.model, self.norm, self.applied = model, norm, applied
        self.seen: list[Any] = []
        self.cleared = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.layer(x).sum(-1)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self.seen.append(last)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas  # mmit's own scale is whole
        loss.backward()

    def step(self) -> None:
        self.seen.append([name for name, child in self.model._modules.items() if child is not None])
        if self.norm == "fails":
            raise RuntimeError("out of memory")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared = True

    def get_global_grad_norm(self) -> Any:
        return self.norm

    def was_step_applied(self) -> bool:
        return self.applied


def stepping(*, plain: bool = False, world: int = 1, **told: Any) -> DeepSpeedEngine:
    torch.manual_seed(0)
    model = nn.Module()
    model.layer, model.vision = nn.Linear(3, 2), nn.Linear(1, 1)
    engine = object.__new__(DeepSpeedEngine)
    engine._model, engine._replicated, engine._plain, engine.world = model, ["vision"], plain, world
    engine.parameters = list(model.layer.parameters())
    groups = [{"params": [p], "lr": 0.0} for p in engine.parameters]
    engine.optimizer, engine._peaks = SimpleNamespace(param_groups=groups), [0.5, 0.25]
    engine.engine = Deep(model, **told)
    return engine


@pytest.mark.parametrize(
    ("norm", "applied", "found"),
    [(2.0, True, 2.0), (torch.tensor(3.0), True, 3.0), (None, True, None), (2.0, False, None), (None, False, None)],
)
def test_a_norm_that_is_not_finite_says_that_nothing_was_applied(norm: Any, applied: bool, found: float | None) -> None:
    """DeepSpeed has no norm where it found an overflow before, and a finite one of a step that it skipped."""
    got = stepping(norm=norm, applied=applied).step(1.0)
    assert got == found if found is not None else not torch.isfinite(torch.tensor(got))


def test_rates_are_the_peaks_times_the_factor_however_often() -> None:
    engine = stepping()
    for factor in (0.1, 0.7, 1.0, 0.3):
        engine.step(factor)
        assert [group["lr"] for group in engine.optimizer.param_groups] == [0.5 * factor, 0.25 * factor]


@pytest.mark.parametrize("norm", [1.0, "fails"])
def test_what_is_replicated_is_out_of_deepspeed_s_sight_and_comes_back(norm: Any) -> None:
    engine = stepping(norm=norm)
    vision = engine._model.vision
    try:
        engine.step(1.0)
    except RuntimeError:
        assert norm == "fails"
    assert engine.engine.seen == [["layer"]] and engine._model.vision is vision


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_in_fp32_without_zero_a_gradient_that_is_not_finite_is_seen_here(bad: float) -> None:
    engine = stepping(plain=True, norm="not asked")
    first, second = engine.parameters
    first.grad, second.grad = torch.ones_like(first), torch.zeros_like(second)
    assert engine.step(1.0) == pytest.approx(first.numel() ** 0.5)
    first.grad[0, 0] = bad
    seen = list(engine.engine.seen)
    assert not torch.isfinite(torch.tensor(engine.step(1.0))) and engine.engine.cleared
    assert engine.engine.seen == seen  # DeepSpeed would have stepped
    first.grad = second.grad = None  # a rank whose step held no record
    assert engine.step(1.0) == 0.0


@pytest.mark.parametrize("world", [1, 4])
def test_micro_batches_add_up_to_the_sum_and_not_to_the_mean_over_ranks(world: int) -> None:
    """DeepSpeed divides by the number of ranks, here once at the end."""
    engine, x = stepping(world=world), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])
    expected = torch.autograd.grad((engine.engine(x) * weights).sum() * 0.25, engine.parameters)
    for n, part in enumerate((slice(0, 2), slice(2, 5))):
        losses = engine.forward_backward({"x": x[part]}, scale=0.25, last=n == 1, weights=weights[part])
        torch.testing.assert_close(losses, engine.engine(x)[part].detach())
        assert not losses.requires_grad
    assert engine.engine.seen == [False, True]
    for p, gradient in zip(engine.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad / world, gradient)


# --- a state from disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("key", ["master", "exp_avg"])
def test_a_rank_of_zero_3_keeps_its_part_of_a_tensor(world: int, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are of one size, the last ones padded with zeros; together they are the tensor."""
    from deepspeed import utils

    value = torch.arange(1.0, 11.0).reshape(2, 5)
    size = -(-value.numel() // world)
    kept: list[tuple[str, torch.Tensor]] = []
    monkeypatch.setattr(utils, "safe_get_local_fp32_param", lambda p: torch.zeros(size))
    monkeypatch.setattr(utils, "safe_set_local_fp32_param", lambda p, part: kept.append(("master", part)))
    monkeypatch.setattr(utils, "safe_set_local_optimizer_state", lambda p, part, name: kept.append((name, part)))
    for rank in range(world):
        engine = object.__new__(DeepSpeedEngine)
        engine.stage, engine.rank, engine.world, engine.device = 3, rank, world, torch.device("cpu")
        engine._set_part(nn.Parameter(torch.zeros(0)), value, key)
    assert {name for name, _ in kept} == {key} and {part.numel() for _, part in kept} == {size}
    whole = torch.cat([part for _, part in kept])
    assert torch.equal(whole[:10].reshape(2, 5), value) and not whole[10:].any()


def test_masters_on_disk_are_brought_in_and_written_back_around_a_change() -> None:
    done: list[tuple[str, int]] = []
    engine = object.__new__(DeepSpeedEngine)
    engine.stage = 3
    engine.optimizer = SimpleNamespace(
        _swappable_optimizer_subgroup=lambda number: number == 1,
        _optimizer_states_and_gradient_swap_in=lambda number: done.append(("in", number)),
        _optimizer_states_and_gradient_swap_out=lambda number: done.append(("out", number)),
    )
    for number in range(2):
        with engine._from_disk(number):
            done.append(("changed", number))
    assert done == [("changed", 0), ("in", 1), ("changed", 1), ("out", 1)]
