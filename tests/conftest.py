"""What all tests share: places for the extension that DeepSpeed compiles for CPU ranks, and for what data was found."""

from __future__ import annotations

import atexit
import functools
import gc
import io
import os
import random
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import typer.testing

from tests import examples, fresh

gc.disable()  # until everything is imported, see pytest_collection_finish
# typer builds the commands of the whole tree again at every invoke; one build serves all tests.
typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)
# PEFT compiles the template of its model card at every save; what jinja2 shares among templates is compiled once.
_compile = jinja2.Environment.compile
_compile_once = functools.cache(_compile)


def _compiled(self: jinja2.Environment, source: Any, *args: Any, **kwargs: Any) -> Any:
    once = self.shared and isinstance(source, str)
    return (_compile_once if once else _compile)(self, source, *args, **kwargs)


jinja2.Environment.compile = _compiled  # type: ignore[method-assign]
# Where there is no device, torch looks for the driver's library again at every operation on fake tensors.
NO_DEVICE = not (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists())
if NO_DEVICE:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Weights of tiny models are read in less time than a pool of threads takes to start.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")


def _no_sync(handle: Any) -> None:
    """No test can tell whether bytes reached the disk, and waiting for it leaves a core idle."""
    os.fstat(handle if isinstance(handle, int) else handle.fileno())


os.fsync = _no_sync

# Their tests fork and train in the child. A child cannot use the threads its parent had: it would wait for OpenMP's or
# autograd's without end. So these files run first, and compute with one thread until they are done.
FORKING = (
    *(f"train/test_{name}.py" for name in ("kill", "recipes_run", "lock_of_ranks", "kill_matrix")),
    *(f"train/{name}.py" for name in ("checkpoint/test_saving", "checkpoint/test_folders", "monitor/test_heartbeat")),
    "test_new_user.py",
)
# The files that take longest, by what they were measured to take. One of them begun last would leave a core idle.
FIRST = (
    "models/test_tuning.py", "train/test_native_runs.py", "cli/test_cli.py", "interop/test_llava_hf_write.py",
    "train/test_run.py", "test_generate.py", "forecast/test_forecast.py", "pet/test_stages.py",
    "models/test_decoding.py", "data/test_content.py", "train/test_resolve.py", "test_plugins.py",
    "train/test_objective.py", "serve/test_engine.py", "templates/test_sandbox.py", "interop/test_llava_next.py",
    "interop/test_portable.py", "build/test_packages.py", "build/test_annotated.py", "interop/test_merge.py",
    "interop/test_llava_hf.py", "data/test_answers.py", "forecast/test_dry_run.py", "data/test_measure.py",
    "models/test_vision_layers.py", "train/test_tiled_runs.py", "models/test_vision_native.py",
    "models/test_vision_fused.py", "train/checks/test_identity.py", "test_recipes.py", "test_layers.py",
    "analysis/test_study.py", "interop/test_prismatic.py", "data/shards/test_reader.py",
    "interop/test_read_prismatic_fused.py", "interop/test_tinyllava.py", "interop/test_gguf.py",
    "serve/test_adapters.py", "test_hygiene.py", "train/data/test_batches.py", "test_precision.py",
    "train/monitor/test_watching.py", "cli/test_data_check.py", "train/test_loop.py", "test_text.py",
)  # fmt: skip

# The same for the slow tests.
FIRST_SLOW = (
    "test_readme.py", "train/test_recipes_run.py", "train/test_devices.py", "test_scripts.py",
    "train/engines/test_zero_models.py", "test_notebook.py", "test_warnings.py", "train/test_kill.py",
    "train/test_lock_of_ranks.py", "build/test_self_instruct_whole.py", "train/test_run.py",
    "train/checkpoint/test_ranks_saving.py", "test_plugins.py", "train/engines/test_matrix.py", "test_new_user.py",
    "serve/test_process.py",
)  # fmt: skip


MEMORY, ROOM = Path("/dev/shm"), 4 << 30  # bytes, of which the tests take a tenth


