"""Keys and values of the beginnings of prompts, kept for the next prompt that begins so.

Owns blocks of a fixed number of tokens: each is found by the block before it and its own tokens, so that beginnings
which part share what is before. Takes what identifies the tokens, and the cache of a row that was run; gives a cache
that a row can go on from. The least recently used blocks give way. Refuses nothing: what is not known is computed.

Dimensions: T tokens in a row, C of them known, N tokens of a block, KV key heads, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from transformers.cache_utils import Cache, DynamicCache

from mmit.models.sending import send

BLOCK = 8
Key = tuple[int, tuple[Hashable, ...]]  # the name of the block before, 0 for none; what identifies the block's tokens


@dataclass(frozen=True, slots=True)
class Block:
    """Keys and values of N tokens."""

    name: int
    key: Key
    states: tuple[torch.Tensor, ...]  # layers of one shape together: (keys and values of them, KV, N, D)


class Before(NamedTuple):
    """What of a row is known already: its first tokens."""

    length: int
    cache: Cache  # (1, KV, C, D) in each layer


class Division(NamedTuple):
    """A row with its known tokens brought to the front."""

    order: list[int]  # (T,) the former place of each token
    length: int  # C
    nodes: list[list[int]]  # first token, length, parent or -1 in the new order; parents come first


class PrefixCache:
    """Blocks of beginnings, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._blocks: OrderedDict[Key, Block] = OrderedDict()
        self._names = count(1)
        self._layout: list[list[tuple[int, int]]] = []  # (layer, 0 for its keys and 1 for its values) of each state

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self._bytes

    def find(self, tokens: Sequence[Hashable]) -> list[Block]:
        """Return the blocks of the longest known beginning that leaves a token to run."""
        found: list[Block] = []
        # Stops short of the last token: at least one must run, or there would be no logits to go on from.
        for start in range(0, len(tokens) - BLOCK, BLOCK):
            # A block is named by all that stands before it, not by its tokens alone: the keys of equal tokens differ
            # with what they have seen.
            block = self._blocks.get((found[-1].name if found else 0, tuple(tokens[start : start + BLOCK])))
            if block is None:
                break
            found.append(block)
        for block in reversed(found):  # so that none outlives those before it
            self._blocks.move_to_end(block.key)
        return found

    def add(
        self, tokens: Sequence[Sequence[Hashable]], cache: Cache, paths: Sequence[Sequence[int]], *, place: int = 0
    ) -> None:
        """Keep prompts of a row that was run, or a prompt and its answer out of a batch.

        Args:
            tokens: what identifies each prompt's tokens. paths: where they are among the T of the cache.
            cache: (1, KV, T, D) in each layer, of a batch (B, KV, T, D).
            place: in the batch.
        """
        stacked: list[torch.Tensor] | None = None
        for mine, path in zip(tokens, paths, strict=True):
            above, used = 0, []
            # As `find` looks: a block that holds a prompt's last token would never be found.
            for start in range(0, len(mine) - BLOCK, BLOCK):
                key = above, tuple(mine[start : start + BLOCK])
                block = self._blocks.get(key)
                if block is None:
                    # Layers of one shape are cut by one call: a model has dozens, and each would be a kernel launch for
                    # 8 tokens.
                    stacked = self._stacked(cache, place) if stacked is None else stacked
                    places = send(torch.tensor(path[start : start + BLOCK]), stacked[0].device)
                    block = Block(next(self._names), key, tuple(s.index_select(2, places) for s in stacked))
                    self._blocks[key] = block
                    self._bytes += sum(s.nbytes for s in block.states)
                used.append(key)
                above = block.name
            # From the end, so that the beginning is the most recent: a block whose predecessor is gone can never be
            # found again.
            for key in reversed(used):
                self._blocks.move_to_end(key)
        while self._bytes > self._limit:
            self._bytes -= sum(s.nbytes for s in self._blocks.popitem(last=False)[1].states)

    def before(self, division: Division, paths: Sequence[Sequence[int]], blocks: Sequence[Sequence[Block]]) -> Before:
        """Put together what is known of a row.

        Args:
            paths: (B,) where in the undivided row each prompt's tokens are. blocks: (B,) those found for each.
        """
        at: dict[int, int] = {}
        used: dict[int, tuple[int, Block]] = {}  # by name: which of them it is
        for path, mine in zip(paths, blocks, strict=True):
            for n, block in enumerate(mine):
                number, _ = used.setdefault(block.name, (len(used), block))
                for offset, place in enumerate(path[n * BLOCK : (n + 1) * BLOCK]):
                    at[place] = number * BLOCK + offset
        # Blocks lie one after the other in `joined`; the row wants its tokens in its own order, where prompts share
        # some of them.
        places = torch.tensor([at[place] for place in division.order[: division.length]])
        layers: dict[int, list[Any]] = {}
        for states, group in zip(
            zip(*(block.states for _, block in used.values()), strict=True), self._layout, strict=True
        ):
            joined = torch.cat(states, dim=2).index_select(2, send(places, states[0].device))
            for tensor, (layer, which) in zip(joined, group, strict=True):
                layers.setdefault(layer, [None, None])[which] = tensor[None]
        cache = DynamicCache()
        for layer in sorted(layers):
            cache.update(*layers[layer], layer)
        return Before(division.length, cache)

    def _stacked(self, cache: Cache, place: int) -> list[torch.Tensor]:
        """(keys and values of layers, KV, T, D) of a place, for each shape that they have."""
        states = [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]
        groups: dict[Any, list[tuple[int, int]]] = {}
        for number, pair in enumerate(states):
            for which, tensor in enumerate(pair):
                kind = tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device
                groups.setdefault(kind, []).append((number, which))
        self._layout = list(groups.values())
        return [torch.stack([states[n][which][place] for n, which in group]) for group in self._layout]


def divide(nodes: Sequence[Sequence[int]], paths: Sequence[Sequence[int]], counts: Sequence[int]) -> Division:
    """Bring the known tokens of a row to the front.

    Args:
        nodes: first token, length, parent or -1 of each node; they follow each other, parents before children.
        paths: (B,) where in the row each prompt's tokens are.
        counts: (B,) how many of them, from the first, are known.
    """
    known = {place for path, count in zip(paths, counts, strict=True) for place in path[:count]}
    ends = {path[-1] for path in paths}  # a prompt's last token must run, and with it what comes after
    for path in paths:
        known.difference_update(path[next(n for n, place in enumerate(path) if place in ends) :])
    order: list[int] = []
    table: list[list[int]] = []
    last = [-1] * len(nodes)  # of each node's tokens that are in the table: where the last of them are
    # Two passes: first the known head of every node, in the old order, then what is left of it. A node that is known in
    # part becomes two, the second below the first.
    for wanted in (True, False):
        for n, (start, length, parent) in enumerate(nodes):
            held = sum(place in known for place in range(start, start + length))  # its first ones
            begin, size = (start, held) if wanted else (start + held, length - held)
            above = last[n] if held and not wanted else last[parent] if parent >= 0 else -1
            if size:
                table.append([len(order), size, above])
                order += range(begin, begin + size)
            last[n] = len(table) - 1 if size else above
    return Division(order, len(known), table)
