"""The plan of a row: every token sees its path and nothing else, parts are made when asked for, nothing is lost on the
way between processes."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmit.models import attention_plan
from mmit.models.attention_plan import RowPlan, make_plan
from tests.examples import examples

# One beginning under 40 questions, and a record that shares nothing.
NODES = [[0, 300, -1], *([300 + 20 * n, 20, 0] for n in range(40)), [1100, 200, -1]]


@st.composite
def forests(draw):
    """Nodes in any order that has parents before children."""
    nodes, start = [], 0
    for n in range(draw(st.integers(1, 9))):
        length = draw(st.integers(1, 12) | st.integers(120, 140))
        nodes.append([start, length, draw(st.integers(-1, n - 1))])
        start += length
    return nodes


def seen_by(nodes):
    """Row position -> positions that it sees, one token at a time."""
    found, paths = {}, []
    for start, length, parent in nodes:
        above = [] if parent < 0 else paths[parent]
        for place in range(start, start + length):
            found[place] = [*above, *range(start, place + 1)]
        paths.append([*above, *range(start, start + length)])
    return found


@settings(max_examples=examples(60), deadline=None)
@given(forests())
@example([[0, 5, -1], [5, 130, 0], [135, 4, 1], [139, 4, 1]])
def test_a_token_sees_its_path_in_every_bucket(nodes):
    plan, found = make_plan(torch.tensor(nodes)), {}
    for number, bucket in enumerate(plan.buckets):
        g, queries, keys = bucket.size
        mask = plan.mask(number)
        if mask is None:
            assert g == 1 and queries == keys
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril()
        for place in bucket.keep.tolist():
            line = bucket.keys.view(g, keys)[place // queries]
            visible = line[mask[place // queries, 0, place % queries]].tolist()
            assert found.setdefault(int(bucket.queries[place]), visible) is visible  # each token once
    assert found == seen_by(nodes)
    assert plan.longest == max(map(len, found.values()))


@settings(max_examples=examples(60), deadline=None)
@given(forests())
def test_a_token_sees_its_path_in_the_segments(nodes):
    segments, found = make_plan(torch.tensor(nodes)).segments, {}
    total = sum(length for _, length, _ in nodes)
    lines = torch.arange(total) if segments.keys is None else segments.keys
    for n, (start, length, _) in enumerate(nodes):
        line = lines[int(segments.cu_keys[n]) : int(segments.cu_keys[n + 1])].tolist()
        assert (int(segments.cu_queries[n]), int(segments.cu_queries[n + 1])) == (start, start + length)
        found |= {start + i: line[: len(line) - length + i + 1] for i in range(length)}
    assert found == seen_by(nodes)


def test_known_tokens_have_keys_and_no_queries():
    plan = make_plan(torch.tensor([[0, 4, -1], [4, 3, 0], [7, 2, 0]]), known=4)
    (bucket,) = plan.buckets
    assert sorted(bucket.queries[bucket.keep].tolist()) == [0, 1, 2, 3, 4] and plan.segments is None
    assert bucket.keys.view(2, -1)[:, :4].tolist() == [[0, 1, 2, 3]] * 2


def test_parts_are_made_when_they_are_asked_for_and_once(monkeypatch):
    made = []
    for name in ("make_buckets", "make_segments"):
        real = getattr(attention_plan, name)
        monkeypatch.setattr(attention_plan, name, lambda *a, name=name, real=real: made.append(name) or real(*a))
    plan = make_plan(torch.tensor(NODES))
    assert plan.longest == 320 and not made
    elsewhere = plan.to("meta")
    for _ in range(2):
        assert plan.buckets and elsewhere.buckets[0].keys.device.type == "meta"
    assert made == ["make_buckets"]
    assert plan.segments is not None and made == ["make_buckets", "make_segments"]


def tensors(plan):
    buckets = [getattr(b, name) for b in plan.buckets for name in ("queries", "keys", "keep", "before")]
    segments = plan.segments
    levels = [x for level in segments.levels for x in (level.call.cu_queries, level.call.cu_keys)]
    return [*buckets, segments.keys, segments.cu_queries, segments.cu_keys, *levels]


def test_a_plan_crosses_processes_as_plain_bytes():
    plan = RowPlan(NODES)
    whole = tensors(plan)
    sent = bytes(ForkingPickler.dumps(plan))  # what a pool sends, with torch's own ways to share memory registered
    assert len(sent) > plan.nbytes == sum(x.nbytes for x in whole)
    come = pickle.loads(sent)
    assert (come.nodes, come.known, come.longest, come.nbytes) == (plan.nodes, 0, 320, plan.nbytes)
    for a, b in zip(tensors(come), whole, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    again = pickle.loads(pickle.dumps(come))
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), whole, strict=True))
    flat = pickle.loads(pickle.dumps(RowPlan([[0, 3, -1], [3, 4, -1]])))
    assert flat.nbytes == 0 and flat.segments.cu_keys is flat.segments.cu_queries  # made here
    flat = pickle.loads(pickle.dumps(flat))
    assert flat.segments.cu_keys is flat.segments.cu_queries and flat.nbytes == 3 * 4


def test_masks_do_not_travel():
    plan = make_plan(torch.tensor(NODES))
    number = len(plan.buckets)
    before = len(pickle.dumps(plan.row))
    assert sum(mask.nbytes for n in range(number) if (mask := plan.mask(n)) is not None) >= 40 * 20 * 320
    assert len(pickle.dumps(plan.row)) == before
