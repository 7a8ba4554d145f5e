"""The pictures of `mmit data stats`: as many as there is something to show, and files that an image library reads."""

from __future__ import annotations

import PIL.Image
import pytest

from mmit.data.stats import collect
from mmit.data.stats_plots import plot
from mmit.errors import MmitError
from mmit.records import Record
from tests.data.test_stats import encoder, records


def test_pictures(tmp_path):
    rows = records(tmp_path)
    many = [Record.triple(f"Count to {i}.", "1, 2", source=f"source-{i}") for i in range(9)]
    paths = plot(collect([*rows, *many], encode=encoder), tmp_path / "out" / "stats")
    assert [p.name for p in paths] == ["lengths.png", "images.png", "prompts.png", "nearest.png"]
    for path in paths:
        with PIL.Image.open(path) as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    # Data without pictures, or of one record, has fewer.
    assert [p.name for p in plot(collect([Record.triple("42", "43")]), tmp_path)] == ["lengths.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(MmitError, match="cannot write"):
        plot(collect(rows), tmp_path / "file")
