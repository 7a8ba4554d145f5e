"""A run has its folder for itself, ends on a full disk with one message, and counts a bad record once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import ConfigError, MmitError, RecordError
from mmit.processes import only_one
from mmit.records import Record, write_jsonl
from mmit.train.data.setup import BadRecordPolicy, most_bad
from mmit.train.loop import Progress, _agree_on_bad, _note_bad
from mmit.train.run import LOCK, run
from tests.test_io import full_disk
from tests.tiny_run import tiny_config


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"steps": 2})
    assert run(config) == 0
    assert not (tmp_path / "run" / LOCK).exists()
    again = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    with only_one(tmp_path / "run" / LOCK, "run", folder=tmp_path / "run"):
        before = contents(tmp_path / "run")
        with pytest.raises(ConfigError, match=rf"another run is writing here: process {os.getpid()} on "):
            run(again)
        assert contents(tmp_path / "run") == before
    (tmp_path / "run" / LOCK).write_text("")  # as a killed run leaves one
    assert run(again) == 0


def test_a_full_disk_ends_a_run_with_its_own_message(tmp_path: Path) -> None:
    """Neither the checkpoint nor the report nor the curve can be written; the first is what went wrong."""
    config = tiny_config(tmp_path, train={"steps": 2}, run={"dir": str(tmp_path / "run")})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    with full_disk(6000):
        done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.yaml")])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert "could not be written" in done.output and "Traceback" not in done.output
    assert done.output.count("error: ") == 1
    assert not list((tmp_path / "run").rglob("*.draft")) and not list((tmp_path / "run").rglob("*.tmp"))
    assert run(config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})) == 0


@pytest.mark.parametrize("limit", [200, 1000, 3000])
def test_a_disk_that_is_full_earlier_does_too(tmp_path: Path, limit: int) -> None:
    (tmp_path / "c.yaml").write_text(tiny_config(tmp_path, train={"steps": 2}).to_yaml())
    with full_disk(limit):
        done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.yaml")])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.exception
    assert "File too large" in done.output


@pytest.mark.slow
def test_on_a_file_system_that_is_too_small(tmp_path: Path) -> None:
    """The real thing: a tmpfs that holds two checkpoints and not the third."""
    (tmp_path / "c.yaml").write_text(tiny_config(tmp_path, train={"steps": 12, "save_every": 2}).to_yaml())
    train = [sys.executable, "-m", "mmit", "train", "--config", str(tmp_path / "c.yaml")]
    subprocess.run([*train, f"run.dir={tmp_path / 'room'}"], check=True, capture_output=True)
    size = sum(path.stat().st_size for path in (tmp_path / "room").rglob("*")) * 85 // 100
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs {tmp_path}/small"
    script = f'{mount} || exit 77; "$@"; rc=$?; ls {tmp_path}/small/run/checkpoints; umount {tmp_path}/small; exit $rc'
    enter = ["unshare", "-rm", "bash"] if shutil.which("unshare") else ["bash"]
    command = [*enter, "-c", script, "_", *train, f"run.dir={tmp_path / 'small' / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("neither root nor user namespaces: nothing can be mounted")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "No space left on device" in done.stderr and "step-000002" in done.stdout


def data_with_one_bad_picture(folder: Path, *, records: int) -> Path:
    """One picture is cut off behind its header, so that only decoding meets the damage."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for i in range(records):
        path = folder / "pictures" / f"{i}.png"
        PIL.Image.new("RGB", (20, 20), (i, 2 * i % 256, 90)).save(path)
        rows.append(Record.triple("What is it?", "A colour.", images=[str(path)], id=f"picture-{i}"))
    write_jsonl(rows, folder / "rows.jsonl")
    path = folder / "pictures" / "1.png"
    path.write_bytes(path.read_bytes()[:-40])
    return folder / "rows.jsonl"


@pytest.mark.parametrize(("fraction", "fine"), [(0.1, True), (0.099, False)])
def test_a_record_is_counted_once_however_often_it_is_met(tmp_path: Path, fraction: float, fine: bool) -> None:
    """One of ten in three epochs: a tenth, and no more than the ceiling; and again after a resume."""
    data = {"train": [{"path": str(data_with_one_bad_picture(tmp_path, records=10))}]}
    data |= {"max_length": 128, "pack_tokens": 160, "workers": 0}
    told = {"dir": str(tmp_path / "run"), "on_bad_record": "skip", "max_bad_fraction": fraction}

    def go(steps: int, **more: str) -> int:
        train = {"steps": steps, "rows_per_step": 2, "precision": "fp32"}
        return run(tiny_config(tmp_path, run=told | more, data=data, train=train))

    if not fine:
        with pytest.raises(MmitError, match="1 bad records were met while training, more than the 0"):
            go(9)
        return
    assert go(9) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] > 2 and rows[-1]["bad_records"] == 1
    assert len((tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()) == 1
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert json.loads((newest / "trainer" / "progress.json").read_text())["bad"] == [1]


class _Batch:
    def __init__(self, *bad: int) -> None:
        self.bad = {n: RecordError("bad", where=f"record {n}") for n in bad}
        self.records = [0]


class _Ranks:
    """Two ranks, of which this is the first; the other found 7 and 9."""

    rank, world = 0, 2

    def all_sum(self, values: list[float]) -> list[float]:
        theirs = [0.0] * (len(values) - 2) + [7.0, 9.0]
        return [a + b for a, b in zip(values, theirs, strict=True)]


def test_ranks_agree_on_which_records_are_bad() -> None:
    progress, told = Progress(bad=[3]), []
    new = _note_bad([_Batch(3, 5), _Batch(5, 7)], progress, lambda error: told.append(error.where))  # type: ignore
    assert new == [5, 7] and told == ["record 5", "record 7"]
    _agree_on_bad(_Ranks(), progress, new, [2.0, 2.0])  # type: ignore[arg-type]
    assert progress.bad == [3, 5, 7, 9]


def test_the_ceiling_is_exact() -> None:
    assert [most_bad(0.29, 100), most_bad(0.01, 99), most_bad(0.01, 100), most_bad(0.0, 10), most_bad(1.0, 10)] == [
        *(29, 0, 1, 0, 10)
    ]


def _scan(bad: int, records: int):
    from mmit.data.dataset import Measurements

    zero = torch.zeros(records - bad, dtype=torch.int64).numpy()
    errors = [RecordError("is bad", where=f"{n}") for n in range(bad)]
    return Measurements(zero, zero, zero, zero, zero, bad=errors, records=records)


def test_the_scan_is_judged_by_the_same_ceiling(tmp_path: Path) -> None:
    policy = BadRecordPolicy(skip=True, max_fraction=0.1)
    told: dict = {"run_dir": tmp_path, "main": True, "say": lambda text: None}
    policy.apply(_scan(2, 20), **told)
    assert len((tmp_path / "bad_records.jsonl").read_text().splitlines()) == 2
    with pytest.raises(RecordError, match="3 of 20 records are bad, more than run.max_bad_fraction=0.1 allows"):
        policy.apply(_scan(3, 20), **told)
