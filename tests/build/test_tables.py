"""Windows of tables: each is clear to read, and no value of a test split is in a training one."""

from __future__ import annotations

import itertools

import pytest

from mmit.build import tables
from mmit.build.tables import _is_clear, _part


@pytest.mark.parametrize(
    ("values", "clear"),
    [
        ([1.0, 5.0, 9.0], True),
        ([1.0, 8.9, 9.0], False),  # the highest does not stand out
        ([1.0, 1.2, 9.0], False),  # nor the lowest
        ([1.0, 5.0, 5.0, 9.0], False),  # two are the same
        ([1.0, 5.0000001, 5.0, 9.0], False),  # or are written alike
        ([-9.0, -5.0, -1.0], False),  # shares of a negative largest say nothing
    ],
)
def test_a_window_is_clear_where_its_ends_stand_out(values: list[float], clear: bool) -> None:
    assert all(_is_clear(list(order)) is clear for order in itertools.permutations(values))


def test_a_series_is_cut_in_two_without_overlap() -> None:
    points = [(str(n), float(n)) for n in range(11)]
    (title, train), (_, test) = _part(("t", points), "train"), _part(("t", points), "test")
    assert title == "t" and train + test == points and len(train) == 8


def test_the_rows_of_a_table_say_its_ends_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    series = ("Rain", [(f"day {n}", float((n * 37) % 101)) for n in range(100)])
    monkeypatch.setattr(tables, "_all_series", lambda: (series,))
    monkeypatch.setattr(tables, "ROWS", {"train": 30, "test": 30})
    found = list(tables.tables("train"))
    assert [row for row, _ in found] == list(range(1, 31)) and found == list(tables.tables("train"))
    for _, fields in found:
        values = dict(zip(fields["names"], map(float, fields["values"]), strict=True))
        assert fields["highest"] == max(values, key=values.__getitem__)
        assert fields["lowest"] == min(values, key=values.__getitem__)
        assert fields["number"] == len(values) == len(fields["table"].splitlines()) - 1 and 4 <= len(values) <= 7
    seen = {name for _, fields in found for name in fields["names"]}
    assert seen.isdisjoint(name for _, fields in tables.tables("test") for name in fields["names"])
