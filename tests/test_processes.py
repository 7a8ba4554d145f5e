"""mmit.processes: workers and locks end with the process that made them, however it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmit import processes
from mmit.errors import ConfigError
from mmit.processes import only_one, worker_pool

HOLD = """
import sys, time
from pathlib import Path
from mmit.processes import only_one, worker_pool
def work(n):
    Path(sys.argv[1], f"worker-{n}").write_text(str(__import__("os").getpid()))
    time.sleep(60)
with only_one(Path(sys.argv[1], "lock"), "run", folder=Path(sys.argv[1])):
    pool = worker_pool(2)
    [pool.submit(work, n) for n in range(2)]
    time.sleep(60)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what: Callable[[], object], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def holder(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process that holds the lock of `tmp_path` and has two workers."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)])
    files = [tmp_path / f"worker-{n}" for n in range(2)]
    assert wait_for(lambda: all(path.exists() and path.read_text() for path in files))
    return process, [int(path.read_text()) for path in files]


def test_a_second_is_refused_and_told_who_holds_it(holder, tmp_path: Path) -> None:
    process, workers = holder
    before = (tmp_path / "lock").read_bytes()
    with pytest.raises(ConfigError, match="another run is writing here") as caught, take(tmp_path):
        pass
    assert f"process {process.pid} on {platform.node()}" in caught.value.problem and caught.value.where == str(tmp_path)
    assert (tmp_path / "lock").read_bytes() == before, "and it changed nothing"
    process.kill()
    process.wait()
    # At once, though its workers may take a moment.
    with take(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()
    assert wait_for(lambda: all(map(gone, workers)), 5)


def take(folder: Path):
    return only_one(folder / "lock", "run", folder=folder)


def _sleep(place: str) -> None:
    Path(place).write_text(str(os.getpid()))
    time.sleep(60)


def test_a_folder_under_another_name_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with only_one(tmp_path / "run" / "lock", "run", folder=tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
            with only_one(tmp_path / "link" / "lock", "run", folder=tmp_path / "link"):
                pass


def test_workers_started_by_a_thread_end_too_and_not_with_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOOK_S", 0.05)

    def parent() -> None:
        def start() -> None:
            nonlocal pool
            pool = worker_pool(1)
            pool.submit(_sleep, str(tmp_path / "pid"))
            wait_for((tmp_path / "pid").exists)  # the worker has asked for what ends it

        pool = None
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.2)
    assert not gone(pid), "the thread that started it has ended, its process has not"
    process.kill()
    process.join()
    assert wait_for(lambda: gone(pid), 5)


def left(folder: Path, **changes: object) -> Path:
    """A lock file that nobody holds."""
    with take(folder):
        facts = json.loads((folder / "lock").read_text())
    (folder / "lock").write_text(json.dumps(facts | changes))
    return folder


def test_what_is_left_by_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    for changes in ({"pid": 2**22 + 1}, {"began": "1"}, {"boot": "before"}, {"host": "a container that is gone"}):
        with take(left(tmp_path, **changes)):
            pass
    (tmp_path / "lock").write_text("half of a {")
    with take(tmp_path):
        pass


def test_what_is_left_by_another_machine_is_not_and_the_way_out_is_told(tmp_path: Path) -> None:
    left(tmp_path, host="node17", boot="another")
    with pytest.raises(ConfigError, match=r"process \d+ on node17") as caught, take(tmp_path):
        pass
    assert f"remove {tmp_path / 'lock'}" in caught.value.remedy and platform.node() in caught.value.remedy
    (tmp_path / "lock").unlink()
    with take(tmp_path):
        pass


def test_where_locks_do_not_work_what_the_file_says_is_believed(holder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processes, "_flock", lambda handle: True)
    process, _ = holder
    with pytest.raises(ConfigError, match=f"process {process.pid} "), take(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with take(tmp_path):
        pass


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    def child() -> None:
        time.sleep(60)

    with take(tmp_path):
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
    with take(tmp_path):  # the child lives on
        assert process.is_alive()
    process.kill()
    process.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked only where there is fork")
def test_a_worker_that_ignores_sigterm_can_be_ended() -> None:
    """Since Python 3.12 a pool that lost a worker calls terminate() on the others, and waits for them."""
    pool = worker_pool(1, begin=signal.signal, arguments=(signal.SIGTERM, signal.SIG_IGN))
    pid = pool.submit(os.getpid).result(timeout=20)
    (worker,) = [child for child in multiprocessing.active_children() if child.pid == pid]
    worker.terminate()
    worker.join(20)
    # The pool's own thread waits for it too. The one that comes second returns at once, perhaps before the first has
    # written the code down.
    end = time.monotonic() + 20
    while worker.exitcode is None and time.monotonic() < end:
        time.sleep(0.01)
    assert worker.exitcode == -signal.SIGKILL
    pool.shutdown(wait=True)


def test_who_waits_is_told_once_for_whom_and_goes_on_when_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOOK_S", 0.03)
    told: list[str] = []
    done = threading.Event()

    def second() -> None:
        with only_one(tmp_path / "lock", "study", folder=tmp_path, wait=told.append):
            done.set()

    with only_one(tmp_path / "lock", "study", folder=tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.1)
    assert done.wait(5)
    thread.join()
    assert len(told) == 1 and "another study is writing here" in told[0]
