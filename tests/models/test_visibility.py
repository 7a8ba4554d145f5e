"""Patterns of attention by position, and attention written out: against transformers' masks and torch's own kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from mmit.errors import ModelError
from mmit.models import visibility as module
from mmit.models.row_state import RowState, running
from mmit.models.visibility import Scores, Visibility, row_mask, visibility, written_out

ROW = RowState([[0, 4, -1], [4, 3, 0]], None, torch.device("cpu"))


def marker(function: Any, size: int | None = None) -> Any:
    with running(ROW):
        return row_mask(mask_function=function, local_size=size)


def test_a_mask_counts_from_the_keys_of_its_own_path() -> None:
    found = Visibility(sliding_window_causal_mask_function(3), 3).mask(torch.tensor([0, 4]), 2, 6)
    assert found.shape == (2, 1, 2, 6)
    for group, before in enumerate((0, 4)):
        for query in range(2):
            at = before + query
            assert found[group, 0, query].tolist() == [max(0, at - 2) <= key <= at for key in range(6)]


def test_inside_a_row_a_marker_carries_the_pattern_and_outside_transformers_makes_the_mask() -> None:
    assert visibility(marker(causal_mask_function)) is None is visibility(None)  # plain causal, for every fused kernel
    window = visibility(marker(sliding_window_causal_mask_function(3), 3))
    assert window is not None and (window.reach, window.window) == (3, 3)
    other = visibility(marker(and_masks(sliding_window_causal_mask_function(3), lambda b, h, q, k: k % 2 == 0), 3))
    assert other is not None and (other.reach, other.window) == (3, None)
    chunk = visibility(marker(chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long)), 3))
    assert chunk is not None and chunk.window is None
    own = row_mask(
        mask_function=sliding_window_causal_mask_function(2), batch_size=1, q_length=4, kv_length=4, local_size=2
    )
    assert own is not None and own[0, 0].tolist() == [[0 <= q - k < 2 for k in range(4)] for q in range(4)]


def test_patterns_of_more_than_positions_and_masks_of_the_model_s_own_are_refused() -> None:
    with running(ROW), pytest.raises(ModelError, match="hangs on more than positions") as caught:
        row_mask(mask_function=causal_mask_function, use_vmap=True)
    assert "data.packing=false" in (caught.value.remedy or "")
    with pytest.raises(ModelError, match="makes its attention mask itself"):
        visibility(torch.zeros(1, 1, 7, 7))


def states(*, heads: int = 4, kv: int = 2, queries: int = 5, keys: int = 7) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, 8), (2, kv, keys, 8), (2, kv, keys, 6)]
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1 << 26, 60])  # all queries at once, and one after the other
def test_plain_attention_is_torch_s_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch, masked: bool, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)[None, None]
    q, k, v = states()
    ours = written_out(q, k, v, mask if masked else None, 0.3, Scores())
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    factors = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    pairs = (torch.autograd.grad((x * factors).sum(), (q, k, v)) for x in (ours, theirs))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_caps_and_sinks_are_those_of_their_definition() -> None:
    q, k, v = states(heads=2, kv=2)
    scores = 2.0 * torch.tanh(q @ k.transpose(2, 3) * 0.3 / 2.0)
    scores = scores.masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(2), float("-inf"))
    sinks = torch.tensor([0.5, -1.0])
    grown = scores.exp()
    weights = grown / (grown.sum(-1, keepdim=True) + sinks.exp().view(1, 2, 1, 1))
    ours = written_out(q, k, v, None, 0.3, Scores(softcap=2.0, sinks=sinks))
    torch.testing.assert_close(ours, weights @ v, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_stays_finite_and_an_additive_mask_is_added() -> None:
    q, k, v = states()
    nothing = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    assert written_out(q, k, v, nothing, 1.0, Scores()).isfinite().all()
    hidden = torch.zeros(1, 1, 5, 7).masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(2), -1e9)
    torch.testing.assert_close(written_out(q, k, v, hidden, 1.0, Scores()), written_out(q, k, v, None, 1.0, Scores()))


def test_dropout_drops_weights_and_keeps_their_sum_on_average() -> None:
    q, k, _ = states()
    torch.manual_seed(0)
    ones = torch.ones(2, 2, 7, 1)
    drawn = torch.stack([written_out(q, k, ones, None, 1.0, Scores(dropout=0.5)) for _ in range(400)])
    assert drawn.std() > 0.1 and (drawn.mean(0) - 1).abs().max() < 0.2
    assert Scores().plain and not Scores(dropout=0.5).plain and not Scores(softcap=1.0).plain
