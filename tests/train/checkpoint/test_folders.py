"""Whatever goes wrong in a save, one whole checkpoint is found, and never a partial one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import mmit.train.run as run_module
from mmit.errors import CheckpointError
from mmit.train.checkpoint import folders, resume
from tests.tiny_run import two_layers as tiny_config
from tests.train.checkpoint.faults import MODES, OTHER_ERROR, REFUSED, SAVED, in_child


@dataclass
class Bench:
    """A run that was taken to step 2, and its save."""

    run_dir: Path
    pristine: Path
    save: Callable[[int], None]
    listings: dict[str, dict]
    points: dict[str, int]  # scenario -> touches of a save without faults

    @property
    def parent(self) -> Path:
        return self.run_dir / "checkpoints"

    def reset(self, scenario: str) -> None:
        shutil.rmtree(self.parent)
        shutil.copytree(self.pristine, self.parent)
        if scenario == "replaced":
            shutil.rmtree(self.parent / "step-000001")

    def step(self, scenario: str) -> int:
        return 3 if scenario == "new" else 2


def listing(folder: Path) -> dict:
    return json.loads((folder / folders.MANIFEST).read_text())["files"]


def test_a_folder_that_is_removed_while_it_is_read_is_told_from_a_damaged_one(tmp_path):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    with pytest.raises(FileNotFoundError), folders.staying(folder):
        (folder / "mmit.json").read_text()
    with pytest.raises(CheckpointError, match="step-000001: was removed while it was read"), folders.staying(folder):
        folder.rmdir()
        (folder / "mmit.json").read_text()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    kept = {}
    real = run_module.train

    def train(*args, **kwargs):
        kept.update(save=args[3].save, progress=kwargs["progress"])
        return real(*args, **kwargs)

    run_module.train = train
    try:
        config = tiny_config(folder, train={"steps": 2, "rows_per_step": 2, "save_every": 1, "precision": "fp32"})
        assert run_module.run(config) == 0
    finally:
        run_module.train = real

    def save(step):
        kept["progress"].step = step
        kept["save"](kept["progress"])

    pristine = folder / "pristine"
    shutil.copytree(folder / "run" / "checkpoints", pristine)
    bench = Bench(folder / "run", pristine, save, {}, {})
    for scenario in ("new", "replaced"):
        bench.reset(scenario)
        code, bench.points[scenario] = in_child(lambda s=scenario: save(bench.step(s)), bench.parent, at=-1)
        assert code == SAVED
        bench.listings |= {p.name: listing(p) for p in folders.checkpoints(bench.run_dir)}
    return bench


def one_case(bench: Bench, scenario: str, mode: str, at: int) -> str:
    """Break one save at one touch; return what it came to."""
    bench.reset(scenario)
    code, _ = in_child(lambda: bench.save(bench.step(scenario)), bench.parent, at=at, mode=mode)
    case = f"{scenario}, {mode} at {at}"
    if mode in ("kill", "power"):
        assert code == -signal.SIGKILL, case
    else:
        assert code in (SAVED, REFUSED), f"{case}: exit {code}" + (" (another error)" if code == OTHER_ERROR else "")
    said: list[str] = []
    found = folders.newest(bench.run_dir, warn=said.append)
    assert found is not None, case
    name = found.name.removeprefix(".").removesuffix(".old")
    assert listing(found) == bench.listings[name], case
    assert name in (("step-000002", "step-000003") if scenario == "new" else ("step-000002",)), case
    if code == SAVED:
        assert found.name == f"step-{bench.step(scenario):06d}", case
    if code == REFUSED:
        assert not list(bench.parent.glob(".*.draft")), case
    bench.save(bench.step(scenario))  # the next save succeeds and leaves no rubbish
    assert {p.name for p in bench.parent.iterdir()} <= {"step-000001", "step-000002", "step-000003"}, case
    assert listing(folders.checkpoints(bench.run_dir)[-1]) == bench.listings[f"step-{bench.step(scenario):06d}"]
    return "saved" if code == SAVED else "refused" if code == REFUSED else "died"


def cases(bench: Bench) -> list[tuple[str, str, int]]:
    return [(s, m, at) for s, points in bench.points.items() for m in MODES for at in range(points)]


def test_a_save_that_breaks_anywhere_leaves_one_whole_checkpoint(bench):
    every = cases(bench)
    assert len(every) >= 500
    results = [one_case(bench, *case) for case in random.Random(0).sample(every, 16)]
    assert {"died", "refused"} <= set(results)


@pytest.mark.long
def test_a_save_that_breaks_at_every_touch_leaves_one_whole_checkpoint(bench):
    results = [one_case(bench, *case) for case in cases(bench)]
    assert len(results) >= 500, results.count("died")


def test_a_full_disk_is_one_clear_error(bench):
    bench.reset("new")
    before = {p.name: listing(p) for p in folders.checkpoints(bench.run_dir)}

    def full(draft):
        (draft / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left") as error:
        folders.write_folder(bench.parent / "step-000009", [full])
    assert "resume=auto" in error.value.remedy and "keep_last" in error.value.remedy
    assert {p.name: listing(p) for p in folders.checkpoints(bench.run_dir)} == before
    assert not list(bench.parent.glob(".*"))


def test_another_error_in_a_save_is_not_taken_for_the_disk(bench, tmp_path):
    def wrong(draft):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        folders.write_folder(tmp_path / "x", [wrong])


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_newest_passes_over_a_damaged_checkpoint_and_says_so(bench, harm):
    for path in sorted(p for p in (bench.pristine / "step-000002").rglob("*") if p.is_file()):
        bench.reset("new")
        victim = bench.parent / "step-000002" / path.relative_to(bench.pristine / "step-000002")
        data = bytearray(victim.read_bytes())
        if harm == "delete":
            victim.unlink()
        elif harm == "truncate":
            victim.write_bytes(data[:-1])
        elif victim.name == folders.MANIFEST:  # a digit of one size
            at = data.index(b'"size": ') + 8
            data[at] ^= 1
            victim.write_bytes(data)
        else:
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        said: list[str] = []
        found = folders.newest(bench.run_dir, warn=said.append)
        assert found is not None and found.name == "step-000001"
        assert len(said) == 1 and "step-000002" in said[0]
        assert victim.name in said[0] or victim.name == folders.MANIFEST  # its wrong size blames the file


def test_a_file_nobody_listed_is_refused_where_files_are_unpickled(bench):
    bench.reset("new")
    (bench.parent / "step-000002" / "trainer" / "more_optim_states.pt").write_bytes(b"x")
    (bench.parent / "step-000001" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not listed"):
        folders.verify(bench.parent / "step-000002")
    folders.verify(bench.parent / "step-000001")


def test_later_checkpoints_are_set_aside_when_a_run_goes_back(bench):
    bench.reset("new")
    said: list[str] = []
    resume.set_aside_later(bench.run_dir, 1, say=said.append)
    assert [p.name for p in folders.checkpoints(bench.run_dir)] == ["step-000001"]
    assert (bench.parent / "superseded-step-000002" / folders.MANIFEST).exists() and "step 1" in said[0]
    bench.reset("new")


def test_keep_last(bench):
    bench.reset("new")
    bench.save(3)
    assert [p.name for p in folders.checkpoints(bench.run_dir)] == ["step-000002", "step-000003"]
    bench.save(11)
    assert [p.name for p in folders.checkpoints(bench.run_dir)] == ["step-000003", "step-000011"]
    os.mkdir(bench.parent / ".step-000012.draft")
    bench.save(13)
    assert sorted(os.listdir(bench.parent)) == ["step-000011", "step-000013"]
