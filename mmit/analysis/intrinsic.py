"""Soft prompts of several runs -> the space they lie in, for `tune.llm.mode=intrinsic`.

In: runs or checkpoints that trained soft prompts for one language model. Out: the folder of a subspace and how well
each prompt is reproduced. Refuses runs of other methods, and prompts of different models or lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmit.errors import ConfigError
from mmit.models.intrinsic import HIDDEN, OF_MODEL, Back, find_subspace, write_subspace
from mmit.models.virtual import PROMPT
from mmit.train.checkpoint.model import find, read_config


def make_subspace(
    runs: Sequence[Path], *, out: Path, dim: int, hidden: int = HIDDEN, steps: int = 2000, seed: int = 0
) -> list[tuple[str, float]]:
    """Find the subspace of the runs' soft prompts and write it to `out`.

    Args:
        runs: of one model, each with a soft prompt of as many tokens as the others.
        out: a folder that is not there, or empty.
        dim: of the subspace. hidden, steps, seed: of the autoencoder that finds it.

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
    layers, z = find_subspace(prompts, dim, hidden=hidden, steps=steps, seed=seed)
    tokens = prompts.shape[1]
    with torch.no_grad():
        lost = (Back(layers, tokens)(z) - prompts).pow(2).sum((1, 2)) / (prompts - prompts.mean(0)).pow(2).sum((1, 2))
    table = [(str(run), float(share)) for run, share in zip(runs, lost, strict=True)]
    facts = {"llm": found[0][1], "prompts": [{"run": name, "lost": share} for name, share in table]}
    write_subspace(out, layers, z, tokens=tokens, facts=facts)
    return table


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
