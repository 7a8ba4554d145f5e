"""The chunked head: loss and gradients of the whole one, bounded logits, models that cannot be split."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmit.models.head import choice_losses, cross_entropy, split_head
from mmit.models.llm import load_llm
from mmit.models.vlm import VLM

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


class Largest(TorchDispatchMode):
    """Most entries in any tensor that an operator makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.numel())
        return out


def case(*, positions=500, trained, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(8, 1000, bias=bias, dtype=dtype).requires_grad_(trained)
    hidden = torch.randn(positions, 8).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, 1000, (positions,)), torch.rand(positions)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(trained, bias):
    results = []
    for chunk_logits in (1 << 30, 64_000):
        hidden, head, targets, weights = case(trained=trained, bias=bias)
        if chunk_logits == 1 << 30:
            losses = F.cross_entropy(head(hidden), targets, reduction="none")
        else:
            losses = cross_entropy(hidden, head, targets, chunk_logits=chunk_logits)
        (losses * weights).sum().backward()  # positions weigh differently
        results.append([losses.detach(), hidden.grad, *([p.grad for p in head.parameters()] if trained else [])])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_logits_never_exceed_a_chunk(trained):
    hidden, head, targets, _ = case(trained=trained)
    with Largest() as largest:
        cross_entropy(hidden, head, targets, chunk_logits=64_000).sum().backward()
    assert largest.entries == 64_000 < 500 * 1000


def test_bf16_stays_within_its_rounding():
    hidden, head, targets, _ = case(trained=False, dtype=torch.bfloat16)
    cross_entropy(hidden, head, targets, chunk_logits=64_000).sum().backward()
    gradient, hidden.grad = hidden.grad, None
    F.cross_entropy(head(hidden).float(), targets, reduction="none").sum().backward()
    torch.testing.assert_close(gradient, hidden.grad, rtol=2e-2, atol=2e-3)


def row_losses(vlm):
    words = vlm.word_embeddings.detach()[torch.arange(12)].requires_grad_()
    nodes, places = torch.tensor([[0, 6, -1], [6, 6, -1]]), torch.tensor([2, 3, 9, 11])
    given = {"positions": torch.arange(12) % 6, "nodes": nodes, "at": places}
    losses = vlm.row_losses(words, targets=torch.tensor([1, 2, 3, 4]), **given)
    whole = F.cross_entropy(vlm.row_logits(words, **given).float(), torch.tensor([1, 2, 3, 4]), reduction="none")
    grads = [torch.autograd.grad(x.sum(), words, retain_graph=True)[0] for x in (losses, whole)]
    return (losses, *grads[:1]), (whole, *grads[1:])


@pytest.mark.parametrize("adapted", ["no", "body", "head"])
def test_a_row_has_the_losses_of_its_logits(adapted):
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init={"model_type": "llama", **SMALL, **HEADS}, dtype=torch.float32)
    llm.requires_grad_(False)
    if adapted != "no":
        targets = ["q_proj", "lm_head"] if adapted == "head" else ["q_proj"]
        llm = get_peft_model(llm, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    vlm = VLM(llm, vision=None, projector=None)
    assert vlm.split() is not None
    for ours, whole in zip(*row_losses(vlm), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "cohere", **SMALL, **HEADS},  # scales its logits
        {"model_type": "granite", **SMALL, **HEADS, "logits_scaling": 3.0},
        {"model_type": "gemma2", **SMALL, **HEADS, "head_dim": 8, "attn_logit_softcapping": None},  # caps them
    ],
    ids=lambda config: config["model_type"],
)
def test_logits_that_are_more_than_the_head_are_left_to_the_model(config):
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=config, dtype=torch.float32)
    assert split_head(llm) is None
    for ours, whole in zip(*row_losses(VLM(llm, vision=None, projector=None)), strict=True):
        torch.testing.assert_close(ours, whole)


NONE = torch.tensor([-1])


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def test_two_choices_of_one_token_are_the_difference_of_their_logits() -> None:
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).double()
    losses = losses_of(logits.expand(2, 5), torch.tensor([1, 3]))
    found = choice_losses(
        losses,
        torch.tensor([0, 1]),
        choices=torch.tensor([[0, 1]]),
        shares=torch.tensor([[1.0, 0.0]]),
        questions=NONE,
        lm=0.0,
        temperature=1.0,
    )
    expected = -torch.nn.functional.logsigmoid(logits[0, 1] - logits[0, 3])
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("lm", [0.0, 0.25])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_choices_of_many_tokens_equal_brute_force_with_gradients(lm: float, temperature: float) -> None:
    # Record 0: choices of 1, 3 and 2 tokens, a question of 4; record 1: two choices, no question.
    lengths = [1, 3, 2, 4, 2, 1]
    samples = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    start = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    choices = torch.tensor([[0, 1, 2], [4, 5, -1]])
    shares = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0]], dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    options = {"questions": torch.tensor([3, -1]), "lm": lm, "temperature": temperature}
    found = choice_losses(ours, samples, choices=choices, shares=shares, **options)
    pieces = theirs.split(lengths)
    expected = []
    for kept, weights, question in (((0, 1, 2), shares[0], 3), ((4, 5), shares[1, :2], None)):
        scores = torch.stack([-pieces[n].sum() for n in kept]) / temperature
        loss = -(weights * (scores - torch.logsumexp(scores, 0))).sum() * temperature**2
        asked = pieces[question].mean() if question is not None else 0.0
        expected.append((1 - lm) * loss + lm * asked)
    assert torch.allclose(found, torch.stack(expected), atol=1e-12)
    found.sum().backward()
    torch.stack(expected).sum().backward()
    assert torch.isfinite(ours.grad).all() and torch.allclose(ours.grad, theirs.grad, atol=1e-12)
