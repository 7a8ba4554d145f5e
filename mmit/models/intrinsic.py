"""Intrinsic prompt tuning: soft prompts of many tasks as points of a low-dimensional space (arXiv:2110.07867).

Owns the map from d numbers to a soft prompt, how it is found from trained prompts, and its folder
(`subspace.safetensors`, `subspace.json`). The published code has a linear map to the d numbers and, back, one hidden
layer of 768 with tanh; the same here, or linear maps both ways. It finds the maps by reconstruction, by the loss on the
tasks or by both; here by reconstruction alone.

Dimensions: N prompts, P virtual tokens, D width, d numbers, H hidden units.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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


def find_subspace(
    prompts: torch.Tensor, dim: int, *, hidden: int = HIDDEN, steps: int = 2000, lr: float = 1e-3, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Find the space in which prompts lie, by reconstruction.

    Args:
        prompts: (N, P, D).
        hidden: 0 finds the best linear maps, by a singular value decomposition; else Adam trains both maps on
            standardised prompts, `steps` times on all of them.

    Returns:
        the layers of `Back`, and the numbers (N, d) of the prompts.

    Raises:
        ModelError: fewer than two prompts, or more numbers than they have.
    """
    count, tokens, width = prompts.shape
    if count < 2 or not 1 <= dim <= tokens * width:
        problem = f"{count} prompts of {tokens} x {width} numbers give no space of {dim}"
        raise ModelError(problem, where="dim", remedy="Give two prompts or more, and fewer numbers than one has.")
    # In float64: with few prompts the directions of the decomposition hang on small differences.
    flat = prompts.detach().double().flatten(1)
    mean = flat.mean(0)
    spread = (flat - mean).std().clamp_min(1e-12)
    given = (flat - mean) / spread
    tensors: dict[str, torch.Tensor]
    if hidden == 0:
        # All directions only where more are asked for than there are prompts; the rest are orthogonal and empty.
        _, _, directions = torch.linalg.svd(given, full_matrices=dim > count)
        kept = directions[:dim]  # (d, P * D)
        z, tensors = given @ kept.T, {"outer.weight": kept.T, "outer.bias": torch.zeros_like(mean)}
    else:
        z, tensors = _trained(given, dim, hidden=hidden, steps=steps, lr=lr, seed=seed)
    # What was standardised goes into the last layer.
    tensors["outer.weight"] = tensors["outer.weight"] * spread
    tensors["outer.bias"] = tensors["outer.bias"] * spread + mean
    return {name: tensor.float() for name, tensor in tensors.items()}, z.float()


def _trained(
    given: torch.Tensor, dim: int, *, hidden: int, steps: int, lr: float, seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Numbers (N, d) of standardised prompts (N, P * D) and the layers back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        there = nn.Linear(given.shape[1], dim).double()
        layers = nn.ModuleDict({"inner": nn.Linear(dim, hidden), "outer": nn.Linear(hidden, given.shape[1])}).double()
    optimizer = torch.optim.Adam([*there.parameters(), *layers.parameters()], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (layers["outer"](layers["inner"](there(given)).tanh()) - given).pow(2).mean().backward()
        optimizer.step()
    return there(given).detach(), {name: tensor.detach() for name, tensor in layers.state_dict().items()}


def write_subspace(
    folder: Path, layers: Mapping[str, torch.Tensor], z: torch.Tensor, *, tokens: int, facts: Mapping[str, Any]
) -> None:
    """Write the layers back, the prompts' numbers (N, d), whose mean is where tuning starts, and the facts."""
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
