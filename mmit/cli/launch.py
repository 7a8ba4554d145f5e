"""`--devices N`: a command on N ranks of this machine, started by torch's own launcher used as a library.

In: the words of an mmit command. Each rank is a process of its own that runs them, with the environment that `torchrun`
gives (RANK, LOCAL_RANK, WORLD_SIZE, a free port). Out: the exit code of the ranks. SIGTERM and SIGINT go to every rank,
which saves as it does alone; a rank that fails takes the others along, and its error is shown once. Restarts nothing.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from mmit.cli.errors import HAND_OVER, WORDS, show_error
from mmit.cores import usable
from mmit.errors import ConfigError, from_facts
from mmit.processes import end_with_parent
from mmit.text import echo

WHERE = "--devices"
LAUNCHERS = ("WORLD_SIZE", "LOCAL_RANK")  # one of them is set: a launcher started this process
FOR_RANKS = ("SIGTERM", "SIGINT")


def check_devices(devices: int, *, device: str = "auto") -> None:
    """Refuse what cannot be started.

    Args:
        devices: ranks that are asked for.
        device: auto, cpu or cuda, as a config has it.

    Raises ConfigError: this process is a rank itself, or there are fewer GPUs.
    """
    if found := [name for name in LAUNCHERS if name in os.environ]:
        problem = f"starts the ranks itself, but a launcher has started this process ({found[0]} is set)"
        raise ConfigError(problem, where=WHERE, remedy=f"leave {WHERE} out, or start mmit without a launcher")
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return
    if device.startswith("cuda:"):
        raise ConfigError(f"device {device} is one GPU", where=WHERE, remedy="take device cuda, and the first GPUs")
    if devices > (there := torch.cuda.device_count()):
        remedy = f"give at most {there}, or device cpu"
        raise ConfigError(f"{devices} ranks, but torch sees {there} GPUs", where=WHERE, remedy=remedy)


def words_of_ranks(context: typer.Context) -> list[str]:
    """The words that the command of `context` was given, without `--devices N`."""
    words = list(context.meta[WORDS])
    for place, word in enumerate(words):
        if word == WHERE or word.startswith(f"{WHERE}="):
            del words[place : place + (2 if word == WHERE else 1)]
            break
    return words


def launch(words: Sequence[str], *, devices: int, device: str = "auto") -> int:
    """Run `mmit WORDS` on ranks; returns their exit code. Call `check_devices` first, from the main thread."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="mmit-ranks-") as folder, _environment(devices, device), _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=secrets.token_hex(8),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # a port that is free
            local_addr="127.0.0.1",  # the machine's own name need not lead anywhere, as in containers
            max_restarts=0,
            start_method="spawn",
            signals_to_handle="SIGQUIT",  # the others are requests to the ranks: see _passed_on
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        with _passed_on() as came:
            try:
                codes = elastic_launch(config, _rank)(list(words), os.getpid(), folder)
            except ChildFailedError as error:
                return _failed(folder, error.failures, came)
            except SignalException as error:
                return 128 + int(error.sigval)
    return int(max(codes.values()))


def _rank(words: list[str], parent: int, folder: str) -> int:
    """What a rank runs. Its exit code goes back by return: the launcher takes any other end for a failure."""
    end_with_parent(parent, at_once=True)
    told = Path(folder, f"error-{os.environ['RANK']}.json")
    os.environ[HAND_OVER] = str(told)
    from mmit.cli import main
    from mmit.train.signals import EXIT_STOPPED

    try:
        main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - a defect: the one that started us shows the first traceback
        told.write_text(json.dumps({"time": time.time(), "code": 1, "traceback": traceback.format_exc()}))
        code = 1
    if code in (0, EXIT_STOPPED):
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _failed(folder: str, failures: Mapping[int, Any], came: Sequence[int]) -> int:
    """Show why the ranks failed: the first error that one of them told, or how the first one ended."""
    told = []
    for path in Path(folder).glob("error-*.json"):
        with suppress(OSError, ValueError):  # a rank that was killed while it wrote
            told.append({"rank": int(path.stem.partition("-")[2]), **json.loads(path.read_text())})
    rank, failure = min(failures.items())
    killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    # What ends a rank breaks the connections of the others: their tracebacks follow from it.
    if errors := [one for one in told if "facts" in one]:
        first = min(errors, key=lambda one: one["time"])
        show_error(from_facts(first["facts"]))
        return int(first["code"])
    if came:  # before the ranks had begun to listen
        echo("stopped by a signal before the first step; nothing was changed", err=True)
        return 128 + came[0]
    if told and not killed:
        first = min(told, key=lambda one: one["time"])
        echo(f"rank {first['rank']}:\n{first['traceback']}", err=True)
        return int(first["code"])
    how = f"by {signal.Signals(-failure.exitcode).name}" if killed else f"with exit code {failure.exitcode}"
    problem = f"rank {rank} ended {how} and told no reason"
    show_error(ConfigError(problem, where=WHERE, remedy="a kernel that lacks memory kills: see its log, or use less"))
    return 1


@contextmanager
def _passed_on() -> Iterator[list[int]]:
    """Inside the block SIGTERM and SIGINT go to the ranks; the list holds those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        ranks = multiprocessing.active_children()
        if not ranks:  # they have not been started, and must not be
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        for child in ranks:
            with suppress(ProcessLookupError):
                os.kill(child.pid or 0, number)

    old = {name: signal.signal(getattr(signal, name), pass_on) for name in FOR_RANKS}
    try:
        yield came
    finally:
        for name, handler in old.items():
            signal.signal(getattr(signal, name), handler)


@contextmanager
def _environment(devices: int, device: str) -> Iterator[None]:
    """What the ranks inherit: their share of the cores, and that DeepSpeed leaves the GPUs alone on the CPU."""
    given = {"OMP_NUM_THREADS": str(max(1, len(usable()) // devices))}
    if device == "cpu":
        given["DS_ACCELERATOR"] = "cpu"
    mine = {name: value for name, value in given.items() if name not in os.environ}  # what the user set stays
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's launcher from telling in its own words what `_failed` tells."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
