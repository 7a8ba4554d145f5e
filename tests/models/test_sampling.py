"""Drawing tokens: the same seed draws the same, in the proportions that the logits say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmit.errors import ConfigError
from mmit.models.sampling import Sampling, choose
from tests.models.test_decoding import (
    answer,
    model,
    samples,
)

SAMPLINGS = [Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(1.5, top_k=5), Sampling(1.2, 0.9, 20, seed=3)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling_depends_on_seed_and_prompt_alone(sampling: Sampling) -> None:
    llm = model()
    together = answer(llm, samples(), 10, sampling=sampling)
    assert together == answer(llm, samples(), 10, sampling=sampling)
    for n, sample in enumerate(samples()):
        assert answer(llm, [sample], 10, sampling=sampling) == [together[n]]
    assert together[1] != together[3]  # the same prompt, another number
    other = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, seed=sampling.seed + 1)
    assert answer(llm, samples(), 10, sampling=other) != together


def frequencies(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    draw = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, seed=1).generator(0)
    chosen = choose(logits.expand(4000, -1), sampling, [draw] * 4000)
    return torch.bincount(torch.tensor(chosen), minlength=logits.shape[-1]) / 4000


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0, 0.0])
    torch.testing.assert_close(frequencies(Sampling(1.0), logits), logits.softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(Sampling(2.0), logits), (logits / 2).softmax(-1), atol=0.03, rtol=0)
    top_k = frequencies(Sampling(1.0, top_k=2), logits)
    assert top_k.nonzero().flatten().tolist() == [0, 3]
    # Probabilities 0.56, 0.21, 0.12, ...: the two largest make 0.77, so the third is the one that passes 0.8.
    top_p = frequencies(Sampling(1.0, top_p=0.8), logits)
    assert top_p.nonzero().flatten().tolist() == [0, 2, 3]
    kept = logits.softmax(-1)[[0, 2, 3]]
    torch.testing.assert_close(top_p[[0, 2, 3]], kept / kept.sum(), atol=0.03, rtol=0)
    assert frequencies(Sampling(1.0, top_p=1e-6), logits)[0] == 1
    # Tokens that a model rules out stay out.
    assert frequencies(Sampling(1.0), torch.tensor([0.0, float("-inf"), 0.0]))[1] == 0


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)
