"""Keys and values of prompts that join and leave a batch: held against a plain list of each prompt's own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from mmit.models.batch_cache import ROOM, batch_cache

HEADS, SIZE = 2, 3


def states(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, HEADS, tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def row_cache(tokens: int, seed: int) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    keys, values = states(tokens, seed), states(tokens, seed + 1000)
    cache = DynamicCache()
    cache.update(keys, values, 0)
    return cache, keys[0], values[0]


def batch(paths: list[list[int]], seed: int) -> tuple[Cache, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A batch of the prompts of one row, and each prompt's own keys and values (KV, T, D)."""
    cache, keys, values = row_cache(max(map(max, paths)) + 1, seed)
    return batch_cache([cache], [paths]), [(keys[:, path], values[:, path]) for path in paths]


def same(cache: Cache, prompts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    layer: Any = cache.layers[0]
    assert len(layer.keys) == len(layer.values) == len(prompts)
    for place, (keys, values) in enumerate(prompts):
        length = keys.shape[1]
        assert torch.equal(layer.keys[place, :, -length:], keys)
        assert torch.equal(layer.values[place, :, -length:], values)
    assert torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all()  # padding is hidden, not NaN


def test_rows_of_several_prompts_end_in_one_column() -> None:
    first, second = row_cache(6, 0), row_cache(4, 1)
    made = batch_cache([first[0], second[0]], [[[0, 1, 2], [0, 1, 3, 4, 5]], [[0, 1, 2, 3]]])
    paths = [(first, [0, 1, 2]), (first, [0, 1, 3, 4, 5]), (second, [0, 1, 2, 3])]
    same(made, [(row[1][:, path], row[2][:, path]) for row, path in paths])
    assert not first[0].get_seq_length()  # emptied on the way, so that both are never held at once


@pytest.mark.parametrize("seed", range(8))
def test_steps_joins_and_leaves_keep_every_prompt_what_it_was(seed: int) -> None:
    rng = random.Random(seed)
    lengths = lambda: [list(range(rng.randint(1, 9))) for _ in range(rng.randint(1, 3))]  # noqa: E731
    cache, prompts = batch(lengths(), seed)
    layer: Any = cache.layers[0]
    for turn in range(25):
        what = rng.choice(["step", "step", "join", "leave", "put"])
        if what == "step":
            for _ in range(rng.choice([1, 3, ROOM])):
                keys, values = (torch.randn(len(prompts), HEADS, 1, SIZE) for _ in range(2))
                cache.update(keys, values, 0)
                grown = zip(prompts, keys, values, strict=True)
                prompts = [(torch.cat([k, a], 1), torch.cat([v, b], 1)) for (k, v), a, b in grown]
        elif what == "join" and len(prompts) < 6:
            more, theirs = batch(lengths(), 100 * seed + turn)
            layer.join(more.layers[0])
            prompts = prompts + theirs
        elif what == "leave":
            kept = rng.sample(range(len(prompts)), rng.randint(1, len(prompts)))
            prompts = [prompts[place] for place in kept]
            layer.keep(kept, max(keys.shape[1] for keys, _ in prompts))
        elif what == "put":
            place = rng.randrange(len(prompts))
            new = tuple(torch.randn_like(states) for states in prompts[place])
            layer.put(place, *new)
            prompts[place] = new[0], new[1]
        same(cache, prompts)
