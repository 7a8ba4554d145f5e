"""Evaluation while training, on data of a few numbers: means, the best model, and what stays untouched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmit.errors import ConfigError, RecordError
from mmit.train.evaluation import Best, Evaluations, HeldOut, untouched
from mmit.train.loop import Progress
from mmit.train.signals import StopNow


class Alone:
    """An engine of one rank; the model's losses are in the batch."""

    rank, world, device = 0, 1, torch.device("cpu")

    def losses(self, tensors: Any) -> torch.Tensor:
        return tensors

    def all_sum(self, values: Any) -> list[float]:
        return list(values)

    def all_true(self, mine: bool) -> bool:
        return mine


class Data:
    """Micro-batches of losses, their weights and sources."""

    def __init__(self, *batches: tuple[list[float], list[float], list[int]], bad: Any = None) -> None:
        self.given, self.bad, self.names = batches, bad or {}, ("a", "b")

    def batches(self) -> Iterator[Any]:
        for losses, weights, sources in self.given:
            held = torch.tensor(weights)
            even = bool((held == 1).all())
            yield SimpleNamespace(
                losses=torch.tensor(losses),
                weight=sum(weights),
                target_weights=held,
                uneven_weights=None if even else held,
                target_records=torch.tensor(sources),
                bad=self.bad,
            )

    def prepare(self, batch: Any) -> torch.Tensor:
        return batch.losses

    def sources_of(self, records: torch.Tensor) -> torch.Tensor:
        return records


def held_out(data: Any, **more: Any) -> HeldOut:
    engine: Any = Alone()
    return HeldOut(engine, data, **{"on_bad": lambda error: None, "should_stop": lambda: False, **more})


def test_the_loss_is_the_mean_over_targets_and_not_over_batches() -> None:
    found = held_out(Data(([1.0, 2.0, 3.0], [1, 1, 1], [0, 0, 1]), ([10.0], [0.5], [1])))(step=1)
    assert found["eval_loss"] == pytest.approx((1 + 2 + 3 + 10 * 0.5) / 3.5)
    assert found["eval_loss/a"] == pytest.approx(1.5) and found["eval_loss/b"] == pytest.approx((3 + 5) / 1.5)
    idle = held_out(Data(([0.0], [0], [0])))(step=1)
    assert idle == {"eval_loss": 0.0}  # nothing is supervised: no source has a mean


def test_a_bad_record_is_noted_once_and_a_stop_leaves_before_the_next_batch() -> None:
    noted: list[RecordError] = []
    error = RecordError("broken", remedy="fix it")
    measure = held_out(Data(([1.0], [1], [0]), ([1.0], [1], [0]), bad={7: error}), on_bad=noted.append)
    measure(1), measure(2)
    assert noted == [error]
    asked = iter([False, True])
    with pytest.raises(StopNow):
        held_out(Data(([1.0], [1], [0]), ([1.0], [1], [0])), should_stop=lambda: next(asked))(1)


@pytest.mark.parametrize(
    ("higher", "value", "best", "better"),
    [
        (False, 1.0, None, True),
        (False, 1.0, 2.0, True),
        (False, 2.0, 1.0, False),
        (True, 2.0, 1.0, True),
        (True, 1.0, 1.0, False),  # the earlier of two equals stays
        (False, 1.0, 1.0, False),
        (True, math.nan, None, False),
        (True, math.inf, 1.0, False),
    ],
)
def test_which_of_two_is_better(higher: bool, value: float, best: float | None, better: bool) -> None:
    assert Best("m", higher).better(value, None if best is None else {"value": best}) is better


def evaluations(*measures: Any, best: Best | None = None) -> tuple[Evaluations, list[Any]]:
    told: list[Any] = []
    log: Any = SimpleNamespace(say=told.append, evaluation=lambda step, found, seconds: told.append((step, found)))
    engine: Any = Alone()
    return Evaluations(engine, nn.Linear(1, 1), list(measures), best=best, log=log), told


def test_the_best_is_remembered_with_its_step() -> None:
    progress, values = Progress(step=2), iter([0.5, 0.7, 0.6])
    judge, told = evaluations(lambda step: {"loss": 1}, lambda step: {"score": next(values)}, best=Best("score", True))
    verdicts = []
    for step in (2, 4, 6):
        progress.step = step
        verdicts.append(judge(progress))
    assert verdicts == [True, True, False] and progress.evaluated == 6
    assert progress.best == {"metric": "score", "value": 0.7, "step": 4}
    assert told[0] == (2, {"loss": 1.0, "score": 0.5})


def test_a_metric_that_nothing_gives_is_named_with_those_there_are() -> None:
    judge, _ = evaluations(lambda step: {"b": 1, "a": 2}, best=Best("c", True))
    with pytest.raises(ConfigError, match="no evaluation gives 'c'; there is a, b") as error:
        judge(Progress(step=1))
    assert error.value.where == "train.keep_best.metric"


def test_an_evaluation_that_is_broken_off_is_due_again() -> None:
    def stopped(step: int) -> Any:
        raise StopNow

    progress = Progress(step=3)
    judge, told = evaluations(stopped, best=Best("a", True))
    assert judge(progress) is False and progress.evaluated == 0 and progress.best is None
    assert "step 3 is broken off and comes again" in told[0]


def test_modes_gradients_and_random_numbers_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[0].bias.requires_grad_(False)
    model[1].eval()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(KeyError), untouched(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        model.requires_grad_(False)
        torch.rand(5)
        raise KeyError
    assert torch.equal(torch.rand(3), expected) and torch.is_grad_enabled()
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert [module.training for module in model.modules()] == [True, True, False]
