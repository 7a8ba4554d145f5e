"""`--devices N` starts the ranks itself: torchrun's result; errors, signals and exit codes of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmit.cli import app, launch
from mmit.cli.errors import HAND_OVER, show_error
from mmit.cli.launch import _failed, _rank, check_devices
from mmit.errors import ConfigError
from mmit.train.checkpoint import folders
from mmit.train.run import EXIT_STOPPED
from tests.tiny_run import two_layers
from tests.train.launch import ROOT


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def config_in(folder: Path, **train: Any) -> Path:
    steps = {"steps": 3, "rows_per_step": 4, "precision": "fp32", **train}
    path = folder / "config.yaml"
    path.write_text(two_layers(folder, run={"dir": str(folder / "run")}, train=steps).to_yaml())
    return path


def mmit(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


# Refused at once, by the process that would start the ranks


@pytest.mark.parametrize("name", launch.LAUNCHERS)
def test_inside_a_launcher_it_is_refused(tmp_path, monkeypatch, name):
    path = config_in(tmp_path)
    monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    monkeypatch.setenv("RANK", "0")
    for words in (["train", path, "--devices", 2], ["eval", tmp_path, "--task", "easy_vqa", "--devices", 2]):
        done = mmit(*words)
        assert done.exit_code == 2 and done.stderr.count("error") == 1, done.stderr
        assert f"launcher has started this process ({name} is set)" in done.stderr
        assert "leave --devices out" in done.stderr


def test_what_the_ranks_cannot_do_is_refused(tmp_path, monkeypatch):
    done = mmit("train", config_in(tmp_path), "engine.kind=torch", "--devices", 2)
    assert done.exit_code == 2 and "engine.kind: the torch engine runs on one device, not on 2" in done.stderr
    assert mmit("train", config_in(tmp_path), "--devices", 0).exit_code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="3 ranks, but torch sees 2 GPUs") as error:
        check_devices(3, device="auto")
    assert error.value.where == "--devices" and "at most 2" in error.value.remedy
    with pytest.raises(ConfigError, match="cuda:1 is one GPU"):
        check_devices(2, device="cuda:1")
    check_devices(3, device="cpu")
    check_devices(2, device="auto")


def test_a_mistake_in_the_config_is_told_once_and_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launch", None)
    done = mmit("train", config_in(tmp_path), "train.stps=3", "--devices", 2)
    assert done.exit_code == 2 and done.stderr.count("train.stps: unknown key") == 1


def test_one_device_is_this_process_and_a_dry_run_takes_them_for_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launch", None)
    seen: list[Any] = []
    monkeypatch.setattr("mmit.cli.train._forecast", lambda config, **options: seen.append(options["ranks"]))
    monkeypatch.setattr("mmit.train.run.run", lambda config, **options: seen.append("run") or EXIT_STOPPED)
    path = config_in(tmp_path)
    for words in (["--dry-run", "--devices", 2], ["--dry-run", "--devices", 2, "--ranks", 4]):
        assert mmit("train", path, *words).exit_code == 0
    assert mmit("train", path, "--devices", 1).exit_code == EXIT_STOPPED
    assert seen == [2, 4, "run"]


def test_ranks_get_the_words_of_the_command_without_the_option(tmp_path, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda words, **options: seen.append((words, options)) or EXIT_STOPPED)
    path = config_in(tmp_path)
    assert mmit("train", "--devices", 2, path, "train.steps=5", "resume=auto").exit_code == EXIT_STOPPED
    assert mmit("train", path, "--devices", 1, "engine.kind=deepspeed").exit_code == EXIT_STOPPED
    given = ["eval", str(tmp_path), "--limit", "5", "--device", "cpu", "--task", "custom_example"]
    for words in ([*given, "--devices", "3"], ["eval", "--devices=3", *given[1:]]):
        monkeypatch.setattr("mmit.cli.evaluate._judges", lambda *given, **options: None)
        monkeypatch.setattr("mmit.eval.tasks.load_task", lambda name, **options: SimpleNamespace(name=name))
        assert mmit(*words).exit_code == EXIT_STOPPED
    two, one, *evals = seen
    assert two == (
        ["train", "--config", str(path), "train.steps=5", "run.resume=auto"],
        {"devices": 2, "device": "cpu"},
    )
    assert one[1]["devices"] == 1
    assert evals == [(given, {"devices": 3, "device": "cpu"})] * 2


# What a rank hands over, and what is made of it


def test_a_rank_hands_its_error_over_and_prints_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(HAND_OVER, "")  # put back after the test
    monkeypatch.setattr(launch, "end_with_parent", lambda parent, at_once: None)
    with pytest.raises(SystemExit) as ended:
        _rank(["train", "nowhere.yaml"], os.getppid(), str(tmp_path))
    assert ended.value.code == 2 and capsys.readouterr().err == ""
    monkeypatch.delenv(HAND_OVER)
    assert _failed(str(tmp_path), {0: Ended(-signal.SIGTERM)}, []) == 2
    assert "error: nowhere.yaml" in capsys.readouterr().err


class Ended:
    """How a rank ended, as torch's launcher tells it."""

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode


def told(folder: Path, rank: int, at: float, **what: Any) -> None:
    (folder / f"error-{rank}.json").write_text(json.dumps({"time": at, "code": 2, **what}))


def test_of_several_errors_the_first_is_shown_and_what_follows_from_it_is_not(tmp_path, capsys):
    told(tmp_path, 0, 1.0, traceback="connection closed by peer", code=1)
    told(tmp_path, 1, 3.0, facts=["ConfigError", "later", "b", ""])
    told(tmp_path, 2, 2.0, facts=["ConfigError", "earlier", "a", "do this"])
    (tmp_path / "error-3.json").write_text("{")
    assert _failed(str(tmp_path), {0: Ended(1)}, []) == 2
    said = capsys.readouterr().err
    assert "error: a: earlier" in said and "do this" in said and "later" not in said and "peer" not in said


