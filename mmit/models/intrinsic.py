"""Intrinsic prompt tuning: soft prompts of many tasks as points of a low-dimensional space (arXiv:2110.07867).

Owns the map from d numbers to a soft prompt, how it is found from trained prompts, and its folder
(`subspace.safetensors`, `subspace.json`). The published code has a linear map to the d numbers and, back, one hidden
layer of 768 with tanh; the same here, or linear maps both ways. It finds the maps by reconstruction, by the loss on the
tasks or by both; here by reconstruction first, then by both if the tasks' rows are given.

Dimensions: N prompts, P virtual tokens, D width, d numbers, H hidden units.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from mmit.errors import ModelError
from mmit.io import write_atomic

WEIGHTS, FACTS = "subspace.safetensors", "subspace.json"
OF_MODEL = ("name", "revision", "random_init")  # keys of model.llm that say what a prompt belongs to
HIDDEN = 768  # of the published code
LAYERS = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
HASH = "subspace"  # the parameter of a prompt that holds the hash of its subspace, 32 bytes


class Back(nn.Module):
    """d numbers -> a soft prompt: two layers with tanh between, or one where there is no inner one.

    Built of its tensors, `inner.*` (H, d) and (H,), `outer.*` (P * D, H or d) and (P * D,), as ZeRO-3 divides a module
    once it is built.
    """

    inner_weight: nn.Parameter | None
    inner_bias: nn.Parameter | None
    outer_weight: nn.Parameter
    outer_bias: nn.Parameter

    def __init__(self, tensors: Mapping[str, torch.Tensor], tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        for name in LAYERS:
            held = tensors.get(name)
            parameter = None if held is None else nn.Parameter(held.detach().clone(), requires_grad=False)
            self.register_parameter(name.replace(".", "_"), parameter)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., P, D)."""
        if self.inner_weight is not None:
            z = F.linear(z, self.inner_weight, self.inner_bias).tanh()
        return F.linear(z, self.outer_weight, self.outer_bias).unflatten(-1, (self.tokens, -1))


class IntrinsicPrompt(nn.Module):
    """A soft prompt of which d numbers are trained."""

    def __init__(self, back: Back, z: torch.Tensor, digest: bytes) -> None:
        super().__init__()
        self.back = back
        self.z = nn.Parameter(z.detach().clone())
        # Whole numbers up to 255 are exact in every number format. A parameter, since a checkpoint keeps those.
        held = torch.tensor(list(digest), dtype=z.dtype, device=z.device)
        self.subspace = nn.Parameter(held, requires_grad=False)
        self.tokens = back.tokens

    def forward(self) -> torch.Tensor:
        """(P, D). A call, so that ZeRO-3 gathers the parameters."""
        return self.back(self.z)


@dataclass(frozen=True)
class Tasks:
    """The loss on the tasks that the prompts are of.

    Attributes:
        loss: of the next rows of a task, given by its number, with this module as the prompt of a frozen model.
        steps: one task each, in turn.
        lr: of Adam. Small: a step of 1e-3 in each of 768 hidden units moves a prompt by more than its spread.
        weight: beside the reconstruction, whose loss is 1 for the mean prompt.
    """

    loss: Callable[[nn.Module, int], torch.Tensor]
    steps: int
    lr: float = 1e-4
    weight: float = 1.0


