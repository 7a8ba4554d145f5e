"""What `folders.verify` and `folders.newest` find out about a folder, on folders of two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmit.errors import CheckpointError
from mmit.train.checkpoint import folders


def written(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"

    def fill(draft: Path) -> None:
        (draft / "trainer").mkdir()
        (draft / "model.bin").write_bytes(b"m" * 100)
        (draft / "trainer" / "state.bin").write_bytes(b"s" * 100)

    folders.write_folder(folder, [fill])
    return folder


def test_a_whole_folder_passes(tmp_path: Path) -> None:
    folders.verify(written(tmp_path, 2))


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda f: (f / "model.bin").write_bytes(b"m" * 99), "has 99 bytes instead of 100"),
        (lambda f: (f / "model.bin").write_bytes(b"m" * 99 + b"n"), "sha256 differs"),
        (lambda f: (f / "model.bin").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text(json.dumps({"format": 9, "files": {}})), "has layout 9"),
        (lambda f: (f / "trainer" / "extra.pt").write_bytes(b""), "is not listed"),
    ],
)
def test_harm_is_named_and_passed_over(tmp_path: Path, harm, problem: str) -> None:
    first, middle, last = (written(tmp_path, step) for step in (2, 4, 6))
    assert folders.newest(tmp_path) == last
    harm(last)
    with pytest.raises(CheckpointError, match=problem):
        folders.verify(last)
    told: list[str] = []
    assert folders.newest(tmp_path, warn=told.append) == middle
    assert len(told) == 1 and problem in told[0]
    assert first.exists() and last.exists()


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    (written(tmp_path, 2) / "manifest.json").unlink()
    assert folders.newest(tmp_path) is None
