"""Rows: every token and target arrives, nothing is cut, the plan is a pure function that fills rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.packing import Sample, build_row, plan_rows, trie_length
from mmit.errors import RecordError

tokens = st.lists(st.integers(0, 3), min_size=2, max_size=12)


def as_sample(ids, record=0, images=(), width=4):
    return Sample(tuple(ids), (False,) * (len(ids) - 1) + (True,), images, record, (width,) * len(images))


def path_tokens(row, position):
    """Tokens that position sees, read off the node table."""
    table = row.nodes.tolist()
    node = next(i for i, (start, length, _) in enumerate(table) if start <= position < start + length)
    start, _, parent = table[node]
    seen = row.input_ids[start : position + 1].tolist()
    while parent >= 0:
        start, length, parent = table[parent]
        seen = row.input_ids[start : start + length].tolist() + seen
    return seen


@settings(deadline=None)
@given(st.lists(tokens, min_size=1, max_size=8), st.booleans())
def test_each_target_sees_exactly_its_own_record(conversations, share):
    samples = [as_sample(ids, i) for i, ids in enumerate(conversations)]
    row = build_row(samples, share=share)
    assert row.target_records.tolist() == list(range(len(samples)))
    for s, at, target in zip(samples, row.predict_at.tolist(), row.targets.tolist(), strict=True):
        assert path_tokens(row, at) == list(s.ids[:-1])
        assert target == s.ids[-1]
        assert row.positions[at] == len(s.ids) - 2
    assert len(row.input_ids) == trie_length(samples, share=share)
    assert row.unshared_tokens == sum(len(s.ids) - 1 for s in samples)


def test_image_tokens_are_shared_by_equal_pictures_only():
    a = as_sample([5, -200, 7, 8], 0, ("cat",))
    b = as_sample([5, -200, 9, 8], 1, ("cat",))
    c = as_sample([5, -200, 7, 8], 2, ("dog",))
    row = build_row([a, b, c])
    assert row.images == ["cat", "dog"]
    assert len(row.image_positions) == 8
    assert row.input_ids[row.image_positions].tolist() == [0] * 8
    # 5, then (4 image tokens + 7 + 9) for the cat, (4 image tokens + 7) for the dog
    assert len(row.input_ids) == 1 + 6 + 5


def test_tokens_after_the_last_supervised_one_do_not_run():
    ids = (1, 2, 3, 4, 5)
    row = build_row([Sample(ids, (False, False, True, False, False), (), 0)])
    assert row.input_ids.tolist() == [1, 2]
    assert row.targets.tolist() == [3]


def test_slots_and_images_must_agree():
    with pytest.raises(RecordError, match="2 image slots but 1 images"):
        build_row([as_sample([-200, -200, 1], 3, ("cat",))])


def test_a_sample_without_targets_is_refused():
    with pytest.raises(RecordError, match="nothing to learn"):
        build_row([Sample((1, 2), (True, False), (), 0)])


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(0, 5), st.integers(8, 4096))
def test_plan_places_every_bundle_once_within_capacity(lengths, seed, window):
    shared = min(min(lengths), 3) - 1
    lengths = np.array(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = plan_rows(lengths, capacity=64, order=order, shared=shared, window=window)
    assert sorted(b for row in rows for b in row) == list(range(len(lengths)))
    place = np.argsort(order)
    for row in rows:
        assert shared + sum(lengths[b] - shared for b in row) <= 64
        assert (np.diff(place[row]) > 0).all()  # a row keeps the order of its bundles
    assert rows == plan_rows(lengths, capacity=64, order=order, shared=shared, window=window)


def test_rows_are_full_on_a_realistic_mix_and_keep_the_shuffle():
    """LLaVA-like: 576 image tokens in most records, text of varied length."""
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(5.0, 0.7, 20000), 20, 1400).astype(np.int64)
    lengths = text + np.where(rng.random(20000) < 0.94, 576, 0)
    order = rng.permutation(len(lengths))
    rows = plan_rows(lengths, capacity=4096, order=order)
    assert lengths.sum() / (len(rows) * 4096) > 0.985
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    starts = np.array([place[row[0]] for row in rows])
    assert (np.diff(starts) > 0).all()  # rows begin with the oldest bundle


@given(seed=st.integers(0, 10**6))
def test_the_length_of_one_sample_is_that_of_its_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [int(t) if rng.random() < 0.8 else -200 for t in rng.integers(0, 5, rng.integers(2, 20))]
    slots = sum(t < 0 for t in ids)
    weights = [float(rng.choice([0, 0.3, 1])) * (t >= 0) for t in ids]
    weights[-1], ids[-1] = (1.0, 3) if not any(weights[1:]) else (weights[-1], ids[-1])
    slots = sum(t < 0 for t in ids)
    sample = Sample(tuple(ids), tuple(weights), tuple(range(slots)), 0, tuple(rng.integers(1, 9, slots).tolist()))
    assert trie_length([sample]) == len(build_row([sample]).input_ids)
