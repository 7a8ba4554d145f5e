"""`mmit env`: what is installed and what it can compute on."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from typing import Any

from mmit.text import terminal

# Distribution -> the extra that brings it; "" for what every installation needs.
PACKAGES = {
    "torch": "",
    "transformers": "",
    "peft": "",
    "open_clip_torch": "",
    "timm": "",
    "webdataset": "",
    "accelerate": "",
    "deepspeed": "deepspeed",
    "gguf": "gguf",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "swanlab": "swanlab",
}


def env() -> None:
    """Show versions, devices and CPU threads."""
    from rich.table import Table
    from rich.text import Text

    import mmit

    table = Table("what", "version", "state")
    table.add_row("mmit", mmit.__version__, "ok")
    table.add_row("python", platform.python_version(), _state("python", platform.python_version()))
    for name, extra in PACKAGES.items():
        try:
            table.add_row(name, metadata.version(name), _state(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            remedy = f"pip install 'mmit-tune[{extra}]'" if extra else f"pip install {name}"
            missing = Text("missing", "yellow" if extra else "red").append(f": {remedy}", "default")
            table.add_row(name, "-", missing)
    for row in _devices():
        table.add_row(*row)
    terminal().print(table)


def _state(name: str, version: str) -> Any:
    from rich.text import Text

    from mmit.versions import outside

    problem = outside(name, version)
    return Text("ok", "green") if problem is None else Text(problem, "yellow")


def _devices() -> list[tuple[str, str, str]]:
    from mmit.cores import SHORTEST, Watch, usable

    rows = [("CPU", platform.machine(), f"{len(usable())} cores")]
    watch = Watch()
    time.sleep(2 * SHORTEST)  # torch is imported after it: that would be our own work
    if (others := watch.crowd()) is not None:
        rows.append(("CPU", "busy", f"{others}: training takes longer"))
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library torch is linked to is not there
        return [*rows, ("devices", "-", f"torch cannot be imported: {error}")]
    rows.append(("CPU threads", str(torch.get_num_threads()), "of torch; OMP_NUM_THREADS or train.threads sets them"))
    rows.append(_format(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        return [*rows, ("CUDA", "-", f"no device ({built})")]
    return rows + [_cuda(torch, number) for number in range(torch.cuda.device_count())]


def _cuda(torch: Any, number: int) -> tuple[str, str, str]:
    facts = torch.cuda.get_device_properties(number)
    bf16 = "bf16" if facts.major >= 8 else "no bf16"
    return f"cuda:{number}", f"CUDA {torch.version.cuda}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16}"


def _format(device: Any) -> tuple[str, str, str]:
    from mmit.precision import choose

    choice = choose(device)
    return "train.precision", f"auto: {choice.name}", choice.reason
