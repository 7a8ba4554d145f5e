"""Roots and objects of prompts, and ROUGE-L with the nearest neighbour, against the slow way."""

from __future__ import annotations

import random

import pytest

from mmit.data.diversity import nearest_rouge_l, root_and_object
from mmit.eval.metrics.similarity import rouge_l_one


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Write a short poem about rain.", ("write", "poem")),
        ("Please describe the picture in detail.", ("describe", "picture")),
        ("Could you please list all animals?", ("list", "animals")),
        ("I want you to explain the joke.", ("explain", "joke")),
        ("Based on the text, summarize its argument.", ("summarize", "argument")),
        ("What color is the cat?", ("what", "color")),
        ("How many circles are there?", ("how many", "circles")),
        ("Is there a red shape?", ("is", "red")),
        ("Translate.", ("translate", "")),
        ("A photo of a cat", None),
        ("你好吗", None),
        ("42 + 1 =", None),
        ("", None),
    ],
)
def test_roots_and_objects(prompt, expected):
    assert root_and_object(prompt) == expected


def test_nearest_neighbours_are_those_of_the_slow_way():
    rng = random.Random(0)
    words = "the a cat dog sits on mat tree red blue".split()
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 15))) for _ in range(60)] + ["", "?", "unlike anything"]
    slow = [max(rouge_l_one(one, [other]) for j, other in enumerate(texts) if j != i) for i, one in enumerate(texts)]
    assert nearest_rouge_l(texts) == pytest.approx(slow)
    assert nearest_rouge_l(["one"]) == [0.0] and nearest_rouge_l([]) == []
    assert nearest_rouge_l(["你 好 吗", "你 好 啊"]) == pytest.approx([2 / 3, 2 / 3])
