"""The facts of a row that layers ask for: the path of every record, batches of paths, where each token is in them."""

from __future__ import annotations

import random

import pytest
import torch

from mmit.models.row_state import MIXER, RowState, checkpoint_contexts, current_row, running


def forest(seed: int) -> list[list[int]]:
    """Nodes one after the other, parents before children."""
    rng, nodes, start = random.Random(seed), [], 0
    for number in range(rng.randint(2, 12)):
        length = rng.randint(1, 40)
        nodes.append([start, length, rng.choice([-1, *range(number)]) if number else -1])
        start += length
    return nodes


def row_of(nodes: list[list[int]]) -> RowState:
    return RowState(nodes, None, torch.device("cpu"))


def ancestors(nodes: list[list[int]], node: int) -> list[int]:
    start, length, parent = nodes[node]
    own = list(range(start, start + length))
    return own if parent < 0 else ancestors(nodes, parent) + own


@pytest.mark.parametrize("seed", range(20))
def test_every_leaf_has_its_path_and_every_token_its_place(seed: int) -> None:
    nodes = forest(seed)
    row = row_of(nodes)
    leaves = [n for n in range(len(nodes)) if n not in {parent for _, _, parent in nodes}]
    paths = [ancestors(nodes, n) for n in leaves]
    assert row.paths == paths
    flat = torch.cat([batch.flatten() for batch in row.batches])
    total = sum(length for _, length, _ in nodes)
    assert flat[row.places].tolist() == list(range(total))
    for token in range(total):
        lengths = [len(path) for path in paths if token in path]
        assert row.path_lengths[:, token].tolist() == [min(lengths), max(lengths)]


@pytest.mark.parametrize("seed", range(20))
def test_batches_hold_every_path_once_and_little_padding(seed: int) -> None:
    row = row_of(forest(seed))
    by_length = iter(sorted(row.paths, key=len))
    for batch in row.batches:
        rows = [next(by_length) for _ in range(len(batch))]
        assert all(line[: len(path)] == path for line, path in zip(batch.tolist(), rows, strict=True))
        assert batch.shape[1] == len(rows[-1]) <= 1.5 * len(rows[0]) + 16
    assert next(by_length, None) is None


def test_a_row_is_seen_while_it_runs_and_again_when_a_layer_is_recomputed() -> None:
    row = row_of([[0, 2, -1], [2, 2, -1]])
    assert current_row() is None
    with running(row):
        _, again = checkpoint_contexts()
        with running(None):
            assert current_row() is None
        assert current_row() is row
    assert current_row() is None
    with again:
        assert current_row() is row
    assert current_row() is None


def test_another_device_sees_the_same_row() -> None:
    class Plan:
        def to(self, device: torch.device) -> tuple[str, torch.device]:
            return "moved", device

    row = RowState([[0, 2, -1], [2, 2, 0]], Plan(), torch.device("cpu"))
    assert row.on(torch.device("cpu")) is row
    other = row.on(torch.device("meta"))
    assert other.plan == ("moved", torch.device("meta")) and row.on(torch.device("meta")) is other
    other.calls.append(MIXER)
    assert row.calls == [MIXER]  # whichever device a layer is on, the row knows that it asked
