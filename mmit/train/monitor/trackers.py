"""TensorBoard, Weights & Biases, trackio and SwanLab, through their own libraries; each is optional.

In: numbers by name, step by step. Whether a library is installed is found out before anything is loaded. A resumed run
goes on in the same TensorBoard folder and the same run of a service.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmit.errors import ConfigError
from mmit.io import write_atomic

WHERE = "train.report_to"


class Tracker(Protocol):
    """Takes the numbers of a run."""

    def begin(self, step: int) -> None:
        """Go on after `step`; what was logged for later steps belongs to a course that the run left."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Write everything out."""


class TensorBoard:
    """Event files under `folder`/tensorboard."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder / "tensorboard", config
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Open the writer."""
        from torch.utils.tensorboard import SummaryWriter

        # Event files cannot be edited: TensorBoard is told to hide the steps that come again.
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)
        if step == 0:
            lines = "\n".join(f"    {key}: {value}" for key, value in self._config.items())
            self._writer.add_text("config", lines, 0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One scalar a name."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write everything out."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run at Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like say where, as its own manual tells.

    Raises ConfigError when W&B does not let us in.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = _identity(folder, "wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mmit"),
                name=os.environ.get("WANDB_NAME", folder.name),
                id=identity,
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except (wandb.errors.CommError, wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"W&B refuses: {_first_line(error)}",
                where=WHERE,
                remedy="run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later",
            ) from error
        _keep_identity(folder, "wandb", identity)
        # Steps as an axis of our own: W&B's counter cannot go back, and a resumed run repeats some.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def begin(self, step: int) -> None:
        """Nothing to do: a repeated step gives the same numbers at the same place of the axis."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One entry."""
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Write everything out."""
        self._run.finish()


class Trackio:
    """A run of trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names a place.

    Raises ConfigError when trackio refuses the project or that place.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import trackio

        identity = _identity(folder, "trackio")
        try:
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "mmit"),
                name=f"{folder.name}-{identity}",  # trackio goes by the name, and many runs have one folder name
                resume="allow",
                config={**config, "folder": str(folder)},
                embed=False,
            )
        except (OSError, RuntimeError, ValueError) as error:
            remedy = (
                "check TRACKIO_PROJECT, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL; without them it writes to this machine"
            )
            raise ConfigError(f"trackio refuses: {_first_line(error)}", where=WHERE, remedy=remedy) from error
        _keep_identity(folder, "trackio", identity)

    def begin(self, step: int) -> None:
        """Nothing to do: a repeated step gives the same numbers at the same place of the axis."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One entry."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Write everything out."""
        self._run.finish()


class SwanLab:
    """A run at SwanLab; SWANLAB_API_KEY and SWANLAB_MODE (online, local, offline) say where, as its own manual tells.

    Raises ConfigError when SwanLab does not let us in.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import swanlab

        identity = _identity(folder, "swanlab")
        try:
            self._run = swanlab.init(
                project=os.environ.get("SWANLAB_PROJECT", "mmit"),
                name=folder.name,
                id=identity,
                resume="allow",
                log_dir=str(folder / "swanlab"),
                config=dict(config),
            )
        except (OSError, RuntimeError, ValueError) as error:
            remedy = "run `swanlab login`, or set SWANLAB_MODE=offline and `swanlab sync` later"
            raise ConfigError(f"SwanLab refuses: {_first_line(error)}", where=WHERE, remedy=remedy) from error
        _keep_identity(folder, "swanlab", identity)

    def begin(self, step: int) -> None:
        """Nothing to do: SwanLab keeps the first entry of a step, and a repeated step gives the same numbers."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One entry."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Write everything out."""
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("TensorBoard", TensorBoard),
    "wandb": ("Weights & Biases", WandB),
    "trackio": ("trackio", Trackio),
    "swanlab": ("SwanLab", SwanLab),
}


def _identity(folder: Path, tracker: str) -> str:
    """The name under which a service knows this run: the one on file, or a new one."""
    kept = folder / f"{tracker}.json"
    return str(json.loads(kept.read_text())["id"]) if kept.exists() else secrets.token_hex(4)


def _keep_identity(folder: Path, tracker: str, identity: str) -> None:
    write_atomic(folder / f"{tracker}.json", json.dumps({"id": identity}))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def require(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose library is not installed; imports nothing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{TRACKERS[name][0]} is not installed",
                where=WHERE,
                remedy=f"run: pip install 'mmit-tune[{name}]', or remove {name} from the list",
            )


def open_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers of a run; `config` is {dotted key: value}. Raises ConfigError."""
    require(names)
    return [TRACKERS[name][1](folder, config) for name in dict.fromkeys(names)]
