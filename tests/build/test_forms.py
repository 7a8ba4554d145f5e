"""Forms to look values up in: drawn whole, their lines known, and no test form among those of training."""

from __future__ import annotations

import itertools
from zlib import crc32

import numpy as np

from mmit.build.forms import FIELDS, TITLES, forms
from tests.build.packaged import opened, some


def test_forms_are_drawn_whole_and_test_forms_are_not_trained_on():
    rows = some("text-forms", 60)
    for row in rows:
        pixels = np.asarray(opened(row["image"]))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).all() and len(row["names"]) == len(row["values"]) == row["number"]
        dark = (pixels[:, 24:-24] < 90).all(2).any(1)
        assert sum(filled for filled, _ in itertools.groupby(dark)) >= row["number"] + 1  # as many lines of text
    assert not {tuple(row["values"]) for row in rows} & {tuple(row["values"]) for row in some("text-forms", 60, "test")}


def test_a_form_asks_for_each_value_once_and_the_same_row_is_the_same_form() -> None:
    rows = some("text-forms", 30)
    for row in rows:
        assert len(set(row["names"])) == len(row["names"]) and set(row["names"]) <= FIELDS.keys()
        assert row["title"] in TITLES and 3 <= row["number"] <= 5
    assert {row["number"] for row in rows} == {3, 4, 5}
    assert [row for _, row in itertools.islice(forms("train"), 5)] == rows[:5]


def test_the_checksum_of_its_values_decides_the_split_of_a_form() -> None:
    for split in ("train", "test"):
        sums = {crc32("|".join(row["values"]).encode()) % 10 == 0 for row in some("text-forms", 20, split)}
        assert sums == {split == "test"}
