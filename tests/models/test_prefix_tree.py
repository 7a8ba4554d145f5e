"""Attention level by level of a row's tree: equal to dense attention, and no key is copied."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.packing import build_row
from mmit.models import prefix_tree, varlen
from mmit.models.attention_plan import make_plan
from mmit.models.prefix_tree import make_levels
from tests.examples import examples
from tests.models.test_attention import many
from tests.models.test_varlen import PARTS, heads, with_gradients, written_out


def dense(row, q, k, v):
    """Attention by the definition: a token sees its node up to itself, and the node's ancestors."""
    nodes, total = row.nodes.tolist(), len(row.input_ids)
    seen = torch.zeros(total, total, dtype=torch.bool)
    for start, length, parent in nodes:
        seen[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
        while parent >= 0:
            above, count, parent_of = nodes[parent]
            seen[start : start + length, above : above + count] = True
            parent = parent_of
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * 0.3).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 10**6))
def test_the_tree_is_dense_attention(seed):
    row = build_row(many(random.Random(seed), shared=True))
    q, k, v = heads(row)
    own, levels = make_plan(row.nodes).segments, make_levels(row.nodes.tolist())
    assert levels is not None  # rows are laid out depth first
    call = prefix_tree.Call(own.cu_queries, own.cu_queries, own.longest_query, own.longest_query, causal=True)
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    out = prefix_tree.TreeAttention.apply(*rows, prefix_tree.Tree(call, levels), 0.3, PARTS)[None]
    mine, exact = with_gradients(out, q, k, v), with_gradients(dense(row, q, k, v), q, k, v)
    for a, b in zip((mine[0], *mine[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_nodes_that_do_not_lie_depth_first_are_no_tree_of_blocks():
    assert make_levels([[0, 2, -1], [2, 2, -1], [4, 2, 0]]) is None
    (level,) = make_levels([[0, 2, -1], [2, 2, 0], [4, 3, -1], [7, 1, 2]])
    assert level.queries.rows.tolist() == [2, 3, 7] and level.keys.rows.tolist() == [0, 1, 4, 5, 6]


def test_what_is_kept_of_many_questions_on_one_picture_is_a_copy_of_each_key():
    nodes = torch.tensor([[0, 576, -1], *([576 + 8 * n, 8, 0] for n in range(80))])
    total, kept = 576 + 640, {}
    q, k, v = (torch.randn(total, n, 8, requires_grad=True) for n in (4, 2, 2))

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        varlen.varlen_attention(q, k, v, make_plan(nodes).segments, 0.3, kernels=varlen.Kernels(written_out, PARTS))
    floats = total * (4 + 2 + 2 + 4) * 8 + total * 4  # queries, keys, values, the result, its log-sums
    assert sum(kept.values()) <= 1.01 * 4 * floats
