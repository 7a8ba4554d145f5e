"""Virtual tokens: learned embeddings before a prompt, or learned keys and values in every attention layer.

Owns the two modules and how a soft prompt enters a packed row: as the root that all records of the row share, so
that each record sees exactly what it would see alone. Where the modules sit on a model is a fixed attribute name.

Dimensions: P virtual tokens, T tokens in a row, D width, H query heads, KV key heads, Dh head size, K nodes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmit.models.deepstack import as_wide

PROMPT = "mmit_prompt"  # on the language model
PREFIX = "mmit_prefix"  # on each of its attention modules


class SoftPrompt(nn.Module):
    """Embeddings of P virtual tokens (arXiv:2104.08691)."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(start.detach().clone())
        self.tokens = len(start)

    def forward(self) -> torch.Tensor:
        """(P, D). A call, not an attribute, so that ZeRO-3 gathers the parameter."""
        return self.embeddings


class Prefix(nn.Module):
    """Keys and values of P virtual tokens for one attention layer (arXiv:2101.00190).

    With a gate the prefix has a softmax of its own whose result is added times tanh(gate), one gate per head that
    starts at 0 (arXiv:2303.16199); without, its keys join the softmax of the layer.
    """

    def __init__(
        self, *, tokens: int, heads: int, key_heads: int, head_dim: int, gated: bool, like: torch.Tensor
    ) -> None:
        super().__init__()
        shape = (key_heads, tokens, head_dim)
        self.keys = nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device).normal_(std=0.02))
        self.values = nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device).normal_(std=0.02))
        # Zero, so that tanh is: the model starts as the one without a prefix.
        gate = torch.zeros(heads, 1, dtype=like.dtype, device=like.device)
        self.gate = nn.Parameter(gate) if gated else None

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values (KV, P, Dh), and the factor (H, 1) on their contribution, or None."""
        return self.keys, self.values, None if self.gate is None else self.gate.tanh()


def virtual_tokens(llm: Any) -> int:
    """Places that a soft prompt takes from the model's context; a prefix, whose keys have no position, takes none."""
    prompt = getattr(llm, PROMPT, None)
    return 0 if prompt is None else prompt.tokens


def with_prompt(
    llm: Any,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    nodes: torch.Tensor,
    at: torch.Tensor,
    *,
    repeated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the model's soft prompt, if it has one, above everything else in a row.

    Args:
        llm: the language model.
        embeddings: (T, D). positions: (T,). nodes: (K, 3) first token, length, parent or -1. at: (S,).
        repeated: the nodes are roots one after the other, and each gets a prompt of its own.

    Returns:
        the same four with P more tokens in front, below which every former root hangs; or in front of every root.
    """
    prompt = getattr(llm, PROMPT, None)
    if prompt is None:
        return embeddings, positions, nodes, at
    # With DeepStack embeddings carry the levels as further channels; a prompt has none, so nothing is added for it.
    rows = as_wide(prompt().to(embeddings), embeddings)
    count = len(rows)
    before = torch.arange(count, device=positions.device, dtype=positions.dtype)
    table = prompted_nodes(nodes.cpu(), count, repeated=repeated)
    if repeated:
        lengths: list[int] = nodes[:, 1].tolist()
        starts = nodes[:, 0].contiguous().to(at.device)
        return (
            torch.cat([x for piece in embeddings.split(lengths) for x in (rows, piece)]),
            torch.cat([x for piece in positions.split(lengths) for x in (before, piece + count)]),
            table,
            at + count * torch.searchsorted(starts, at, right=True),
        )
    return torch.cat([rows, embeddings]), torch.cat([before, positions + count]), table, at + count


def prompted_nodes(nodes: torch.Tensor, count: int, *, repeated: bool = False) -> torch.Tensor:
    """Nodes (K, 3) of a row, on the CPU, with a soft prompt of `count` tokens in its place, see `with_prompt`."""
    if not count:
        return nodes
    table = nodes.clone()
    if repeated:
        # Every node moves by the prompts before it, its own not counted, and is longer by its own.
        table[:, 0] += count * torch.arange(len(nodes))
        table[:, 1] += count
        return table
    if len(nodes) == 1:  # one sequence stays one, and needs no packed attention
        table[0, 1] += count
        return table
    # Keys of a prompt do not depend on what follows, so one node of it serves all records, as a common prefix does.
    table[:, 0] += count
    table[:, 2] += 1  # -1, no parent, becomes 0, the prompt
    return torch.cat([torch.tensor([[0, count, -1]]), table])
