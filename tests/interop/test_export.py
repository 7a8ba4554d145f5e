"""Comparison of an export with its source: what is off is refused with numbers, and talks hold what they must."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.errors import ModelError
from mmit.interop.export import _compare_ids, compare_logits, fixed_talks, pictures_of


def test_logits_within_a_share_of_the_largest_pass_and_padding_is_left_out() -> None:
    expected = torch.tensor([[100.0, -3.0], [1.0, 2.0]])
    found = torch.cat([expected + 0.4, torch.full((2, 3), 9e9)], dim=1)  # a head may be padded
    seen = compare_logits(expected, found, tolerance=0.005)
    assert (seen.logits, seen.limit) == (pytest.approx(0.4, rel=1e-5), pytest.approx(0.5))
    with pytest.raises(ModelError, match="the exported model differs: a logit is off by 0.4, more than 0.3"):
        compare_logits(expected, found, tolerance=0.003)
    small = torch.zeros(1, 2)  # of logits near nothing the limit is that of one
    assert compare_logits(small, small + 0.004, tolerance=0.005).limit == 0.005


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    expected = torch.ones(1, 2)
    with pytest.raises(ModelError, match="the merged one differs"):
        compare_logits(expected, torch.tensor([[1.0, bad]]), tolerance=1e9, what="the merged one")


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ([1, 2, 9, 4], "at token 2, near '1 2 3 4', .9, 4. instead of .3, 4."),
        ([1, 2, 3], "at token 3"),
        ([], "at token 0"),
    ],
)
def test_the_first_id_that_differs_is_named(theirs: list[int], told: str) -> None:
    tokenizer: Any = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    _compare_ids([1, 2, 3, 4], [1, 2, 3, 4], tokenizer)
    with pytest.raises(ModelError, match=told):
        _compare_ids([1, 2, 3, 4], theirs, tokenizer)


def test_the_fixed_talks_end_where_an_answer_begins_and_show_unequal_pictures() -> None:
    chat: Any = SimpleNamespace(name="chatml")
    talks = fixed_talks(chat)
    assert [len(pictures_of(talk)) for talk in talks] == [0, 1, 2, 1]
    first, second = pictures_of(talks[2])
    assert first.size != second.size and len(set(first.size)) == 2  # of unequal sides, so that a swap shows
    blind = fixed_talks(chat, sees=False)
    assert [len(talk) for talk in blind] == [1, 3] and not any(pictures_of(talk) for talk in blind)
    plain: Any = SimpleNamespace(name="plain")
    assert not any(turn.text for talk in fixed_talks(plain) for turn in talk)
    assert all(talk[-1].role == "user" for talk in (*talks, *blind))