def test_a_defect_shows_the_first_traceback_and_a_killed_rank_is_named(tmp_path, capsys):
    told(tmp_path, 0, 2.0, traceback="second", code=1)
    told(tmp_path, 1, 1.0, traceback="first", code=1)
    assert _failed(str(tmp_path), {0: Ended(1)}, []) == 1
    said = capsys.readouterr().err
    assert "rank 1:\nfirst" in said and "second" not in said
    assert _failed(str(tmp_path), {1: Ended(-signal.SIGKILL)}, []) == 1
    said = capsys.readouterr().err
    assert "rank 1 ended by SIGKILL" in said and "first" not in said


def test_a_signal_before_the_ranks_listen_is_no_error(tmp_path, capsys):
    assert _failed(str(tmp_path), {0: Ended(-signal.SIGTERM)}, [signal.SIGTERM]) == EXIT_STOPPED
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_before_there_are_ranks_starts_none(monkeypatch, number, ends):
    before = signal.getsignal(number)
    monkeypatch.setattr(launch.multiprocessing, "active_children", lambda: [])
    with pytest.raises(ends) as ended, launch._passed_on() as came:
        os.kill(os.getpid(), number)
        time.sleep(1)  # the handler comes first
    assert came == [number] and getattr(ended.value, "code", None) in (None, EXIT_STOPPED)
    assert signal.getsignal(number) is before


def test_show_error_prints_where_nobody_asks_for_it(monkeypatch, capsys):
    monkeypatch.delenv(HAND_OVER, raising=False)
    show_error(ConfigError("wrong", where="here"))
    assert "error: here: wrong" in capsys.readouterr().err


# Ranks


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def started(*words: object, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**more), cwd=ROOT, **pipes)


def ranks_with_a_checkpoint(process: subprocess.Popen[str], run_dir: Path) -> list[Any]:
    """The ranks that a command has started, once the run has a checkpoint."""
    import psutil

    began = time.monotonic()
    while not folders.checkpoints(run_dir):
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.1)
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "spawn_main" in " ".join(child.cmdline())]


def run_to_end(*words: object, **more: str) -> tuple[int, str]:
    process = started(*words, **more)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out + err


def tensors(folder: Path) -> dict[str, bytes]:
    newest = folders.newest(folder / "run")
    assert newest is not None
    return {str(p.relative_to(newest)): p.read_bytes() for p in sorted(newest.rglob("*.safetensors"))}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_end_bit_for_bit_as_torchrun_ends(tmp_path):
    pytest.importorskip("deepspeed")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    code, said = run_to_end("-m", "mmit", "train", config_in(ours), "engine.deepspeed=zero2", "--devices", 2)
    assert code == 0, said[-3000:]
    assert said.count("finished at step 3") == 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "mmit", "train"]
    code, other = run_to_end(*torchrun, config_in(theirs), "engine.deepspeed=zero2", DS_ACCELERATOR="cpu")
    assert code == 0, other[-3000:]
    assert losses(ours) == losses(theirs) and len(losses(ours)) == 3
    assert tensors(ours) == tensors(theirs) and len(tensors(ours)) >= 4
    progress = json.loads((ours / "run/checkpoints/step-000003/trainer/progress.json").read_text())
    assert progress["world"] == 2


@pytest.mark.slow
def test_an_error_of_the_ranks_is_shown_once(tmp_path):
    pytest.importorskip("deepspeed")
    path = config_in(tmp_path)
    code, said = run_to_end("-m", "mmit", "train", path, "data.train.0.path=nowhere.jsonl", "--devices", 2)
    assert code == 2 and said.count("nowhere.jsonl") == 1 and "error: " in said, said[-3000:]
    assert "Traceback" not in said and "torch.distributed" not in said and "(rank" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_on_all_ranks_and_the_run_goes_on(tmp_path, number):
    pytest.importorskip("deepspeed")
    pytest.importorskip("psutil")
    path = config_in(tmp_path, steps=100000, save_every=50, schedule="constant", warmup=0)
    process = started("-m", "mmit", "train", path, "--devices", 2)
    try:
        ranks = ranks_with_a_checkpoint(process, tmp_path / "run")
        assert len(ranks) == 2
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, out + err
    assert (out + err).count(f"{number.name}: saving") == 1 and "Traceback" not in err
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)
    newest = folders.newest(tmp_path / "run")
    assert newest is not None
    step = json.loads((newest / "trainer" / "progress.json").read_text())["step"]
    assert step == len(losses(tmp_path))
    more = [f"train.steps={step + 1}", "resume=auto"]
    code, said = run_to_end("-m", "mmit", "train", path, *more, "--devices", 2)
    assert code == 0 and len(losses(tmp_path)) == step + 1, said[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a rank", "the parent"])
def test_a_kill_leaves_no_process_behind(tmp_path, victim):
    pytest.importorskip("deepspeed")
    psutil = pytest.importorskip("psutil")
    path = config_in(tmp_path, steps=100000, save_every=50, schedule="constant", warmup=0)
    process = started("-m", "mmit", "train", path, "--devices", 2)
    try:
        ranks = ranks_with_a_checkpoint(process, tmp_path / "run")
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid if victim == "the parent" else ranks[1].pid, signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    psutil.wait_procs(below, timeout=10)
    assert not [p for p in below if p.is_running() and p.status() != "zombie"]
    if victim == "a rank":
        assert process.returncode == 1 and "ended by SIGKILL" in err and "Traceback" not in err, out + err
