"""TensorBoard and Weights & Biases, through their own libraries; both are optional.

In: numbers by name, step by step. Whether a library is installed is found out before anything is loaded. A resumed run
goes on in the same TensorBoard folder and the same W&B run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
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

        kept = folder / "wandb.json"
        identity = json.loads(kept.read_text())["id"] if kept.exists() else secrets.token_hex(4)
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
                f"W&B refuses: {str(error).splitlines()[0]}",
                where=WHERE,
                remedy="run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later",
            ) from error
        write_atomic(kept, json.dumps({"id": identity}))
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


TRACKERS: dict[str, tuple[str, type[TensorBoard] | type[WandB]]] = {
    "tensorboard": ("TensorBoard", TensorBoard),
    "wandb": ("Weights & Biases", WandB),
}


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
