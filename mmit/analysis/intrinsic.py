"""Soft prompts of several runs -> the space they lie in, for `tune.llm.mode=intrinsic`.

In: runs or checkpoints that trained soft prompts for one language model, and their records for the loss on the tasks.
Out: the folder of a subspace and how well each prompt is reproduced. Refuses runs of other methods, prompts of
different models or lengths, and for the loss on the tasks runs that trained more than a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from mmit.data.preparation import prepare_images
from mmit.data.store import Store
from mmit.errors import ConfigError
from mmit.models.intrinsic import HIDDEN, OF_MODEL, Back, Tasks, find_subspace, write_subspace
from mmit.models.tuning.structure import base_model
from mmit.models.virtual import PROMPT
from mmit.train.checkpoint.model import Loaded, find, load_model, read_config
from mmit.train.data.order import row_order_of
from mmit.train.data.setup import cache_folder, image_loader, measure
from mmit.train.engines.base import weighted
from mmit.train.engines.world import World
from mmit.train.records import train_data
from mmit.train.resolve import objective_of, open_records

if TYPE_CHECKING:
    from mmit.data.loader import MicroBatch
    from mmit.train.data.batches import TrainData


def make_subspace(
    runs: Sequence[Path],
    *,
    out: Path,
    dim: int,
    hidden: int = HIDDEN,
    steps: int = 2000,
    task_steps: int = 0,
    seed: int = 0,
) -> list[tuple[str, float]]:
    """Find the subspace of the runs' soft prompts and write it to `out`.

    Args:
        runs: of one model, each with a soft prompt of as many tokens as the others.
        out: a folder that is not there, or empty.
        dim: of the subspace. hidden, steps, seed: of the autoencoder that finds it.
        task_steps: then of training it on the losses of the runs' own records too, a row of one run each in turn.

    Returns:
        each run with the share of its prompt that is lost: squared error over squared distance to the mean prompt.

    Raises:
        ConfigError: the folder is taken, or the runs do not go together. ModelError: no such space.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError("the folder is not empty", where=str(out), remedy="Give --out a new folder.")
    found = [_prompt(run) for run in runs]
    for run, (prompt, model) in zip(runs, found, strict=True):
        if model != found[0][1] or prompt.shape != found[0][0].shape:
            what = f"{_said(model)} and {len(prompt)} virtual tokens, {runs[0]} of {_said(found[0][1])}"
            problem = f"its soft prompt is of {what} and {len(found[0][0])}"
            raise ConfigError(problem, where=str(run), remedy="Give runs of one model and one number of tokens.")
    prompts = torch.stack([prompt for prompt, _ in found])
    tasks = Tasks(TaskLoss(runs), steps=task_steps) if task_steps else None
    layers, z = find_subspace(prompts, dim, hidden=hidden, steps=steps, seed=seed, tasks=tasks)
    tokens = prompts.shape[1]
    with torch.no_grad():
        lost = (Back(layers, tokens)(z) - prompts).pow(2).sum((1, 2)) / (prompts - prompts.mean(0)).pow(2).sum((1, 2))
    table = [(str(run), float(share)) for run, share in zip(runs, lost, strict=True)]
    facts = {
        "llm": found[0][1],
        "task_steps": task_steps,
        "prompts": [{"run": name, "lost": share} for name, share in table],
    }
    write_subspace(out, layers, z, tokens=tokens, facts=facts)
    return table


class TaskLoss:
    """The loss of soft prompts on the next row of the records that a run was trained on, by a frozen model.

    Raises:
        ConfigError: a run trained more than its prompt, with a preference method, or with another projector.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        folders = [find(run) for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            _check_frozen(run, folder, folders[0])
        self.loaded = load_model(folders[0])
        self.vlm = self.loaded.vlm.requires_grad_(False).eval()
        self.data = [_records(self.loaded, folder) for folder in folders]
        self._rows = [_without_end(data, run) for data, run in zip(self.data, runs, strict=True)]

    def __call__(self, prompt: nn.Module, task: int) -> torch.Tensor:
        """Weighted mean over the supervised tokens of the task's next row."""
        base_model(self.vlm.llm).add_module(PROMPT, prompt)
        batch = next(self._rows[task])
        losses = self.vlm(**self.data[task].prepare(batch))
        return weighted(losses, batch.uneven_weights).sum() / batch.loss_weight


def _check_frozen(run: Path, folder: Path, first: Path) -> None:
    """The prompts must be of one frozen model, or no model could be run with all of them."""
    config = read_config(folder)
    for part in ("vision", "projector"):
        if (mode := getattr(config.tune, part).mode) != "frozen":
            problem = f"was trained with tune.{part}.mode={mode}, so that its prompt belongs to a model of its own"
            remedy = f"Train the soft prompts with tune.{part}.mode=frozen, or leave --task-steps out."
            raise ConfigError(problem, where=str(run), remedy=remedy)
    if objective_of(config).compares:
        problem = f"was trained with train.objective.kind={config.train.objective.kind}, which has no loss of a record"
        raise ConfigError(problem, where=str(run), remedy="Leave --task-steps out.")
    projectors = [path / "projector.safetensors" for path in (first, folder)]
    if projectors[0].exists() and projectors[0].read_bytes() != projectors[1].read_bytes():
        problem = "has another projector than the first run"
        raise ConfigError(problem, where=str(run), remedy="Begin all soft prompts with one run (run.init_from).")


def _records(loaded: Loaded, folder: Path) -> TrainData:
    """The records of a run in their rows, read again; what was bad is left out, as the run has said."""
    config, vlm = read_config(folder), loaded.vlm
    preparation = prepare_images(loaded.image, tokens=vlm.image_tokens, grid=vlm.image_grid)
    store = Store(cache_folder(config.data.cache_dir, run_dir=Path(config.run.dir)), lambda text: None)
    given: dict[str, Any] = {"preparation": preparation, "cache": store.folder, "on_bad": lambda error: None}
    data = open_records(config, "train", loaded.chat, loaded.tokenizer, **given, say=lambda text: None)
    scan = measure(data, store=store, shown=False)
    feed: dict[str, Any] = {"load_image": image_loader(preparation) if preparation is not None else None}
    feed |= {"skip_bad": True, "max_bad": scan.records, "workers": 0}
    world = World(0, 1, vlm.device, deepspeed=False)
    return train_data(config, data, scan, row_order_of(config, scan)[0], world=world, **feed)


def _without_end(data: TrainData, run: Path) -> Iterator[MicroBatch]:
    """The rows of a run, and from the first again. Raises ConfigError if none has a token to learn."""
    found = True
    while found:
        found = False
        with closing(data.batches()) as batches:
            for batch in batches:
                if batch.weight:
                    found = True
                    yield batch
    problem = "none of the records that it was trained on can be read"
    raise ConfigError(problem, where=str(run), remedy="Put its data.train back, or leave --task-steps out.")


def _prompt(run: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """The trained soft prompt (P, D) of a run, and the model that it is for. Raises ConfigError."""
    folder = find(run)
    path = folder / "llm_tuned.safetensors"
    tensors = load_file(path) if path.exists() else {}
    name = f"{PROMPT}.embeddings"
    config = read_config(folder)
    if name not in tensors:
        problem = f"was trained with tune.llm.mode={config.tune.llm.mode}, and has no soft prompt"
        raise ConfigError(problem, where=str(run), remedy="Train runs with tune.llm.mode=soft_prompt.")
    llm = config.model.llm.model_dump()
    return tensors[name].float(), {key: llm[key] for key in OF_MODEL}


def _said(model: dict[str, Any]) -> str:
    return str(model["name"])
