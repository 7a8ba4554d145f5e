"""The linter's rules about pictures: missing, unreadable, mislabelled, twice, near, and among the test data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmit.data.lint.linter import lint
from mmit.records import Image, Record, Turn
from tests.data.lint.test_linter import found, talk


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path):
    for i in range(12):
        noise(i).save(tmp_path / f"{i}.png")
    return tmp_path


def about(path: Path | str, **provenance: Any) -> Record:
    name = Path(path).name
    provenance.setdefault("id", name)
    return Record.triple(f"What is in {name}?", "A pattern.", images=[str(path)], **provenance)


def test_sound_pictures(pictures):
    rows = [about(pictures / f"{i}.png", meta={"width": 40, "height": 30}) for i in range(12)]
    assert not lint(rows, open_images=True).findings


def test_missing_and_unreadable_pictures(pictures):
    (pictures / "0.png").write_text("no picture")
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    rows = [about(pictures / name) for name in ("0.png", "1.png", "2.png", "gone.png")]
    again = talk("And what is this?", "Nothing.", id="again")
    again = Record((Turn("user", (Image(str(pictures / "gone.png")), *again.turns[0].parts)), again.turns[1]), id="2nd")
    unopened = lint([*rows, again])
    assert found(unopened) == {"missing-image": ["record (gone.png)", "record (2nd)"]}
    assert "content of images" in unopened.not_checked
    opened = found(lint([*rows, again], open_images=True))
    assert opened["unreadable-image"] == ["record (0.png)", "record (1.png)"]
    assert opened["missing-image"] == ["record (gone.png)", "record (2nd)"]


def test_pictures_that_are_not_what_they_say(pictures):
    noise(50).save(pictures / "wrong.jpg", "PNG")
    rows = [about(pictures / "wrong.jpg"), about(pictures / "3.png", meta={"width": 41, "height": 30})]
    report = lint(rows, open_images=True)
    assert found(report) == {"image-mismatch": ["record (wrong.jpg)", "record (3.png)"]}
    assert "is a PNG file" in report.findings["image-mismatch"][0].problem
    assert "41 x 30 by the row, 40 x 30 by the file" in report.findings["image-mismatch"][1].problem


def test_the_same_and_similar_pictures(pictures):
    (pictures / "copy.png").write_bytes((pictures / "5.png").read_bytes())
    noise(6, (80, 60)).save(pictures / "scaled.jpg", quality=80)
    names = [*(f"{i}.png" for i in range(12)), "copy.png", "scaled.jpg"]
    report = lint([about(pictures / name) for name in names], open_images=True)
    assert found(report) == {"duplicate-image": ["record (copy.png)"], "near-duplicate-image": ["record (scaled.jpg)"]}


def test_pictures_of_the_test_data(pictures):
    (pictures / "copy.png").write_bytes((pictures / "5.png").read_bytes())
    noise(6, (80, 60)).save(pictures / "scaled.jpg", quality=80)
    train = [about(pictures / f"{i}.png") for i in range(8)]
    test = [about(pictures / name, id=f"test-{name}") for name in ("9.png", "1.png", "copy.png", "scaled.jpg")]
    report = lint(train, test=test, open_images=True)
    assert found(report) == {
        "test-image": ["record (1.png)", "record (5.png)"],
        "test-image-near": ["record (6.png)"],
        "test-record": ["record (1.png)"],
    }
    # By name alone: only the file that both use.
    assert found(lint(train, test=test))["test-image"] == ["record (1.png)"]


def test_pictures_inside_the_records():
    out = io.BytesIO()
    noise(1).save(out, "PNG")
    rows = [Record.triple(f"What is {i}?", "A pattern.", images=[out.getvalue()], id=str(i)) for i in range(3)]
    assert not lint(rows, open_images=True).findings
    report = lint(rows[:1], test=[Record.triple("What?", "Yes.", images=[out.getvalue()])])
    assert set(report.findings) == {"test-image"}
