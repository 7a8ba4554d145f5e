"""Virtual tokens while decoding: with the cache as without it, batched as alone."""

from __future__ import annotations

import pytest
import torch

from mmit.models import decoding
from mmit.models.attention import NAME
from mmit.models.decoding import Prompts
from mmit.models.llm import context_length, load_llm
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from tests.models.test_attention import LLAMA
from tests.models.tuned_models import disturb, tune_plan

METHODS = {
    "soft_prompt": {"tokens": 3},
    "prefix": {"tokens": 3},
    "prefix ungated": {"tokens": 3, "gated": False},
    "houlsby": {"size": 3},
}
PROMPTS = [[3, 4, 5, 6, 7], [3, 4, 5, 9], [11, 12]]


@pytest.fixture(params=METHODS)
def vlm(request):
    torch.manual_seed(0)
    vlm = VLM(load_llm("tiny", random_init=LLAMA, dtype=torch.float32), vision=None, projector=None)
    apply_tuning(vlm, tune_plan("llm", request.param.split()[0], METHODS[request.param]))
    disturb(vlm)
    return vlm.eval().requires_grad_(False)


def shared_row(vlm):
    """The prompts in one row; the first two share a node."""
    ids = torch.tensor([3, 4, 5, 6, 7, 9, 11, 12])
    nodes = torch.tensor([[0, 3, -1], [3, 2, 0], [5, 1, 0], [6, 2, -1]])
    positions = torch.tensor([0, 1, 2, 3, 4, 3, 0, 1])
    return Prompts(vlm.word_embeddings[ids], positions, nodes, torch.tensor([4, 5, 7]))


def single(vlm, ids):
    length = len(ids)
    return Prompts(
        vlm.word_embeddings[torch.tensor(ids)],
        torch.arange(length),
        torch.tensor([[0, length, -1]]),
        torch.tensor([length - 1]),
    )


def slowly(vlm, ids, count):
    """Greedy answer that computes everything anew for each token."""
    ids = list(ids)
    for _ in range(count):
        row = single(vlm, ids)
        logits = vlm.row_logits(row.embeddings, positions=row.positions, nodes=row.nodes, at=row.predict_at)
        ids.append(int(logits[0].argmax()))
    return ids[-count:]


def test_cached_and_batched_equals_computed_anew(vlm):
    able = decoding.support(vlm.llm)
    assert able.batched and able.shared
    expected = [slowly(vlm, ids, 6) for ids in PROMPTS]
    for rows in ([shared_row(vlm)], [single(vlm, ids) for ids in PROMPTS]):
        state = decoding.prefill(vlm.llm, rows, support=able)
        assert decoding.decode(vlm.llm, state, limits=[6] * 3, end_ids=()) == expected


def test_a_model_that_is_not_batched_decodes_the_same(vlm):
    alone = decoding.Support(batched=False, shared=False)
    for ids in PROMPTS:
        state = decoding.prefill(vlm.llm, [single(vlm, ids)], support=alone)
        assert decoding.decode(vlm.llm, state, limits=[6], end_ids=()) == [slowly(vlm, ids, 6)]


def test_a_soft_prompt_takes_room_and_a_prefix_does_not(vlm):
    taken = 3 if hasattr(vlm.llm, "mmit_prompt") else 0
    assert context_length(vlm.llm) == LLAMA["max_position_embeddings"] - taken


def test_a_prefix_works_without_packing():
    torch.manual_seed(0)
    vlm = VLM(load_llm("tiny", random_init=LLAMA, dtype=torch.float32, packed=False), vision=None, projector=None)
    apply_tuning(vlm, tune_plan("llm", "prefix"))
    assert vlm.llm.config._attn_implementation == NAME
