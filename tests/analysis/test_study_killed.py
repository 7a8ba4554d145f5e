"""A study that is killed leaves no process behind, and goes on without repeating a finished step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

from mmit.analysis.config import load_study
from mmit.analysis.study import TIMES, Study
from tests.analysis.worlds import write_world


def steps(out) -> list[str]:
    path = out / TIMES
    return [json.loads(line)["name"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_finished_arm_is_repeated(tmp_path, number, heard):
    path = write_world(tmp_path, seeds=[0])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mmit", "analyse", "templates", str(path), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for after in (1, 4):  # of eight steps, those that are done when the signal comes
        before = len(steps(out))  # on a busy machine more may be done than was waited for
        study = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 240
        while len(steps(out)) < max(after, before + 1) and time.monotonic() < end:  # or it is still being imported
            time.sleep(0.05)
        time.sleep(0.3)  # into the next step
        children = psutil.Process(study.pid).children(recursive=True)
        if number == signal.SIGINT:  # as a terminal does, which tells all of them
            for process in children:
                process.send_signal(number)
        study.send_signal(number)
        assert study.wait(60) in (-signal.SIGKILL, 130)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert not [name for name, count in Counter(steps(out)).items() if count > 1]
    assert not Study(load_study(path), path, out).left() and "| two - one |" in found.stdout
