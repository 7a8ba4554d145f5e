"""A machine whose cores others hold too: OpenMP's threads wait asleep, and it is said."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit import cores
from mmit.cli import app

ROOT = Path(__file__).parents[1]
SHOW = "import os, {0}; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


def fresh(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in cores.WAITING}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


MAIN = "import mmit.cli, sys\ntry:\n    mmit.cli.main(['--version'])\nexcept SystemExit:\n    pass\n"


def test_a_program_sets_it_before_torch_is_imported() -> None:
    """That a library does not is seen in a process that test_precision.py starts: importing all takes seconds."""
    assert fresh(MAIN + SHOW.format("sys")) == "None 1000"


@pytest.mark.parametrize(
    "name, value, shown", [("OMP_WAIT_POLICY", "active", "active None"), ("GOMP_SPINCOUNT", "7", "None 7")]
)
def test_what_the_user_has_set_stays(name: str, value: str, shown: str) -> None:
    assert fresh(MAIN + SHOW.format("sys"), **{name: value}) == shown


def test_it_comes_too_late_after_torch() -> None:
    import torch  # noqa: F401

    environment: dict[str, str] = {}
    assert not cores.spin_briefly(environment) and not environment


def test_what_onednn_keeps_is_bounded_unless_the_user_says_otherwise() -> None:
    environment = {"LRU_CACHE_CAPACITY": "9"}
    cores.few_kernels(environment)
    assert environment == {"LRU_CACHE_CAPACITY": "9", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


@pytest.mark.parametrize("command", [["serve", "no-run", "--port", "0"], ["chat", "no-run", "--web"]])
def test_both_commands_that_serve_bound_it_before_a_model_is_read(command, monkeypatch) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")  # so that it is taken back
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        del os.environ[name]
    assert CliRunner().invoke(app, command).exit_code
    assert os.environ["LRU_CACHE_CAPACITY"] == os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own group that wants a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    time.sleep(0.3)
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc")
def test_a_busy_process_is_seen(busy: subprocess.Popen[bytes]) -> None:
    watch = cores.Watch()
    time.sleep(0.4)
    found = watch.others()
    assert found is not None and 0.1 < found.cores <= found.total == len(cores.usable())
    assert str(found).startswith(f"other processes use {found.cores:.1f} of {found.total} cores")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc")
def test_our_own_group_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks and workers of one run are in one process group."""
    tick = os.sysconf("SC_CLK_TCK")
    (tmp_path / "5").mkdir()
    (tmp_path / "6").mkdir()

    def write(core: int, ours: int, theirs: int) -> None:
        cpus = "".join(f"cpu{n} {core if n == min(cores.usable()) else 0} 0 0 9 9 0 0 0 0 0\n" for n in cores.usable())
        (tmp_path / "stat").write_text("cpu 1 1 1 1 1 1 1\n" + cpus)
        for pid, group, ticks in ((5, os.getpgrp(), ours), (6, 1, theirs)):
            (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) S 1 {group} 1 0 0 0 0 0 0 0 {ticks} 0 0 0\n")

    monkeypatch.setattr(cores, "PROC", tmp_path)
    for ours, theirs, expected in ((tick, 0, 0.0), (0, tick, 1.0)):
        now = [0.0]
        monkeypatch.setattr(cores.time, "monotonic", lambda now=now: now[0])
        write(0, 0, 0)
        watch = cores.Watch()
        assert watch.others() is None  # too soon
        now[0] = 1.0
        write(tick, ours, theirs)
        found = watch.others()
        assert found is not None and found.cores == expected
        assert found.busiest == ("a) b (pid 6)" if theirs else "")
        assert watch.crowd() == (found if theirs else None)


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "PROC", tmp_path / "nowhere")
    watch = cores.Watch()
    time.sleep(cores.SHORTEST)
    assert watch.others() is None and watch.crowd() is None
