"""Packed == alone, nothing leaks, prefixes shared or not give the same loss."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.packing import Sample, build_row
from mmit.errors import ModelError
from mmit.models import attention, attention_plan
from mmit.models.llm import load_llm
from mmit.models.vlm import VLM
from tests.examples import examples
from tests.models.small_llms import described

LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(0)
    return load_llm("tiny", random_init=LLAMA, dtype=torch.float32)


def sample(rng: random.Random, *, prefix=(), length=9, record=0) -> Sample:
    ids = [*prefix, *(rng.randrange(1, 50) for _ in range(length))]
    supervised = [False] * (len(ids) - 3) + [True] * 3
    return Sample(tuple(ids), tuple(supervised), (), record)


def row_losses(llm, samples, *, share, vlm=None):
    row = build_row(samples, share=share)
    vlm = vlm or VLM(llm, vision=None, projector=None)
    losses = vlm(
        input_ids=row.input_ids,
        positions=row.positions,
        nodes=row.nodes,
        predict_at=row.predict_at,
        targets=row.targets,
        image_positions=row.image_positions,
        image_index=torch.zeros(0, dtype=torch.int64),
        image_tokens=0,
    )
    return losses, row


def reference_losses(llm, s: Sample):
    """The record alone, through transformers' own SDPA attention."""
    llm.config._attn_implementation = "sdpa"
    try:
        logits = llm(input_ids=torch.tensor([s.ids])).logits[0]
    finally:
        llm.config._attn_implementation = attention.NAME
    every = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(s.ids[1:]), reduction="none")
    return every[torch.tensor(s.supervised[1:])]


def many(rng, *, shared):
    trunk = [rng.randrange(1, 50) for _ in range(6)]
    out = []
    for r in range(12):
        prefix = trunk[: rng.randrange(2, 7)] if shared else []
        out.append(sample(rng, prefix=prefix, length=rng.choice([4, 5, 9, 20, 150]), record=r))
    return out


@pytest.mark.parametrize("share", [True, False])
def test_packed_equals_alone(llm, share):
    samples = many(random.Random(1), shared=True)
    losses, row = row_losses(llm, samples, share=share)
    alone = torch.cat([reference_losses(llm, s) for s in samples])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=0)
    assert len(row.targets) == 3 * len(samples)


@pytest.mark.parametrize("long", [attention_plan.LONE - 1, attention_plan.LONE + 40])
def test_a_long_node_below_another_sees_it(llm, long):
    """Alone in its bucket, where a long node without ancestors needs no mask."""
    rng = random.Random(6)
    trunk = [rng.randrange(1, 50) for _ in range(6)]
    samples = [sample(rng, prefix=trunk, length=length, record=r) for r, length in enumerate((4, long))]
    losses, row = row_losses(llm, samples, share=True)
    assert max(row.nodes[:, 1].tolist()) > long - 10
    alone = torch.cat([reference_losses(llm, s) for s in samples])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=0)


def test_sharing_takes_fewer_tokens_and_gives_the_same_gradient(llm):
    samples = many(random.Random(2), shared=True)
    gradients, lengths = [], []
    for share in (True, False):
        llm.zero_grad()
        losses, row = row_losses(llm, samples, share=share)
        losses.sum().backward()
        gradients.append([p.grad.clone() for p in llm.parameters() if p.grad is not None])
        lengths.append(len(row.input_ids))
    assert lengths[0] < lengths[1]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_neighbour_changes_nothing_at_all(llm):
    rng = random.Random(3)
    first, second, other = (sample(rng, length=12, record=r) for r in range(3))
    a, _ = row_losses(llm, [first, second], share=True)
    b, _ = row_losses(llm, [first, other], share=True)
    assert torch.equal(a[:3], b[:3])


def test_no_gradient_flows_between_records(llm):
    rng = random.Random(4)
    first, second = sample(rng, length=10, record=0), sample(rng, length=14, record=1)
    row = build_row([first, second])
    vlm = VLM(llm, vision=None, projector=None)
    embeddings = llm.get_input_embeddings()(row.input_ids).detach().requires_grad_(True)
    logits = vlm.row_logits(embeddings, positions=row.positions, nodes=row.nodes, at=row.predict_at)
    logits[row.target_records == 0].sum().backward()
    split = len(first.ids) - 1
    assert embeddings.grad[:split].abs().sum() > 0
    assert embeddings.grad[split:].abs().max() == 0.0


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(0, 10**6))
def test_any_forest(seed):
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=LLAMA | {"num_hidden_layers": 1}, dtype=torch.float32)
    rng = random.Random(seed)
    words = [[rng.randrange(1, 4) for _ in range(rng.randrange(4, 9))] for _ in range(rng.randrange(1, 8))]
    samples = [
        Sample(tuple(w), (False, *[rng.random() < 0.5 for _ in w[1:-1]], True), (), i) for i, w in enumerate(words)
    ]
    losses, _ = row_losses(llm, samples, share=True)
    alone = torch.cat([reference_losses(llm, s) for s in samples])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=0)


def test_every_path_of_the_bucket_code_agrees(llm, monkeypatch):
    samples = many(random.Random(5), shared=True)
    written_out, _ = row_losses(llm, samples, share=True)
    monkeypatch.setattr(attention, "SMALL", 0)
    fused, _ = row_losses(llm, samples, share=True)
    torch.testing.assert_close(written_out, fused, atol=1e-5, rtol=0)


def test_what_packed_rows_would_get_wrong_is_found_out_before_training():
    torch.manual_seed(0)
    options = described(LLAMA, {"model_type": "bloom", "n_head": 2, "n_layer": 1})
    vlm = VLM(load_llm("tiny", random_init=options, dtype=torch.float32), vision=None, projector=None).train()
    with pytest.raises(ModelError, match="data.packing=false"):
        vlm.check_isolation()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text"])
def test_common_architectures_pass_the_isolation_check(model_type, dtype):
    torch.manual_seed(0)
    options = described(LLAMA | {"head_dim": 4}, {"model_type": model_type, "pad_token_id": 0})
    VLM(load_llm("tiny", random_init=options, dtype=dtype), vision=None, projector=None).check_isolation()
