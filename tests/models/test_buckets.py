"""Passes around attention: the same numbers as indexing and SDPA, with gradients, for any number of heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmit.models import buckets
from mmit.models.attention import forest_attention
from mmit.models.attention_plan import make_plan

# Two records that share a beginning, one that goes on from there, one of its own.
NODES = torch.tensor([[0, 4, -1], [4, 7, 0], [11, 5, 0], [16, 2, 1], [18, 6, -1]])
PATHS = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 1, 3], 4: [4]}
TOKENS = 24


def states(heads, kv, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    make = lambda count: torch.randn(1, count, TOKENS, 8, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    return [make(n).requires_grad_() for n in (heads, kv, kv)]


def visible():
    """(T, T) whether a token sees another, from the nodes alone."""
    owner = torch.repeat_interleave(torch.arange(len(NODES)), NODES[:, 1])
    above = torch.tensor([[int(b) in PATHS[int(a)] for b in owner] for a in owner])
    return above & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def run(attend, given):
    out = attend(*given)
    return [out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, 8)).sum(), given)]


def dense(q, k, v):
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(), scale=0.3, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("heads, kv", [(4, 4), (6, 2), (3, 1)])
def test_a_row_has_the_output_and_gradients_of_a_dense_mask(monkeypatch, heads, kv, small):
    if not small:
        monkeypatch.setattr("mmit.models.attention.SMALL", 0)
    plan = make_plan(NODES)
    given = states(heads, kv)
    ours = run(lambda q, k, v: forest_attention(q, k, v, plan, 0.3), given)
    for a, b in zip(ours, run(dense, given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert list(plan.layouts) == [(heads, kv)]


def test_bf16_is_as_near_to_the_truth_as_sdpa():
    exact = run(dense, [x.detach().double().requires_grad_() for x in states(6, 2, torch.bfloat16)])
    plan, errors = make_plan(NODES), []
    for attend in (lambda q, k, v: forest_attention(q, k, v, plan, 0.3), dense):
        found = run(attend, states(6, 2, torch.bfloat16))
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    assert max(errors[0]) < 0.01
    assert sum(errors[0]) < 1.5 * sum(errors[1])


def test_written_out_attention_has_the_gradients_of_differences():
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2)
    added = buckets.additive(mask, heads=4, kv=2, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 6), (2, 2, 5, 6), (2, 2, 5, 6)]
    given = [torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda q, k, v: buckets.small_attention(q, k, v, added, 0.7), given)


def test_what_is_hidden_has_no_influence_and_no_gradient():
    plan = make_plan(NODES)
    q, k, v = states(4, 2)
    forest_attention(q, k, v, plan, 0.3)[:, 18:].sum().backward()
    for x in (q, k, v):
        assert x.grad[:, :, :18].abs().max() == 0.0 and x.grad[:, :, 18:].abs().max() > 0
    other = [x.detach().clone() for x in (q, k, v)]
    for x in other:
        x[:, :, :18] += 1
    with torch.no_grad():
        assert torch.equal(forest_attention(*other, plan, 0.3)[:, 18:], forest_attention(q, k, v, plan, 0.3)[:, 18:])
