"""However the ranks are started, they find each other; one that dies takes the others along, a signal saves first."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
import psutil

from mmit.train.checkpoint import folders
from mmit.train.run import EXIT_STOPPED, run
from tests.tiny_run import two_layers as tiny_config
from tests.train.launch import ROOT, free_port

TRAIN = {"steps": 3, "rows_per_step": 4, "precision": "fp32"}


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path} | more


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def configs(folder: Path, **train) -> Path:
    """One process' run, and the config of the same run for ranks."""
    if not train:
        assert run(tiny_config(folder, run={"dir": str(folder / "one")}, train=TRAIN)) == 0
    config = tiny_config(folder, run={"dir": str(folder / "two")}, train={**TRAIN, **train})
    (folder / "two.yaml").write_text(config.to_yaml())
    return folder / "two.yaml"


SRUN = """#!/bin/bash
# What srun does for two tasks on two nodes: the command in each, with its own number.
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=0 "$@" & second=$!
wait $first && wait $second
"""


@pytest.mark.slow
def test_the_slurm_script_maps_tasks_to_ranks(tmp_path):
    path = configs(tmp_path)
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755 | stat.S_IXUSR)
    env = environment(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node[1-2]", SLURM_NTASKS="2", SLURM_CPUS_PER_TASK="1")
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "slurm_train.sh"), str(path), "engine.deepspeed=zero1"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    progress = tmp_path / "two" / "checkpoints" / "step-000003" / "trainer" / "progress.json"
    assert json.loads(progress.read_text())["world"] == 2


@pytest.mark.long
def test_two_nodes_as_a_hostfile_starts_them(tmp_path):
    """`deepspeed --hostfile` runs this launcher on every node over ssh, which differs in --node_rank alone."""
    path = configs(tmp_path)
    world = base64.urlsafe_b64encode(json.dumps({"node1": [0], "node2": [0]}).encode()).decode()
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={n}"]
            + ["--master_addr=127.0.0.1", f"--master_port={port}"]
            + [str(ROOT / "scripts" / "train.py"), "--config", str(path), "engine.deepspeed=zero3"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in (0, 1)
    ]
    try:
        said = [p.communicate(timeout=400)[0] for p in nodes]
    finally:
        for p in nodes:
            p.kill()
    assert [p.returncode for p in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the ranks below the deepspeed launcher, rank by rank."""
    ranked = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        words = child.cmdline()
        own = [w for w in words if w.startswith("--local_rank=")]
        if own and "deepspeed.launcher.launch" not in words:
            ranked[own[0]] = child.pid
    return [ranked[k] for k in sorted(ranked)]


@pytest.mark.long
@pytest.mark.parametrize("what", ["kill a rank", "stop the launcher"])
def test_a_rank_that_dies_ends_the_job_and_a_signal_saves_first(tmp_path, what):
    path = configs(tmp_path, steps=100000, save_every=20)
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    command += [str(ROOT / "scripts" / "train.py"), "--config", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)
    try:
        began = time.monotonic()
        while not folders.checkpoints(tmp_path / "two"):
            assert launcher.poll() is None and time.monotonic() - began < 300
            time.sleep(0.2)
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        began = time.monotonic()
        if what == "kill a rank":
            os.kill(ranks[1], signal.SIGKILL)
        else:  # the group, as a terminal does: on one node the launcher does not pass a signal on
            os.killpg(launcher.pid, signal.SIGTERM)
        said, _ = launcher.communicate(timeout=120)
        assert launcher.returncode != 0 and time.monotonic() - began < 90
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    time.sleep(1)
    assert not [p for p in ranks if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"], said[-2000:]
    newest = folders.newest(tmp_path / "two")
    assert newest is not None
    if what == "stop the launcher":
        step = json.loads((newest / "trainer" / "progress.json").read_text())["step"]
        steps = len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines())
        assert step == steps and str(EXIT_STOPPED) in said, said[-3000:]
