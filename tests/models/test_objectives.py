"""The loss over choices: by hand for two of one token, by brute force for any, and gradients by autograd."""

from __future__ import annotations

import pytest
import torch

from mmit.models.objectives import choice_losses

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
