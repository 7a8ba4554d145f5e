"""The next token of every answer in a batch is the one it would get alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.models.sampling import NOT_FINITE, Sampling, choose
from mmit.serve.answering import Ask
from mmit.serve.lane import PART, PART_ELSEWHERE, Lane, chosen_of, joining_of, logprobs_of, part_of
from tests.data.small_tokenizers import family

WAYS = [
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(1.0, seed=4),
    Sampling(0.7, top_p=0.9),
    Sampling(),
    Sampling(0.7, top_p=0.9, top_k=2),
    Sampling(0.7, top_p=0.9, seed=9),
]


def answer(sampling: Sampling, number: int, logprobs: int | None = None) -> Any:
    told = SimpleNamespace(ask=Ask("tiny", prompt="x", logprobs=logprobs))
    return SimpleNamespace(sampling=sampling, draw=sampling.generator(number), answering=told)


@pytest.mark.parametrize("ways", [WAYS, [WAYS[1]] * 4, WAYS[:1]], ids=["mixed", "alike", "one"])
def test_answers_are_drawn_as_each_alone(ways: list[Sampling]) -> None:
    rows = torch.randn(20, len(ways), 40, generator=torch.Generator().manual_seed(0)) * 3
    together, alone = ([answer(way, n) for n, way in enumerate(ways)] for _ in range(2))
    for logits in rows:
        expected = [choose(logits[n : n + 1], a.sampling, [a.draw])[0] for n, a in enumerate(alone)]
        assert chosen_of(together, logits) == expected


def test_logits_that_are_not_finite_fail_their_own_answer_alone() -> None:
    logits = torch.randn(len(WAYS), 40, generator=torch.Generator().manual_seed(0))
    whole = chosen_of([answer(way, n) for n, way in enumerate(WAYS)], logits)
    logits[3, 7] = float("nan")
    broken = chosen_of([answer(way, n) for n, way in enumerate(WAYS)], logits)
    assert broken == [NOT_FINITE if n == 3 else token for n, token in enumerate(whole)]


def test_logprobs_are_the_distribution_s_own_and_given_where_they_were_asked_for() -> None:
    tokenizer = family("byte_level")
    logits = torch.randn(5, len(tokenizer), generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    hot = Sampling(2.0, top_k=1)  # how it is drawn changes nothing
    answers = [answer(hot, n, count) for n, count in enumerate((None, 0, 3, 10**6, 2))]
    lane = Lane(SimpleNamespace(tokenizer=tokenizer, end_ids=(1,)), None, None, None, answers)  # type: ignore[arg-type]
    chosen = [5, 6, 7, 8, NOT_FINITE]
    found = logprobs_of(lane, logits, chosen)
    assert found.keys() == {1, 2, 3}
    for place, told in found.items():
        row = logits[place].double().softmax(-1).log()
        assert told.logprob == pytest.approx(float(row[chosen[place]]), abs=1e-5)
        assert [top.logprob for top in told.top] == pytest.approx(row.sort(descending=True).values[: len(told.top)])
    assert [len(found[place].top) for place in (1, 2, 3)] == [0, 3, len(tokenizer)]


def test_a_lane_for_those_that_join_has_an_empty_batch_of_the_same_model() -> None:
    model: Any = SimpleNamespace(end_ids=(3, 4), vlm=SimpleNamespace(device=torch.device("cpu")))
    lane = Lane(model, object(), object(), object(), [answer(WAYS[0], 0)], fed=[7])  # type: ignore[arg-type]
    joining = joining_of(lane, [answer(WAYS[0], 1)])
    assert joining.model is model and joining.features is lane.features and joining.prefixes is lane.prefixes
    assert joining.ends == (3, 4) and joining.state is None and joining.fed == [] and joining.coming is None
    assert len(joining.answers) == 1 and part_of(model) == PART["cpu"]
    model.vlm.device = torch.device("meta")
    assert part_of(model) == PART_ELSEWHERE
