"""The trainer's half of a checkpoint: where the run stood, and how it goes on from there bit for bit.

Owns `trainer/` in a checkpoint (progress, optimizer state, random state of every rank), the choice of the checkpoint
to continue from, and which older ones are kept. Engine, ZeRO stage and number of ranks may change in between.
Other data or another seed are refused where the order is made (`data.order.make_row_order`), because the result would
look like the same run without being it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from mmit.errors import CheckpointError, ConfigError
from mmit.train.checkpoint import folders
from mmit.train.engines.state import scaler_state, take_scaler_state
from mmit.train.loop import Progress
from mmit.train.monitor.run_files import BEST, write_json

if TYPE_CHECKING:
    from mmit.train.engines.base import Engine

Say = Callable[[Any], None]


def pick_checkpoint(run_dir: Path, resume: str | None, *, say: Say) -> Path | None:
    """The verified checkpoint to continue from, or None for a fresh start.

    Args:
        resume: None, "auto", or the path of a checkpoint or run.

    Raises:
        ConfigError: a fresh start in a folder that holds checkpoints. CheckpointError: none of them is whole.
    """
    if resume is None:
        if folders.checkpoints(run_dir):
            raise ConfigError(
                "holds checkpoints of an earlier run",
                where=str(run_dir),
                remedy="set run.resume=auto to continue it, or another run.dir",
            )
        return None
    if resume != "auto":
        # A checkpoint that was named and is damaged is refused: going on from another one was not asked for.
        return folders.find(resume, warn=say)
    # Verified by hashing every file, the newest first: a node that died may have left a folder that looks whole.
    found = folders.newest(run_dir, warn=say)
    if found is None and folders.checkpoints(run_dir):
        problem = "none of its checkpoints is whole"
        raise CheckpointError(problem, where=str(run_dir), remedy="remove them to start anew")
    return found


def set_aside_later(run_dir: Path, step: int, *, say: Say) -> None:
    """Rename checkpoints after `step`: they are damaged, or of a course that this run leaves."""
    # Kept, not removed: they may be hours of work, and only the user knows which course is wanted. Under the new name
    # neither `newest` nor `prune` sees them, and the run can save its own under theirs.
    for folder in folders.checkpoints(run_dir):
        if folders.step_of(folder) > step:
            name = f"superseded-{folder.name.lstrip('.')}"
            count = len(list(folder.parent.glob(f"{name}*")))
            target = folder.with_name(f"{name}.{count}" if count else name)
            folder.rename(target)
            say(f"set {folder.name} aside as {target.name}: this run goes on from step {step}")


@dataclass(frozen=True)
class TrainerState:
    """Progress and random state of this rank at one moment, apart from the run that goes on."""

    rank: int
    facts: dict[str, Any]
    random: dict[str, torch.Tensor]

    @classmethod
    def of(cls, engine: Engine, progress: Progress, *, order: dict[str, Any]) -> TrainerState:
        """Take the state now; `order` comes back from `order_of`."""
        # Each rank's own: dropout draws from it. The order of the data is no state but a function of the step.
        random = {"cpu": torch.get_rng_state()}
        if engine.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(engine.device)
        facts = {**asdict(progress), "world": engine.world, "order": order, "scaler": scaler_state(engine.optimizer)}
        return cls(engine.rank, facts, random)

    def write(self, folder: Path) -> None:
        """Write into `folder`/trainer; the engine adds its own (`Engine.save_state`)."""
        trainer = folder / "trainer"
        if self.rank == 0:
            (trainer / "progress.json").write_text(json.dumps(self.facts, indent=1))
        save_file(self.random, trainer / f"rng-{self.rank}.safetensors")


def _saved(folder: Path) -> dict[str, Any]:
    try:
        saved = json.loads((folder / "trainer" / "progress.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            "holds a model but no trainer state", where=str(folder), remedy="start from its weights with run.init_from"
        ) from None
    if "order" not in saved:
        problem = "was saved before mmit kept the data order in its checkpoints"
        raise CheckpointError(problem, where=str(folder), remedy="start from its weights with run.init_from")
    return saved


def order_of(folder: Path | None) -> dict[str, Any] | None:
    """The place in the data order at which a checkpoint was saved, and what decides that order; None for a fresh start.

    Raises:
        CheckpointError: the checkpoint has no trainer state.
    """
    return None if folder is None else _saved(folder)["order"]


def restore(engine: Engine, folder: Path | None, *, seed: int, say: Say) -> Progress:
    """Bring the optimizer, the random state and the position back; a fresh start only seeds.

    Args:
        folder: the checkpoint, None for a fresh start.
        say: told when random numbers start afresh, with another number of ranks.

    Raises:
        CheckpointError: the checkpoint has no trainer state.
    """
    # Ranks draw different dropout masks. The data order is drawn from numbers of its own, see `data.order`.
    torch.manual_seed(seed + 1000 * engine.rank)
    if folder is None:
        return Progress()
    saved = _saved(folder)
    engine.load_state(folder / "trainer")
    # fp16: from its first value the loss scale would have to come down again, and each time a step is skipped.
    take_scaler_state(engine.optimizer, saved.get("scaler", {}))
    _restore_random(engine, folder / "trainer", saved["world"], say)
    # progress.json holds more than Progress, and one written by an older version less: the defaults fill that in.
    names = {f.name for f in fields(Progress)}
    return Progress(**{k: v for k, v in saved.items() if k in names})


def _restore_random(engine: Engine, trainer: Path, ranks: int, say: Say) -> None:
    if ranks != engine.world:
        # Data order and optimizer do not depend on the number of ranks; dropout does.
        say(f"continuing with {engine.world} ranks what {ranks} began: random numbers (dropout) start afresh")
        return
    state = load_file(trainer / f"rng-{engine.rank}.safetensors")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and engine.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], engine.device)


def match_best(run_dir: Path, progress: Progress, *, metric: str | None, say: Say) -> None:
    """Make best.json agree with the checkpoint the run goes on from.

    Forgets a best whose folder is gone, and one by another metric.

    Args:
        run_dir: of the run. progress: of the checkpoint; its `best` is changed.
        metric: of this run; None: no further best is looked for. say: is told what is forgotten.
    """
    if progress.best is not None and metric not in (None, progress.best["metric"]):
        by, value = progress.best["metric"], progress.best["value"]
        say(f"the best checkpoint so far was so by {by} ({value:.4g}): the next evaluation sets a new one by {metric}")
        progress.best = None
    # Removed by hand, or the run was moved without it: a best that nobody can load must not keep later ones from
    # winning.
    if progress.best is not None and not checkpoint_folder(run_dir, progress.best["step"]).is_dir():
        say(f"the best checkpoint so far, of step {progress.best['step']}, is gone: the next evaluation sets a new one")
        progress.best = None
    write_best(run_dir, progress.best)


def write_best(run_dir: Path, best: dict[str, Any] | None) -> None:
    """Write down which checkpoint is the best: {"metric", "value", "step", "checkpoint"}."""
    if best is None:
        (run_dir / BEST).unlink(missing_ok=True)
    else:
        folder = checkpoint_folder(run_dir, best["step"]).relative_to(run_dir).as_posix()
        write_json(run_dir / BEST, {**best, "checkpoint": folder})


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def prune(run_dir: Path, keep: int, *, best: int | None = None, say: Say) -> None:
    """Remove old checkpoints, and sweep up what interrupted saves left.

    One that cannot be removed is no reason to end a run whose new checkpoint is safe: it is named, and tried again
    after the next save.

    Args:
        run_dir: of the run. keep: how many of the newest stay.
        best: the step of one that stays besides. say: is told what cannot be removed.
    """
    # By name and whole or not: verifying here would read all of them after every save. The one just written is whole.
    for old in folders.checkpoints(run_dir)[:-keep]:
        if folders.step_of(old) == best:
            continue
        try:
            folders.remove_folder(old)
        except OSError as error:
            say(f"could not remove the old checkpoint {old}: {error}")
    folders.sweep(run_dir / "checkpoints")
