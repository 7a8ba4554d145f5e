"""Memory of a step: what stages divide, and the micro-batches it is measured with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.train.memory import estimate
from mmit.train.memory.estimate import ALONE, crops_of, sample_micro_batches, stages
from mmit.train.memory.step_bytes import Bytes

FOUND = Bytes(
    llm=2_000_000, rest=300_000, trained=1_000_000, masters=4_000_000, moments=8_000_000, passing=70_000, single=50_000
)


def test_each_stage_holds_no_more_than_the_one_before_it_on_many_ranks() -> None:
    found = stages(FOUND, ranks=64, precision="bf16")
    assert found[ALONE] == FOUND.total
    assert found["ZeRO-1"] > found["ZeRO-2"] > 0
    # Stage 1 divides masters and moments, 2 the gradients too: four bytes a trained number, but for the share kept.
    bucket = (found["ZeRO-1"] - found["ZeRO-2"] - 4_000_000 * 63 // 64) / 2
    assert bucket >= 0 and bucket == int(bucket)


def test_what_a_stage_divides_shrinks_with_the_ranks_and_the_rest_does_not() -> None:
    one, many = (stages(FOUND, ranks=ranks, precision="bf16") for ranks in (1, 10))
    states, gradients = 12_000_000, 4_000_000
    assert one["ZeRO-1"] - many["ZeRO-1"] == states * 9 // 10
    assert one["ZeRO-2"] - many["ZeRO-2"] == (states + gradients) * 9 // 10
    assert one["ZeRO-3"] - many["ZeRO-3"] == (states + gradients + FOUND.llm) * 9 // 10


@pytest.mark.parametrize(("index", "crops"), [([], 0), ([0, 1, 2], 1), ([0, 3, 4], 2), ([8], 3)])
def test_pictures_are_counted_by_the_tokens_that_are_spliced(index: list[int], crops: int) -> None:
    batch: Any = SimpleNamespace(tensors={"image_index": torch.tensor(index), "image_tokens": 3})
    assert crops_of(batch) == crops


class Order:
    """Eight steps of four rows of one unit; the last step has one row."""

    steps = 8

    def micro_positions(self, step: int, *, rank: int, world: int, micro_rows: int) -> list[list[int]]:
        rows = [4 * step + n for n in range(rank * micro_rows, (rank + 1) * micro_rows)]
        return [rows, [row + world * micro_rows for row in rows]]

    def row(self, position: int) -> list[int] | None:
        return [position] if position < 29 else None


def sampled(monkeypatch: pytest.MonkeyPatch, *, ranks: int, grouped: bool = False) -> list[list[int]]:
    asked: list[Any] = []
    monkeypatch.setattr(estimate, "micro_batches", lambda data, scan, units, **more: asked.extend(units) or [])
    train = SimpleNamespace(rows_per_step=4, micro_rows=2 if grouped else 1)
    data = SimpleNamespace(group=grouped, packing=not grouped)
    config: Any = SimpleNamespace(train=train, data=data, run=SimpleNamespace(on_bad_record="stop"))
    nothing: Any = None
    order: Any = Order()
    list(sample_micro_batches(config, nothing, nothing, order, ranks=ranks))
    return asked


def test_micro_batches_are_taken_evenly_over_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sampled(monkeypatch, ranks=1)
    assert found[0] == [0] and len(found) >= 4 and found == sorted(found)
    assert found[-1][0] >= 24  # up to the last step


def test_grouped_ones_run_from_the_largest_in_a_step_to_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sampled(monkeypatch, ranks=1, grouped=True)
    places = [units[0] % 4 for units in found]
    assert places[0] == 2 and places == sorted(places, reverse=True) and 0 in places
    assert all(len(units) == 2 for units in found)  # a short step stands for none where others are whole
