"""A soft prompt in front of a row: one root for all records, or one for each where they may not share it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.models.virtual import PROMPT, Prefix, SoftPrompt, virtual_tokens, with_prompt

TOKENS, WIDTH = 3, 4


def llm_with_prompt() -> Any:
    start = torch.arange(TOKENS * WIDTH, dtype=torch.float32).view(TOKENS, WIDTH) - 100
    return SimpleNamespace(**{PROMPT: SoftPrompt(start)})


def row(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Records one after the other: embeddings that name their tokens, positions, nodes, each record's last token."""
    total, starts = sum(lengths), [sum(lengths[:n]) for n in range(len(lengths))]
    embeddings = torch.arange(total, dtype=torch.float32)[:, None].expand(-1, WIDTH)
    positions = torch.cat([torch.arange(n) for n in lengths])
    nodes = torch.tensor([[start, n, -1] for start, n in zip(starts, lengths, strict=True)])
    return embeddings, positions, nodes, torch.tensor([s + n - 1 for s, n in zip(starts, lengths, strict=True)])


def test_without_a_prompt_a_row_is_what_it_was() -> None:
    given = row([2, 3])
    assert all(a is b for a, b in zip(with_prompt(SimpleNamespace(), *given), given, strict=True))
    assert virtual_tokens(SimpleNamespace()) == 0 and virtual_tokens(llm_with_prompt()) == TOKENS


def test_records_hang_below_one_prompt_and_count_on_from_it() -> None:
    llm, given = llm_with_prompt(), row([2, 3])
    embeddings, positions, nodes, at = with_prompt(llm, *given)
    assert torch.equal(embeddings, torch.cat([llm.mmit_prompt(), given[0]]))
    assert positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert nodes.tolist() == [[0, 3, -1], [3, 2, 0], [5, 3, 0]]
    assert embeddings[at].equal(given[0][given[3]])


def test_shared_prefixes_stay_below_each_other() -> None:
    embeddings, positions, _, at = row([2, 3])
    nodes = torch.tensor([[0, 2, -1], [2, 3, 0]])
    assert with_prompt(llm_with_prompt(), embeddings, positions, nodes, at)[2].tolist() == [
        [0, 3, -1],
        [3, 2, 0],
        [5, 3, 1],
    ]


def test_a_single_sequence_stays_one() -> None:
    embeddings, positions, nodes, at = with_prompt(llm_with_prompt(), *row([4]))
    assert nodes.tolist() == [[0, 7, -1]] and positions.tolist() == list(range(7)) and at.tolist() == [6]
    assert len(embeddings) == 7


def test_repeated_every_record_has_a_prompt_of_its_own() -> None:
    llm, given = llm_with_prompt(), row([2, 1, 3])
    embeddings, positions, nodes, at = with_prompt(llm, *given, repeated=True)
    assert nodes.tolist() == [[0, 5, -1], [5, 4, -1], [9, 6, -1]]
    for (start, length, _), own in zip(nodes.tolist(), given[0].split([2, 1, 3]), strict=True):
        assert torch.equal(embeddings[start : start + length], torch.cat([llm.mmit_prompt(), own]))
        assert positions[start : start + length].tolist() == list(range(length))
    assert embeddings[at].equal(given[0][given[3]])


@pytest.mark.parametrize("gated", [True, False])
def test_a_gate_starts_at_nothing(gated: bool) -> None:
    prefix = Prefix(tokens=2, heads=4, key_heads=2, head_dim=3, gated=gated, like=torch.zeros(1))
    keys, values, gate = prefix()
    assert keys.shape == values.shape == (2, 2, 3)
    assert gate is None if not gated else torch.equal(gate, torch.zeros(4, 1))
