"""The order of a run's rows from what was measured, and what units cost; no model and no data are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from mmit.data.store import Store
from mmit.errors import CheckpointError
from mmit.train.data import order
from mmit.train.data.order import Ordering, make_row_order, unit_costs

ASKED = Ordering([1.0, 1.0], {"scheme": "weights"}, seed=3, capacity=None, rows_per_step=4, epochs=1.0, steps=None)


def scan(units: int = 24) -> Any:
    """Units of two sources, 1 to `units` tokens; every third has pictures."""
    numbers = np.arange(units)
    return SimpleNamespace(source=numbers % 2, length=numbers + 1, seen=(numbers % 3 == 0) * 2, shared=0)


def llm(width: int, *, heads: int | None) -> Any:
    model: Any = nn.Sequential(nn.Linear(width, width, bias=False))
    sizes = {"hidden_size": width, "num_hidden_layers": 2} | ({"num_attention_heads": heads} if heads else {})
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**sizes))
    return model


def vlm(*, heads: int | None = 2, trainable: bool = False) -> Any:
    vision: Any = nn.Linear(5, 4, bias=False)
    vision.grid, vision.trainable = (3, 2), trainable
    return SimpleNamespace(llm=llm(8, heads=heads), vision=vision)


def test_a_unit_costs_its_tokens_the_square_of_its_length_and_its_pictures() -> None:
    measured = scan()
    tokens = unit_costs(vlm(heads=None), measured, cached=True)
    assert tokens.tolist() == measured.length.tolist()  # without attention, with pictures from a cache
    squares = unit_costs(vlm(), measured, cached=True) - tokens
    # 6 * layers * width FLOPs a squared token, over 4 FLOPs a weight: 6 * 2 * 8 / (4 * 64).
    np.testing.assert_allclose(squares, 0.375 * measured.length**2)
    pictures = unit_costs(vlm(heads=None), measured, cached=False) - tokens
    np.testing.assert_allclose(pictures, measured.seen * 2 * 20 * 6 / (4 * 64))
    trained = unit_costs(vlm(heads=None, trainable=True), measured, cached=False) - tokens
    np.testing.assert_allclose(trained, 3 * pictures)


def rows(asked: Ordering, *, units: int = 24) -> list[list[int]]:
    made, _ = make_row_order(scan(units), asked)
    return [made.row(position) or [] for position in range(made.total_rows)]


def test_an_epoch_holds_every_unit_once_in_an_order_of_the_seed() -> None:
    once = rows(ASKED)
    assert sorted(unit for row in once for unit in row) == list(range(24)) and all(len(row) == 1 for row in once)
    assert once == rows(ASKED) != rows(replace(ASKED, seed=4))
    in_blocks = replace(ASKED, shuffle="block", window=512)
    assert rows(in_blocks, units=900) != rows(replace(in_blocks, window=256), units=900)
    packed = rows(replace(ASKED, capacity=30))
    assert sorted(unit for row in packed for unit in row) == list(range(24))
    assert all(sum(unit + 1 for unit in row) <= 30 for row in packed) and len(packed) < 24


@pytest.mark.parametrize(
    ("change", "key"),
    [({"seed": 4}, "seed"), ({"capacity": 30}, "capacity"), ({"rows_per_step": 3}, "rows_per_step"),
     ({"weights": [1.0, 2.0]}, "weights"), ({"window": 5}, "shuffle")],
)  # fmt: skip
def test_another_order_is_no_continuation(change: dict[str, Any], key: str) -> None:
    made, facts = make_row_order(scan(), ASKED)
    known = {**facts, **made.state(2)}
    again, _ = make_row_order(scan(), replace(ASKED, epochs=2.0), known=known)  # longer: the same order
    assert again.row(9) == made.row(9) and again.steps > made.steps
    with pytest.raises(CheckpointError, match=rf"\({key} differs: "):
        make_row_order(scan(), replace(ASKED, **change), known=known)
    with pytest.raises(CheckpointError, match=r"\(units differs: 24 then, 22 now\)"):
        make_row_order(scan(22), ASKED, known=known)


def test_rows_are_counted_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, store, planned = replace(ASKED, capacity=30), Store(tmp_path), list[int]()
    real = order.plan_rows
    monkeypatch.setattr(order, "plan_rows", lambda *given, **more: planned.append(1) or real(*given, **more))
    first = make_row_order(scan(), asked, store=store)[0]
    assert planned
    planned.clear()
    assert make_row_order(scan(), asked, store=store)[0].total_rows == first.total_rows and not planned
    make_row_order(scan(), replace(asked, seed=9), store=store)
    assert planned  # another order has other counts


def test_mixing_multiplies_the_weights_of_the_sources() -> None:
    asked = replace(ASKED, weights=[2.0, 1.0], mixing={"scheme": "equal"})
    a, b = asked.mixed([10, 30])
    assert a * 10 == pytest.approx(2 * b * 30)  # drawn equally often, and then twice as often
    assert replace(asked, mixing={"scheme": "weights"}).mixed([10, 30]) == [2.0, 1.0]
