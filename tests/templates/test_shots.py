"""Solved examples before a question: which rows are drawn, and where their parts stand."""

from __future__ import annotations

import random

import pytest

from mmit.errors import ConfigError
from mmit.records import Image, Text
from mmit.templates.render import Rendered
from mmit.templates.shots import Pool, check_shots, with_shots


def rendered(question: str, answer: str, *images: str) -> Rendered:
    return Rendered((*map(Image, images), Text(question)), answer, None)


def test_examples_stand_whole_before_the_question_and_texts_are_joined() -> None:
    found = with_shots(rendered("Q?", "a"), [rendered("1?", "one", "1.jpg"), rendered("2?", "two")])
    assert [part if isinstance(part, Image) else part.text for part in found.parts] == [
        Image("1.jpg"),
        "1?\none\n\n2?\ntwo\n\nQ?",
    ]
    assert found.target == "a" and with_shots(rendered("Q?", "a"), []).parts == (Text("Q?"),)


def test_no_row_is_drawn_twice_or_shares_an_image() -> None:
    images = [(f"{n // 2}.jpg",) for n in range(12)]  # each picture belongs to two rows
    pool = Pool(list(range(12)), images)
    for seed in range(30):
        drawn = pool.draw(4, rng=random.Random(seed), images=["0.jpg"], skip=3)
        shown = [images[at][0] for at in drawn]
        assert len(set(shown)) == 4 and "0.jpg" not in shown and 3 not in drawn
    assert pool.draw(2, rng=random.Random(7)) == pool.draw(2, rng=random.Random(7))


def test_a_small_pool_is_searched_to_the_last_row() -> None:
    rows = [("same.jpg",)] * 200 + [("other.jpg",)]
    assert Pool(rows, rows).draw(1, rng=random.Random(0), images=["same.jpg"]) == [200]
    with pytest.raises(ConfigError, match="2 examples are asked for, but only 1 rows share no image"):
        Pool(rows, rows).draw(2, rng=random.Random(0), images=["same.jpg"])
    with pytest.raises(ConfigError, match="only 0 rows"):
        Pool([], []).draw(1, rng=random.Random(0))
    text = [()] * 3  # rows of text share nothing
    assert sorted(Pool(text, text).draw(3, rng=random.Random(0))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({-1: 1.0}, "'-1' examples"),
        ({True: 1.0}, "'True' examples"),
        ({33: 1.0}, "'33' examples"),
        ({0: 1.5, 1: -0.5}, "the share of 1 is -0.5"),
        ({0: 0.5, 2: 0.4}, "the shares sum to 0.9"),
    ],
)
def test_shares_that_make_no_whole_are_refused(shares: dict[int, float], told: str) -> None:
    check_shots({0: 0.7, 1: 0.1, 2: 0.2})
    with pytest.raises(ConfigError, match=told):
        check_shots(shares)