def in_memory(folder: Path) -> bool:
    """Whether the files of tests can lie in a folder of the memory: there is room, and code in it may be run."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    code = not found.f_flag & getattr(os, "ST_NOEXEC", 0)
    return code and found.f_bavail * found.f_frsize > ROOM and os.access(folder, os.W_OK)


def leave(worker: int) -> None:
    """End a process of pytest-xdist, whose exit code means nothing. Python would first take all imports apart."""
    if os.getpid() == worker:  # what it forked has an exit code of its own
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep the order; its own begins with the files of most tests."""
    config.option.loadscopereorder = False
    # On a disk both cores wait at the end, while what an earlier run left there is deleted. Long tests write too much.
    if config.option.markexpr != "long" and in_memory(MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    if hasattr(config, "workerinput"):
        atexit.register(leave, os.getpid())
    if not getattr(config.option, "numprocesses", None):  # the process that hands out tests runs none
        examples.load("all" if config.option.markexpr == "slow" else "few")
        if "PYTEST_XDIST_WORKER" in os.environ or config.option.markexpr == "slow":  # tests of all kinds, not one file
            fresh.prepare()


def pytest_collection_finish() -> None:
    """Collect garbage again, less often, and without looking at the modules that are loaded by now."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 40)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that fork, then with those that take longest; slow properties are all of them, see there."""
    if config.option.markexpr == "slow":
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker("slow")
    folder = Path(__file__).parent
    first = FIRST_SLOW if config.option.markexpr == "slow" else FIRST
    rank = {folder / name: number for number, name in enumerate((*FORKING, *first))}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give each test random numbers of its own, so that a failure comes back; MMIT_TEST_SEED gives them others."""
    import torch

    seed = zlib.crc32(f"{os.environ.get('MMIT_TEST_SEED', '')} {item.nodeid}".encode())
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_where_tests_fork(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep the parent of forks from starting OpenMP's threads."""
    import torch

    before = torch.get_num_threads()
    if request.path in {Path(__file__).parent / name for name in FORKING}:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as a terminal's process has it, children too; one that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _seeds_of_the_cpu_alone() -> Iterator[None]:
    """Where there is no device, torch keeps each seed for three kinds of them, with a printed stack."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if NO_DEVICE:
            own = torch.default_generator.manual_seed
            patch.setattr(torch.random, "_manual_seed_impl", lambda seed: own(int(seed)), raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_curve_painted() -> Iterator[None]:
    """A run ends with its loss curve, which takes as long to paint as two steps of a tiny model: one serves all runs.

    What is drawn is still worked out for each; `tests/train/test_run.py` paints it.
    """
    from mmit.train.monitor import metrics_log

    painted: list[bytes] = []

    def once(figure: Any, file: Any) -> None:
        if not painted:
            held = io.BytesIO()
            paint(figure, held)
            painted.append(held.getvalue())
        file.write(painted[0])

    paint = once.real = metrics_log.paint  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log, "paint", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_numbers_for_tensors_without_data() -> Iterator[None]:
    """torch works out in Python what random numbers would do to a tensor on the meta device, which holds none."""
    import torch

    def unless_meta(fill: Any) -> Any:
        return lambda tensor, *args, **rest: tensor if tensor.is_meta else fill(tensor, *args, **rest)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "uniform_", "normal_", "trunc_normal_", "xavier_uniform_"):
            patch.setattr(torch.nn.init, name, unless_meta(getattr(torch.nn.init, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_texts_of_configs() -> Iterator[None]:
    """transformers compares every config it reads with a new one, to write what differs into a message nobody sees."""
    from transformers import PreTrainedConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedConfig, "__repr__", lambda config: f"<{type(config).__name__}>")
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_extension_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile torch extensions into a folder of this session.

    torch waits without end for the lock of a compilation that was killed, and the default folder outlives a session.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is found out about data in a folder of this file of tests, not in the user's.

    A dry run links all of it into a folder of its own, so it should stay small.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
