"""Near duplicates: signatures of texts and pictures, and the pairs that they find."""

from __future__ import annotations

import random

import PIL.Image

from mmit.data.lint.near_duplicates import TextSignatures, picture_hash, shingles, similar_pictures
from tests.data.lint.test_linter import words


def test_signatures_estimate_similarity():
    # Jaccard similarity of the shingles, exact, against whether the pair is found.
    rng = random.Random(0)
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for trial in range(60):
        first = words(trial, 200).split()
        second = list(first)
        for place in rng.sample(range(200), 3 if trial % 2 else 40):
            second[place] = "other"
        a, b = (set(shingles(" ".join(text)).tolist()) for text in (first, second))
        similarity = len(a & b) / len(a | b)
        assert similarity > 0.9 or similarity < 0.5
        signatures = TextSignatures()
        signatures.add(" ".join(first))
        signatures.add(" ".join(second))
        hits[similarity > 0.9].append(signatures.pairs() == {1: 0})
    assert all(hits[True]) and not any(hits[False]) and len(hits[True]) == 30


def test_case_and_punctuation_make_no_difference_but_pictures_do():
    signatures = TextSignatures()
    for text, key in [("A cat, on a mat!", 0), ("a cat on a mat", 0), ("a cat on a mat", 1), ("?!", 0), ("...", 0)]:
        signatures.add(text, key=key)
    assert signatures.pairs() == {1: 0}


def test_characters_of_chinese_are_words():
    one_, two = "这是一只坐在垫子上的黑色的猫它在看着窗外的鸟" * 2, "那里有三个红色的圆形和两个蓝色的三角形"
    signatures = TextSignatures()
    for text in (one_, one_ + "吗", two):
        signatures.add(text)
    assert signatures.pairs() == {1: 0}


def test_pairs_do_not_depend_on_batches():
    texts = [words(i % 700, 60) for i in range(1500)]
    signatures = TextSignatures()
    for text in texts:
        signatures.add(text)
    assert signatures.pairs() == {row: row % 700 for row in range(700, 1500)}
    # With the rows from 1400 on as models, the copies of those 100 name them.
    pairs = signatures.pairs(first=1400)
    assert {model for row, model in pairs.items() if row % 700 < 100} == set(range(1400, 1500))
    assert all(row % 700 == model % 700 for row, model in pairs.items()) and len(pairs) == 800


def test_likeness_is_not_handed_on():
    # Each text is near the one before it, the last far from the first.
    text = words(0, 100).split()
    signatures = TextSignatures()
    texts = []
    for step in range(12):
        text[step * 8 : step * 8 + 2] = [f"new{step}", "word"]
        texts.append(set(shingles(" ".join(text)).tolist()))
        signatures.add(" ".join(text))
    pairs = signatures.pairs()
    assert len(texts[0] & texts[-1]) / len(texts[0] | texts[-1]) < 0.5
    assert pairs and all(len(texts[a] & texts[b]) / len(texts[a] | texts[b]) > 0.65 for a, b in pairs.items())


def test_pictures_of_one_colour_are_told_apart():
    hashes = [picture_hash(PIL.Image.new("RGB", (20, 20), colour)) for colour in ("red", "lime", "red", (252, 3, 3))]
    assert similar_pictures(hashes) == {2: 0, 3: 0}
    assert similar_pictures([]) == {}


def test_small_things_on_a_plain_ground_are_told_apart():
    pictures = [PIL.Image.new("RGB", (64, 64), (235, 245, 240)) for _ in range(6)]
    things = [((5, 8), "red"), ((40, 44), "red"), ((5, 8), "blue"), ((5, 10), "gray"), ((30, 5), "brown")]
    for picture, (corner, colour) in zip(pictures, things, strict=False):
        picture.paste(PIL.Image.new("RGB", (12, 12), colour), corner)
    hashes = [picture_hash(picture) for picture in [*pictures, pictures[0].resize((128, 128))]]
    assert similar_pictures(hashes) == {6: 0}
