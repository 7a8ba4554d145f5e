"""The layout for variable-length kernels: run by a kernel written out, it is the attention of the buckets."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.masking_utils import sliding_window_causal_mask_function

from mmit.data.packing import build_row
from mmit.models import varlen
from mmit.models.attention import PLAIN, Kind, forest_attention
from mmit.models.attention_plan import make_plan
from mmit.models.prefix_tree import Parts
from mmit.models.visibility import Visibility
from tests.examples import examples
from tests.models.test_attention import many


def written_out(q, k, v, segments, scale, window=None):
    """What the kernel does: segment by segment, causal, aligned to the bottom right."""
    out = torch.empty_like(q)
    queries, keys = segments.cu_queries.tolist(), segments.cu_keys.tolist()
    repeat = q.shape[1] // k.shape[1]
    for n in range(len(queries) - 1):
        a, b, c, d = queries[n], queries[n + 1], keys[n], keys[n + 1]
        assert b - a <= segments.longest_query and d - c <= segments.longest_key
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        if window is not None:
            mask = mask.triu(d - c - (b - a) - window + 1)
        mine_k, mine_v = (x[c:d].repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (k, v))
        out[a:b] = F.scaled_dot_product_attention(
            q[a:b].transpose(0, 1), mine_k, mine_v, attn_mask=mask, scale=scale
        ).transpose(0, 1)
    return out


def _scores(q, k, call, scale):
    """Of every query with every key of its part, -inf elsewhere: (H, queries, keys)."""
    part_q, part_k = (
        torch.bucketize(torch.arange(len(x)), bounds[1:], right=True)
        for x, bounds in ((q, call.cu_queries), (k, call.cu_keys))
    )
    seen = part_q[:, None] == part_k
    if call.causal:
        seen = seen & torch.ones_like(seen).tril()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("qhd,khd->hqk", q, k).mul(scale).masked_fill(~seen, float("-inf"))


def part_forward(q, k, v, call, scale):
    """What a flash kernel gives: the result and its log-sums."""
    assert max(call.cu_queries.diff().tolist()) == call.longest_query and len(q) == call.cu_queries[-1]
    assert max(call.cu_keys.diff().tolist()) == call.longest_key and len(k) == call.cu_keys[-1]
    scores = _scores(q, k, call, scale)
    sums = scores.logsumexp(-1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", (scores - sums[..., None]).exp(), v), sums


def part_backward(grad, states, known, call, scale):
    """What a flash backward computes from a result and its log-sums, which may be those of more keys than these."""
    (q, k, v), (out, sums) = states, known
    groups = q.shape[1] // k.shape[1]
    weights = (_scores(q, k, call, scale) - sums[..., None]).exp()
    many_k, many_v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    dv = torch.einsum("hqk,qhd->khd", weights, grad)
    toward = torch.einsum("qhd,khd->hqk", grad, many_v) - (grad * out).sum(-1).T[..., None]
    scores = weights * toward * scale
    dq, dk = torch.einsum("hqk,khd->qhd", scores, many_k), torch.einsum("hqk,qhd->khd", scores, q)
    return dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


PARTS = Parts(part_forward, part_backward)


def heads(row, *, dtype=torch.float64, device="cpu", size=8):
    torch.manual_seed(0)
    total = len(row.input_ids)
    return [torch.randn(1, n, total, size, dtype=dtype, device=device).requires_grad_() for n in (4, 2, 2)]


def by_segments(row, q, k, v, window=None):
    """Output and gradients through the segments, with the kernel written out."""
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    segments = make_plan(row.nodes).segments
    out = varlen.varlen_attention(*rows, segments, 0.3, window=window, kernels=varlen.Kernels(written_out, PARTS))
    return with_gradients(out[None], q, k, v)


def by_function(row, q, k, v, window=None):
    """Output and gradients as layers get them: buckets on the CPU and in float64, the kernel in half precision."""
    kind = PLAIN
    if window is not None:
        kind = Kind(Visibility(sliding_window_causal_mask_function(window), window, window))
    return with_gradients(forest_attention(q, k, v, make_plan(row.nodes).to(q.device), 0.3, kind=kind), q, k, v)


def with_gradients(out, *inputs):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out, torch.autograd.grad(out, inputs, upstream.to(out))


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([None, 3, 12]))
@example(6974, True, 3)  # queries that only pad a node see no key in the window
def test_segments_are_the_attention_of_buckets(seed, shared, window):
    row = build_row(many(random.Random(seed), shared=shared))
    tensors = heads(row)
    (out, grads), (other, others) = by_segments(row, *tensors, window), by_function(row, *tensors, window)
    for a, b in zip((out, *grads), (other, *others), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)  # both have parts in float32


def test_records_that_share_nothing_are_taken_as_they_lie():
    row = build_row(many(random.Random(1), shared=False), share=False)
    segments = make_plan(row.nodes).segments
    assert segments.keys is None and segments.cu_keys is segments.cu_queries
    moved = segments.to("cpu")
    assert moved.cu_keys is moved.cu_queries
    assert segments.cu_queries.dtype == torch.int32 and segments.cu_queries[-1] == len(row.input_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_agrees_with_the_buckets(shared, dtype, window):
    row = build_row(many(random.Random(2), shared=shared), share=shared)
    tensors = heads(row, dtype=dtype, device="cuda", size=64)
    assert varlen.usable(tensors[0])
    exact = [x.detach().double().requires_grad_() for x in tensors]
    (out, grads), (other, others) = by_function(row, *tensors, window), by_function(row, *exact, window)
    for a, b in zip((out, *grads), (other, *others), strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_the_kernel_lets_nothing_through_from_another_record():
    row = build_row(many(random.Random(3), shared=False), share=False)
    q, k, v = heads(row, dtype=torch.bfloat16, device="cuda", size=64)
    plan = make_plan(row.nodes).to("cuda")
    cut = int(row.nodes[1, 0])
    out = forest_attention(q, k, v, plan, 0.3)
    for grad in torch.autograd.grad(out[:, :cut].sum(), (q, k, v)):
        assert grad[:, :, cut:].abs().max() == 0.0
