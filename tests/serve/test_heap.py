"""Holes in the heap: what glibc keeps is given back at rest, and now and then at work."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from mmit.serve import heap
from mmit.serve.engine import Ask, Engine
from tests.test_generate import build

# Blocks of 64 KB, of which every twentieth stays: holes that are not at the heap's end.
HOLES = """
from mmit.serve import heap
import ctypes, pathlib, re
def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(1 << 16) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 16)
for block in set(blocks) - set(blocks[::20]):
    libc.free(block)
before = memory()
heap.give_back()
print(before - memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_holes_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert 100 < float(done.stdout) < 130  # MB, of 125


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_another_libc_is_left_alone(missing: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def __init__(self, name: None) -> None:
            if missing is not AttributeError:
                raise missing

    monkeypatch.setattr(ctypes, "CDLL", Libc)
    monkeypatch.setattr(heap, "_trim", heap._found())
    assert heap._trim is None
    heap.give_back()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The thread of each time, in place of giving back."""
    found: list[str] = []
    monkeypatch.setattr(heap, "give_back", lambda: found.append(threading.current_thread().name))
    yield found


def test_an_engine_gives_them_back_once_when_it_rests(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "REST_S", 60.0)  # it does not count as rest that the first question is not there yet
    engine = Engine({"tiny": build(vision=False)})
    try:
        monkeypatch.setattr(heap, "REST_S", 0.1)
        for times in (1, 2):
            assert [*engine.submit(Ask("tiny", prompt="a", max_tokens=3)).events()]
            until = time.monotonic() + 20
            while len(given) < times and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(0.25)  # it has no reason for a second time
            assert given == ["mmit-engine"] * times
    finally:
        engine.close(0)


def test_between_two_steps_they_are_given_back_now_and_then(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(heap.time, "monotonic", lambda: now[0])
    holes = heap.Holes()
    for at, times in ((100 + heap.WORK_S - 1, 0), (100 + heap.WORK_S, 1), (101 + heap.WORK_S, 1), (1000, 2)):
        now[0] = at
        holes.between_steps()
        assert len(given) == times


def test_an_engine_at_work_gives_them_back(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "WORK_S", 0.0)
    engine = Engine({"tiny": build(vision=False)})
    try:
        assert [*engine.submit(Ask("tiny", prompt="a", max_tokens=4, temperature=0)).events()]
        assert given and set(given) == {"mmit-engine"}
    finally:
        engine.close(0)
