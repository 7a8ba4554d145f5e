"""mmit.io: files appear whole, and a disk that is full ends with its own message."""

from __future__ import annotations

import ast
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mmit.data.shards.writer import build_shards
from mmit.errors import MmitError, WriteError
from mmit.io import append, unless_failing, whole_file, write_atomic
from mmit.records import Record, write_jsonl
from mmit.train.monitor.metrics_log import RunLog
from mmit.train.monitor.report import write_report
from mmit.train.monitor.run_files import note_event, write_json
from tests.trees import dotted, nodes_of

ROOT = Path(__file__).parents[1]


@contextmanager
def full_disk(bytes_: int) -> Iterator[None]:
    """Let no file grow beyond `bytes_`, which fails in the middle of a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def row(number: int) -> dict[str, float]:
    return {"step": number, "loss": 1.0, "lr": 1e-3, "tokens_per_s": 1.0, "memory_gib": 1.0}


def metrics(folder: Path) -> None:
    log = RunLog(folder, active=True)
    log.begin(total=100, start=0)
    try:
        for number in range(1, 100):
            log.step(row(number), write=True)
    finally:
        log.close()


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: write_atomic(folder / "a", "x" * 5000),
    "json": lambda folder: write_json(folder / "a", list(range(5000))),
    "lines": lambda folder: append(folder / "a", "x" * 5000),
    "events": lambda folder: note_event(folder, {"step": 1, "records": "x" * 5000}),
    "records": lambda folder: write_jsonl([Record.triple("q" * 5000, "a")], folder / "a"),
    "shards": lambda folder: build_shards([Record.triple("q" * 5000, "a")], folder / "s"),
    "report": write_report,
    "metrics": metrics,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_message_and_leaves_no_draft(name: str, tmp_path: Path) -> None:
    before = b"before\n" if name in ("text", "json", "records", "lines") else None
    if before:
        (tmp_path / "a").write_bytes(before)
    with full_disk(1000), pytest.raises(WriteError, match="cannot write: File too large") as caught:
        WRITERS[name](tmp_path)
    assert "free space" in caught.value.remedy and str(tmp_path) in caught.value.where
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    if before:
        assert (tmp_path / "a").read_bytes() == before


def test_metrics_end_with_a_whole_line(tmp_path: Path) -> None:
    with full_disk(2000), pytest.raises(WriteError):
        metrics(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_the_cause_is_told_with_its_own_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write: (Not a directory|File exists)") as caught:
        write_atomic(tmp_path / "file" / "a", "")
    assert "full" not in caught.value.remedy


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a"
    with pytest.raises(RuntimeError), whole_file(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert not list(target.parent.iterdir())
    write_atomic(target, "ä\ud800")
    assert target.read_bytes() == b"\xc3\xa4?"
    (tmp_path / "link").symlink_to(target)
    write_atomic(tmp_path / "link", "b")
    assert (tmp_path / "link").is_symlink() and target.read_text() == "b"
    reader, writer = os.pipe()
    write_atomic(f"/dev/fd/{writer}", "to a pipe")
    assert os.read(reader, 99) == b"to a pipe"
    os.close(reader), os.close(writer)


def test_what_cannot_be_written_at_the_end_hides_no_error() -> None:
    with pytest.raises(MmitError, match="^the first$"):
        try:
            raise MmitError("the first")
        finally:
            with unless_failing():
                raise OSError(28, "No space left on device")
    with pytest.raises(WriteError, match="No space"), unless_failing():
        raise OSError(28, "No space left on device")


def test_nothing_else_writes_a_draft_and_renames_it() -> None:
    """One way to write a file: renames stand in io.py, and where whole folders and tars appear."""
    allowed = {"io.py", "train/checkpoint/folders.py", "data/shards/writer.py", "build/write.py", "data/store.py"}
    found = []
    for path in (ROOT / "mmit").rglob("*.py"):
        text = path.read_text()
        if not re.search("os|shutil|draft", text) or not re.search("replace|rename|move", text):
            continue  # no tree of it holds what is looked for
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and node.attr in ("replace", "rename", "move"):
                if dotted(node) in ("os.replace", "os.rename", "shutil.move", "draft.replace", "draft.rename"):
                    found.append(f"{path.relative_to(ROOT / 'mmit')}")
    assert set(found) - allowed <= {"cli/export.py", "train/checkpoint/portable.py", "interop/export.py"}, found
    assert "io.py" in found


def test_features_are_written_bit_by_bit(tmp_path: Path) -> None:
    for shape in ((0, 2), (3, 2, 2)):
        numbers = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        with whole_file(tmp_path / "f") as file:
            file.write(numbers.data)
        assert np.array_equal(np.fromfile(tmp_path / "f", np.float32), numbers.ravel())
