"""Chat templates rendered in a process of their own: one that does not end, or fills the memory, ends there.

In: a template and its variables, plain data. Out: the text. A template comes with a model's folder, so it is foreign
code in a small language; Jinja's sandbox keeps it from the machine but bounds neither time nor memory, and no check
inside the process can, as one call of a filter may do both. The process starts with the first template, serves all of
them, and ends with this one. A fork has one of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("template_child.py")
SECONDS = 1.0  # of processor time for one rendering; the longest template of a well-known model takes 0.02
LONGEST_SOURCE = 1_000_000  # characters
PATIENCE = 20.0  # seconds of real time, where processor time should have ended it before: the machine is busy


class Refused(Exception):
    """The template called raise_exception."""


class Failed(Exception):
    """The template cannot be rendered: a mistake in it, or more time or memory than it may have."""


class Exceeded(Failed):
    """It took too much; whoever tries it again waits again."""


def render(source: str, variables: Mapping[str, Any], *, date: str | None = None) -> str:
    """Render `source`; its strftime_now gives the day `date` (ISO) at midnight, None for now.

    Raises Refused and Failed, whose text says what the template did.
    """
    if len(source) > LONGEST_SOURCE:
        raise Failed(f"it has {len(source):,} characters; {LONGEST_SOURCE:,} are allowed")
    try:
        request = json.dumps({"source": source, "variables": dict(variables), "date": date}).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise Failed(f"its arguments are no plain data: {error}") from None
    answer = _server.ask(request)
    if "refusal" in answer:
        raise Refused(answer["refusal"])
    if "error" in answer:
        raise Failed(answer["error"])
    return answer["text"]


class _Server:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: bytes) -> dict[str, str]:
        """The child's answer; one that is lost without having spent its time is asked for once more.

        A child that the system ends for memory of others, or that a busy machine does not let run, says nothing about
        the template, and one such must not end a run.
        """
        with self._lock:
            for _ in range(2):
                process = self._started()
                try:
                    answer: dict[str, str] = json.loads(_exchange(process, request))
                    return answer
                except (OSError, EOFError) as error:
                    self._stop()  # one that has ended keeps the code it ended with
                    if process.returncode == -signal.SIGPROF:
                        raise Exceeded(f"it takes more than {SECONDS:g} s of processor time") from None
                    told = f"ends with {process.returncode}; more than 512 MiB of memory can be why"
                    if isinstance(error, TimeoutError):
                        told = f"gives no answer for {PATIENCE:g} s; is the machine busy?"
                    problem = f"the process that renders it {told}"
                except BaseException:  # Ctrl-C between question and answer: the next answer would be the wrong one
                    self._stop()
                    raise
            raise Exceeded(problem)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            folders = sorted({str(_folder(name)) for name in ("jinja2", "markupsafe")})
            self._process = subprocess.Popen(
                # -I: nothing from the environment; -S: no site, which takes most of a start.
                [sys.executable, "-I", "-S", str(CHILD), str(SECONDS), *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for mmit, which then closes its stdin
            )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.forget()

    def forget(self) -> None:
        """Close this end of the pipes; the process ends when all its parent's ends are closed."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process = None


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parents[1]


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    view = memoryview(request)
    while view:
        view = view[os.write(process.stdin.fileno(), view) :]
    answer = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            if not ready.select(PATIENCE):
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError
            answer += part
    return bytes(answer)


_server = _Server()


def _after_fork() -> None:
    global _server  # noqa: PLW0603
    _server.forget()
    _server = _Server()


os.register_at_fork(after_in_child=_after_fork)
