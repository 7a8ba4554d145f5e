"""What a step minimises where it is not the mean over tokens: losses of tokens in, losses of records out.

Dimensions: S supervised targets of a row, B samples in it, G records, K choices of a record.
"""

from __future__ import annotations

import torch


def sums(losses: torch.Tensor, samples: torch.Tensor, *, count: int) -> torch.Tensor:
    """Sum losses (S,) by sample: (count,). `samples` (S,) says whose each is.

    A selection and not `index_add`, whose sum depends on the order of its threads on CUDA.
    """
    chosen = samples == torch.arange(count, device=losses.device)[:, None]  # (count, S)
    return torch.where(chosen, losses, 0).sum(1)


def choice_losses(
    losses: torch.Tensor,
    samples: torch.Tensor,
    *,
    choices: torch.Tensor,
    shares: torch.Tensor,
    questions: torch.Tensor,
    lm: float,
    temperature: float,
) -> torch.Tensor:
    """Cross-entropy over the choices of each record, plus a small part of the loss on its question (arXiv:2001.07676).

    The score of a choice is its log-probability, summed over its tokens and the one that ends it. With temperature T
    the scores are divided by T and the loss is multiplied by T squared, as in distillation.

    Args:
        losses: (S,) cross-entropies of tokens. samples: (S,) which sample each belongs to.
        choices: (G, K) the samples of each record, -1 behind the last. shares: (G, K), 0 there; they sum to 1.
        questions: (G,) the sample with loss on the question, -1 for none.
        lm: part of the mean loss on the question, 0 to 1; 1 - lm is that of the cross-entropy.

    Returns:
        (G,)
    """
    count = int(choices.shape[0] * choices.shape[1] + questions.shape[0])  # as many samples at most
    total = sums(losses, samples, count=count)
    scores = torch.where(choices < 0, -torch.inf, -total[choices.clamp_min(0)]) / temperature
    # `where`: a share of 0 on a choice that is not there is 0 and not NaN.
    weighed = torch.where(choices < 0, 0, shares * scores.log_softmax(1))
    found = -weighed.sum(1) * temperature**2
    if lm == 0:
        return found
    tokens = sums(torch.ones_like(losses), samples, count=count)
    at = questions.clamp_min(0)
    mean = torch.where(questions < 0, 0, total[at] / tokens[at].clamp_min(1))
    return (1 - lm) * found + lm * mean
