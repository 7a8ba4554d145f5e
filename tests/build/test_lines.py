"""Lines of text to read: drawn whole, what they say known, and no test text among those of training."""

from __future__ import annotations

import itertools
import re
from zlib import crc32

import numpy as np

from mmit.build.lines import KINDS, MONTHS, lines
from tests.build.packaged import opened, some

FORMS = {
    "date": rf"([1-9]|1\d|2[0-8]) ({'|'.join(MONTHS)}) (19|20)\d\d",
    "price": r"[$€£][1-9]\d{0,3}\.\d\d",
    "code": r"[A-HJ-NP-Z2-9]{4}(-[A-HJ-NP-Z2-9]{4}){0,2}",
    "color": r"[a-z/' ]+",
}


def test_lines_are_drawn_whole_and_test_texts_are_not_trained_on():
    rows = some("text-lines", 80)
    for row in rows:
        pixels = np.asarray(opened(row["image"]))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == border[0]).all() and (pixels != border[0]).any(), row["text"]
    assert not {row["text"] for row in rows} & {row["text"] for row in some("text-lines", 80, "test")}


def test_a_text_has_the_form_of_its_kind_and_the_same_row_is_the_same_text() -> None:
    rows = some("text-lines", 40)
    assert {row["kind"] for row in rows} == set(KINDS)
    for row in rows:
        assert re.fullmatch(FORMS[row["kind"]], row["text"]), row
        assert row["characters"] == sum(not char.isspace() for char in row["text"])
    assert [row for _, row in itertools.islice(lines("train"), 8)] == rows[:8]


def test_a_text_s_checksum_decides_its_split() -> None:
    """So a text is of one split, however many rows are drawn."""
    for split in ("train", "test"):
        assert {crc32(row["text"].encode()) % 10 == 0 for row in some("text-lines", 30, split)} == {split == "test"}


def test_a_text_stands_in_the_middle() -> None:
    for row in some("text-lines", 20):
        pixels = np.asarray(opened(row["image"])).astype(int)
        rows, columns = np.nonzero((pixels != pixels[0, 0]).any(2))
        height, width = pixels.shape[:2]
        free = (rows.min(), height - 1 - rows.max(), columns.min(), width - 1 - columns.max())
        assert all(abs(margin - 8) <= 3 for margin in free), (row["text"], free)
