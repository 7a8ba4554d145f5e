"""CUDA without CUDA: steps, resumes and answers on fake tensors, with budgets for what the host waits for.

The budgets are what a run does today. A wait or a copy above them, and an operand on another device, fails here on any
machine; what a kernel computes is checked on a GPU alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_cuda.cases import CASES, METHODS

pytestmark = pytest.mark.slow
STEPS = [*METHODS, "fp32", "several images", "text", "vision encoder", "resume", "resume, fp32"]
# Kernels of a micro-batch of two layers and an encoder of two; with torch 2.14 the most were 801 (DoRA).
MOST_KERNELS = 1200


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every case asked of the device, from one process."""
    if torch.version.cuda is None:
        pytest.skip("this torch is no CUDA build, so autograd knows no such device")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the hooks that stand for a driver")
    from torch.utils.cpp_extension import include_paths

    folder = tmp_path_factory.mktemp("hooks")
    library, libraries = folder / "hooks.so", Path(torch.__file__).parent / "lib"
    source = str(Path(__file__).with_name("hooks.cpp"))
    options = ["-shared", "-fPIC", "-O1", "-std=c++20", *(f"-I{path}" for path in include_paths())]
    links = [f"-L{libraries}", "-lc10", f"-Wl,-rpath,{libraries}"]
    subprocess.run(["g++", *options, source, "-o", str(library), *links], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fake_cuda.cases"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_within_its_budget(found: dict[str, Any], name: str) -> None:
    case = found[name]
    assert "error" not in case, case
    assert case["mismatches"] == []
    assert case["plans made in the forward pass"] == []
    assert case["syncs of a micro-batch"] == {} and case["blocking copies of a micro-batch"] == {}
    assert sum(case["syncs of a step"].values()) == 1  # the norm of the gradient
    assert 100 < case["kernels"] < MOST_KERNELS
    # Fused AdamW refuses a `step` that lies on the CPU, where a resume once left it.
    assert case["states"] == [f"{key} of cuda:0: cuda:0" for key in ("exp_avg", "exp_avg_sq", "step")]


@pytest.mark.parametrize("name", ["answer", "sampled"])
def test_a_token_waits_once_and_copies_without_waiting(found: dict[str, Any], name: str) -> None:
    case = found[name]
    assert "error" not in case, case
    assert sum(case["syncs of a token"].values()) == 1  # the ids
    assert case["blocking copies of a token"] == {} and case["mismatches"] == []
    assert sum(case["syncs of a prefill"].values()) == 1
    # What is left is transformers', which makes an empty tensor for each new layer of a cache.
    assert all("transformers/cache_utils" in place for place in case["blocking copies of a prefill"])


def test_an_llm_on_two_devices_runs_a_row_of_several_records(found: dict[str, Any]) -> None:
    case = found["two devices"]
    assert "error" not in case, case
    assert case["mismatches"] == [] and case["shape"] == [1, 2, 256]
    assert case["losses"].startswith("cuda")


def test_planted_faults_are_seen(found: dict[str, Any]) -> None:
    assert sum(found["planted wait"]["syncs of a micro-batch"].values()) == 1
    assert sum(found["planted copy"]["blocking copies of a micro-batch"].values()) == 1
    assert any("cuda:0 indexed by cuda:1" in text for text in found["planted mismatch"]["mismatches"])


def test_every_case_is_looked_at(found: dict[str, Any]) -> None:
    planted = {"planted wait", "planted copy", "planted mismatch"}
    assert set(found) == set(CASES) == {*STEPS, "answer", "sampled", "two devices", *planted}


def test_every_tuning_method_is_a_case() -> None:
    from mmit.models.tuning import MODES

    assert {mode for mode, _ in METHODS.values()} >= set(MODES["llm"]) - {"qlora"}  # 4-bit layers have no fake kernel
