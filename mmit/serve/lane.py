"""A model that an engine serves, and the batch of answers it writes: choosing the next token of each.

Owns what belongs to one model: its batch, the prompt that is run in parts, what it remembers of pictures and of
beginnings. Takes logits, gives token ids and log-probabilities. Knows no queue and no thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mmit.data.answers import token_text
from mmit.models.sampling import NOT_FINITE, try_choose
from mmit.serve.answering import Answer, TokenLogprob

if TYPE_CHECKING:
    import torch

    from mmit.generate import Model
    from mmit.models import decoding
    from mmit.models.prefix_cache import PrefixCache
    from mmit.pictures import FeatureMemory

# Tokens of prompts that are run between two steps of decoding at most: meanwhile the answers that run wait.
PART = {"cpu": 256}
PART_ELSEWHERE = 1024  # a device that computes many tokens in the time of a few


class Coming(NamedTuple):
    """An answer whose prompt is run in parts, between steps of decoding; `parts` gives None until the last one."""

    answer: Answer
    parts: Iterator[tuple[decoding.State, int] | None]


@dataclass(slots=True)
class Lane:
    """A model and its batch: place n of the state works for answer n, whose last token it has not been fed yet."""

    model: Model
    features: FeatureMemory
    prefixes: PrefixCache
    state: decoding.State | None = None
    answers: list[Answer] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    coming: Coming | None = None
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.ends = self.model.end_ids


def joining_of(lane: Lane, answers: Sequence[Answer]) -> Lane:
    """Answers of a model that are not in its batch yet."""
    return Lane(lane.model, lane.features, lane.prefixes, None, list(answers))


def part_of(model: Model) -> int:
    """How many tokens of prompts are run between two steps of decoding."""
    return PART.get(model.vlm.device.type, PART_ELSEWHERE)


def chosen_of(answers: Sequence[Answer], logits: torch.Tensor) -> list[int]:
    """The next token of each answer, by its own way to draw; NOT_FINITE where its logits are not."""
    groups: dict[tuple[float, float, int], list[int]] = {}
    for place, answer in enumerate(answers):
        way = answer.sampling
        groups.setdefault((way.temperature, way.top_p, way.top_k), []).append(place)
    found = [NOT_FINITE] * len(answers)
    for places in groups.values():
        rows = logits if len(places) == len(answers) else logits[places]
        draws = [answers[place].draw for place in places]
        for place, token in zip(places, try_choose(rows, answers[places[0]].sampling, draws), strict=True):
            found[place] = token
    return found


def logprobs_of(lane: Lane, logits: torch.Tensor, chosen: Sequence[int]) -> dict[int, TokenLogprob]:
    """By place, the log-probability of the chosen token where it was asked for, and of the likeliest beside it."""
    found = {}
    for place, (answer, token) in enumerate(zip(lane.answers, chosen, strict=True)):
        count = answer.answering.ask.logprobs
        if count is None or token == NOT_FINITE:
            continue
        row = logits[place].float().log_softmax(-1)
        best = row.topk(min(count, len(row)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple(TokenLogprob(*token_text(lane.model.tokenizer, n), value) for n, value in pairs)
        found[place] = TokenLogprob(*token_text(lane.model.tokenizer, token), float(row[token]), top)
    return found
