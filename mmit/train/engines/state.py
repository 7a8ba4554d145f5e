"""Optimizer state on disk, the same for every engine, ZeRO stage and number of ranks.

One whole float32 tensor per trained parameter and key ("exp_avg", "exp_avg_sq", "step", and "master" where the model
computes in another format), under the parameter's name, in safetensors files of bounded size, so that neither saving
nor loading holds all of it in memory. Refuses a state of other parameters than those that are trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mmit.errors import CheckpointError

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what DeepSpeed's scaler changes
KEYS = ("step", "exp_avg", "exp_avg_sq", "master")
FILE_BYTES = 2 << 30
INDEX = "optimizer.json"
Shapes = Mapping[str, tuple[int, ...]]


def write_state(
    folder: Path, states: Iterable[tuple[str, dict[str, torch.Tensor]]], *, shapes: Shapes, write: bool
) -> None:
    """Write what `states` yields, parameter by parameter.

    Args:
        states: (name, tensors by key); exhausted on every rank, since gathering them may need all.
        shapes: of every trained parameter, kept beside the tensors.
        write: this rank writes; the others only take part.
    """
    files: dict[str, list[str]] = {}
    waiting: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        name = f"optimizer-{len(files) + 1:05d}.safetensors"
        save_file(waiting, folder / name)
        files[name] = sorted(waiting)  # so that reading knows what is where without opening every file
        waiting.clear()

    for name, tensors in states:
        # Not a `break`: the next parameter is gathered by all ranks, or by none.
        if not write:
            continue
        for key, tensor in tensors.items():
            waiting[f"{name}|{key}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            size += tensor.numel() * 4
        if size >= FILE_BYTES:
            flush()
            size = 0
    if write:
        flush()
        index = {"parameters": {n: list(s) for n, s in shapes.items()}, "files": files}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def read_state(folder: Path, *, shapes: Shapes) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield (name, tensors by key) of every parameter that has a state; nothing is kept.

    Raises:
        CheckpointError: the state is of other parameters than `shapes` lists.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            "holds no optimizer state", where=str(folder), remedy="start from its weights with run.init_from"
        ) from None
    # Before a tensor is read: a state of other parameters would partly fit, and training would go on with half of it.
    _same_parameters({n: tuple(s) for n, s in index["parameters"].items()}, shapes, folder)
    for name, keys in index["files"].items():
        with safe_open(folder / name, framework="pt") as file:
            for parameter in dict.fromkeys(k.rpartition("|")[0] for k in keys):
                # A parameter that never had a gradient has no state, and one in float32 no master.
                mine = [k for k in KEYS if f"{parameter}|{k}" in keys]
                yield parameter, {k: file.get_tensor(f"{parameter}|{k}") for k in mine}


def _same_parameters(then: Shapes, now: Shapes, folder: Path) -> None:
    problems = [f"{n} was trained then and is not now" for n in then if n not in now]
    problems += [f"{n} is trained now and was not then" for n in now if n not in then]
    problems += [f"{n} had the shape {then[n]}, now {now[n]}" for n in now if n in then and then[n] != now[n]]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"holds the optimizer state of another set of parameters: {problems[0]}{more}",
            where=str(folder),
            remedy="resume with the config the checkpoint was made with, or use run.init_from for its weights only",
        )


def placed_step(step: torch.Tensor, p: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The step count of a parameter, on the device on which AdamW itself would have made it.

    A fused AdamW refuses a count that lies elsewhere than the parameter, a plain one keeps it on the CPU.
    """
    there = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return step.detach().to(p.device if there else "cpu", torch.float32, copy=True)


def placed(
    state: Mapping[str, torch.Tensor], p: torch.Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The state of a parameter on the devices on which AdamW keeps it."""
    return {k: placed_step(v, p, optimizer) if k == "step" else v.to(p.device) for k, v in state.items()}


def scaler_state(optimizer: Any) -> dict[str, float]:
    """State of DeepSpeed's dynamic loss scale (fp16); {} where the loss is not scaled, or by a fixed number."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {k: getattr(scaler, k) for k in SCALER} if getattr(scaler, "dynamic", False) else {}


def take_scaler_state(optimizer: Any, state: Mapping[str, float]) -> None:
    """Put back what `scaler_state` gave, where the loss is scaled dynamically."""
    if scaler_state(optimizer):
        for key, value in state.items():
            setattr(optimizer.loss_scaler, key, value)