class Maps(nn.Module):
    """The maps there and back while they are found; as the prompt of a model it is one of the prompts, reproduced."""

    given: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, prompts: torch.Tensor, dim: int, *, hidden: int, seed: int) -> None:
        """Begin with the best linear maps where there are no hidden units, else with drawn ones. Raises ModelError."""
        super().__init__()
        count, self.tokens, width = prompts.shape
        if count < 2 or not 1 <= dim <= self.tokens * width:
            problem = f"{count} prompts of {self.tokens} x {width} numbers give no space of {dim}"
            raise ModelError(problem, where="dim", remedy="Give two prompts or more, and fewer numbers than one has.")
        # In float64: with few prompts the directions of the decomposition hang on small differences.
        flat = prompts.detach().double().flatten(1)
        mean = flat.mean(0)
        spread = (flat - mean).std().clamp_min(1e-12)
        for name, tensor in {"given": (flat - mean) / spread, "mean": mean, "spread": spread}.items():
            self.register_buffer(name, tensor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.there = nn.Linear(self.given.shape[1], dim).double()
            self.inner = nn.Linear(dim, hidden).double() if hidden else None
            self.outer = nn.Linear(hidden or dim, self.given.shape[1]).double()
        if not hidden:
            self._decompose()
        self.prompt = 0  # the one that it is in a model

    @torch.no_grad()
    def _decompose(self) -> None:
        dim = len(self.there.weight)
        # All directions only where more are asked for than there are prompts; the rest are orthogonal and empty.
        _, _, directions = torch.linalg.svd(self.given, full_matrices=dim > len(self.given))
        self.there.weight.copy_(directions[:dim])
        self.there.bias.zero_()
        self.outer.weight.copy_(directions[:dim].T)
        self.outer.bias.zero_()

    def back(self, z: torch.Tensor) -> torch.Tensor:
        """(..., d) -> standardised prompts (..., P * D)."""
        return self.outer(z if self.inner is None else self.inner(z).tanh())

    def lost(self) -> torch.Tensor:
        """Mean square of what is not reproduced, of standardised prompts: 1 is the mean prompt for all."""
        return (self.back(self.there(self.given)) - self.given).pow(2).mean()

    def forward(self) -> torch.Tensor:
        """(P, D), of `self.prompt`."""
        found = self.back(self.there(self.given[self.prompt]))
        return (found * self.spread + self.mean).unflatten(0, (self.tokens, -1))

    def found(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The layers of `Back`, of prompts that are not standardised, and the numbers (N, d)."""
        layers = {"outer.weight": self.outer.weight * self.spread, "outer.bias": self.outer.bias * self.spread}
        layers["outer.bias"] = layers["outer.bias"] + self.mean
        if self.inner is not None:
            layers |= {"inner.weight": self.inner.weight, "inner.bias": self.inner.bias}
        z = self.there(self.given)
        return {name: tensor.detach().float() for name, tensor in layers.items()}, z.detach().float()


def find_subspace(
    prompts: torch.Tensor,
    dim: int,
    *,
    hidden: int = HIDDEN,
    steps: int = 2000,
    lr: float = 1e-3,
    seed: int = 0,
    tasks: Tasks | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Find the space in which prompts lie, by reconstruction and by the loss on the tasks.

    Args:
        prompts: (N, P, D).
        hidden: 0 begins with the best linear maps, by a singular value decomposition; else Adam trains both maps on
            standardised prompts, `steps` times on all of them.
        tasks: then trains both maps on the two losses together; None leaves that out.

    Returns:
        the layers of `Back`, and the numbers (N, d) of the prompts.

    Raises:
        ModelError: fewer than two prompts, or more numbers than they have.
    """
    maps = Maps(prompts, dim, hidden=hidden, seed=seed)
    if hidden:
        optimizer = torch.optim.Adam(maps.parameters(), lr=lr, fused=True)  # 40 times as fast as a loop on a CPU
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            maps.lost().backward()
            optimizer.step()
    if tasks is not None:
        optimizer = torch.optim.Adam(maps.parameters(), lr=tasks.lr, fused=True)
        for step in range(tasks.steps):
            optimizer.zero_grad(set_to_none=True)
            maps.prompt = step % len(prompts)
            loss = maps.lost() + tasks.weight * tasks.loss(maps, maps.prompt)
            loss.backward()
            optimizer.step()
    return maps.found()


def write_subspace(
    folder: Path, layers: Mapping[str, torch.Tensor], z: torch.Tensor, *, tokens: int, facts: Mapping[str, Any]
) -> None:
    """Write a subspace of prompts: weights and facts, each file whole or not at all.

    Args:
        folder: is there.
        layers: the layers back, by name.
        z: (N, d) numbers of the N prompts; their mean is where tuning starts.
        tokens: P, virtual tokens of a prompt.
        facts: what is told of where it comes from.
    """
    data = save({name: tensor.contiguous() for name, tensor in {**layers, "numbers": z}.items()})
    write_atomic(folder / WEIGHTS, data)
    write_atomic(folder / FACTS, json.dumps({"tokens": tokens, "dim": z.shape[1], **facts}, indent=1) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """What the folder says of its subspace. Raises ModelError."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        int(facts["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _none(folder) from None
    return facts


def read_subspace(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor, bytes]:
    """The layers back, the numbers (d,) to start from, and the hash of the file. Raises ModelError."""
    try:
        data = (folder / WEIGHTS).read_bytes()
        layers = load(data)
        # Tuning starts in the middle of the prompts that the space was found from.
        start = layers.pop("numbers").mean(0)
        layers["outer.weight"]
    except (OSError, KeyError, SafetensorError):
        raise _none(folder) from None
    return layers, start, hashlib.sha256(data).digest()


def _none(folder: Path) -> ModelError:
    remedy = "Make one of trained soft prompts with: mmit analyse intrinsic RUN RUN ... --dim 4 --out DIR"
    problem = f"holds no subspace: {WEIGHTS} or {FACTS} is missing or damaged"
    return ModelError(problem, where=str(folder), remedy=remedy)
