"""Selection (AlpaGasus: Chen et al. 2023, arXiv:2307.08701): the best records by a score, unlike each other.

In: records. Out: those that are kept, with their score in `meta.build`, and the reason why the others are not. A score
is a judge's number or the mean loss of a model on the answers. On request, a random choice of the same size from the
same records comes beside it: without it nobody can tell what the score was good for. The judge's terms do not reach the
records, since none of its words do.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmit.build.annotated import Dropped, Made
from mmit.build.parsers import COLON
from mmit.build.replies import finish_problem
from mmit.data.diversity import RougePool
from mmit.data.image_identity import image_name
from mmit.data.lint.near_duplicates import TextSignatures
from mmit.errors import ConfigError
from mmit.teachers import Desk, Draw, Reply, Request
from mmit.teachers.request import user

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mmit.records import Record

_SCORE = re.compile(rf"(?i)\b(?:score|rating)\s*{COLON}?\s*\**\s*(-?\d+(?:\.\d+)?)")
_BARE = re.compile(r"^\W*(-?\d+(?:\.\d+)?)\b")


@dataclass(frozen=True)
class Keep:
    """What is kept.

    Attributes:
        least, most: bounds of the score, themselves allowed.
        share, number: of the scored records, the best so many; the smaller of both.
        highest: whether a higher score is a better one.
        rouge_l: highest ROUGE-L of a prompt with one that is kept already; None for no such limit.
        near_duplicates: whether conversations that share most of their word triples may stay together.
    """

    least: float | None = None
    most: float | None = None
    share: float | None = None
    number: int | None = None
    highest: bool = True
    rouge_l: float | None = None
    near_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(f"is {self.share}", where="keep.share", remedy="Give a number above 0, at most 1.")
        if self.number is not None and self.number < 1:
            raise ConfigError(f"is {self.number}", where="keep.number", remedy="Give 1 or more.")
        if self.rouge_l is not None and not 0 < self.rouge_l <= 1:
            raise ConfigError(f"is {self.rouge_l}", where="diversity.rouge_l", remedy="Give a number, such as 0.7.")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ConfigError(f"least {self.least} is above most {self.most}", where="keep", remedy="Swap them.")


@dataclass(frozen=True)
class Scored:
    """A record and its score; `reason` says why it has none, "" if it has or none was asked for."""

    record: Record
    score: float | None = None
    reason: str = ""
    reply: Reply | None = None


def judge_request(record: Record, draw: Draw, scale: tuple[float, float]) -> Request:
    """Return what a judge is asked about a record: its images and its turns as text."""
    low, high = scale
    names = {"user": "Instruction", "assistant": "Answer", "system": "Setting", "tool": "Result of a tool"}
    said = "\n\n".join(f"{names[turn.role]}:\n{turn.text}" for turn in record.turns)
    about = "The images above belong to it. " if record.images else ""
    order = (
        f"Rate the answers of an assistant on a scale from {low:g} to {high:g}, {high:g} for answers that are right, "
        f"complete and do what the instruction asks. {about}Begin your reply with Score: and the number."
    )
    return Request(user(*record.images, f"{order}\n\n{said}"), draw, "judge")


def judged(records: Sequence[Record], desk: Desk, draw: Draw, scale: tuple[float, float]) -> list[Scored]:
    """Score records by a judge.

    Args:
        records: to be scored. desk: asks the judge. draw: how its tokens are drawn. scale: least and highest score.

    Raises:
        MmitError: what `Desk.ask` raises.
    """
    replies = desk.ask([judge_request(record, draw, scale) for record in records])
    return [Scored(r, *score_in(reply, scale), reply) for r, reply in zip(records, replies, strict=True)]


def score_in(reply: Reply, scale: tuple[float, float]) -> tuple[float | None, str]:
    """Return the number of a judge's reply, or None and the reason it cannot be used."""
    # What follows the number may be cut off: the number stands first.
    if reply.finish not in ("stop", "length"):
        return None, finish_problem(reply)
    found = _SCORE.findall(reply.text) or _BARE.findall(reply.text)
    if not found:
        return None, "no score in the judge's reply"
    if len({float(number) for number in found}) > 1:
        return None, "several scores in the judge's reply"
    score = float(found[0])
    return (score, "") if scale[0] <= score <= scale[1] else (None, "a score off the scale")


def loss_requests(record: Record) -> list[Request]:
    """Return a request for each answer of a record: its likelihood, nothing is drawn."""
    answers = [n for n, turn in enumerate(record.turns) if turn.role == "assistant" and turn.text.strip()]
    return [Request(record.turns[: n + 1], Draw(max_tokens=0), "loss") for n in answers]


def losses(records: Sequence[Record], desk: Desk) -> list[Scored]:
    """Score records by the model's mean loss per token of their answers, in nats. Raises what `Desk.ask` raises."""
    sent = [loss_requests(record) for record in records]
    replies = iter(desk.ask([request for requests in sent for request in requests]))
    scored = []
    for record, requests in zip(records, sent, strict=True):
        own = [next(replies) for _ in requests]
        if reason := next((problem for reply in own if (problem := finish_problem(reply))), ""):
            scored.append(Scored(record, None, reason, own[-1]))
            continue
        found = [json.loads(reply.text) for reply in own]
        tokens = sum(one["tokens"] for one in found)
        if not tokens:
            scored.append(Scored(record, None, "no answer to score"))
            continue
        loss = sum(one["loss"] * one["tokens"] for one in found) / tokens
        scored.append(Scored(record, round(loss, 6), "", own[-1]))
    return scored


def select(scored: Sequence[Scored], keep: Keep) -> Iterator[Made | Dropped]:
    """Yield the kept records and what is dropped, in the order given. Ties go to the earlier record."""
    reasons = [one.reason or _out_of_bounds(one.score, keep) for one in scored]
    # A share is one of all that have a score, bounds or not: the control is drawn from the same.
    usable = [n for n, one in enumerate(scored) if not one.reason]
    sign = -1 if keep.highest else 1
    order = sorted(
        (n for n, reason in enumerate(reasons) if not reason), key=lambda n: (sign * (scored[n].score or 0), n)
    )
    limit = len(scored) if keep.number is None else keep.number
    if keep.share is not None:
        limit = min(limit, int(keep.share * len(usable)))
    unlike = _Unlike(keep, [scored[n].record for n in order])
    taken = 0
    # From the best down, so that of two that are alike the better one stays.
    for place, n in enumerate(order):
        if taken >= limit:
            reasons[n] = "not among the best"
        elif not (reason := unlike.problem(place)):
            taken += 1
        else:
            reasons[n] = reason
    for one, reason in zip(scored, reasons, strict=True):
        if reason:
            name = one.reply.id if one.reply else ""
            yield Dropped(_task(one.record), one.record.where, name, reason, _prompt(one.record)[:500])
        else:
            yield _made(one)


def control(scored: Sequence[Scored], count: int, *, seed: int) -> Iterator[Made]:
    """Yield a random choice of `count` of the records that have a score, in the order given."""
    usable = [n for n, one in enumerate(scored) if not one.reason]
    for n in sorted(random.Random(f"{seed}|control").sample(usable, min(count, len(usable)))):
        yield _made(scored[n])


class _Unlike:
    """Tells whether a record is too near to one that was kept before it. Only records of the same images are compared:
    a question that is asked about two images is two questions.
    """

    def __init__(self, keep: Keep, records: Sequence[Record]) -> None:
        self._limit, self._records = keep.rouge_l, records
        self._pools: dict[str, RougePool] = {}
        self._kept: set[int] = set()
        self._pairs: dict[int, int] = {}
        if keep.near_duplicates:
            signatures = TextSignatures()
            for record in records:
                key = int.from_bytes(hashlib.sha256(_image_key(record).encode()).digest()[:8], "big")
                signatures.add("\n".join(turn.text for turn in record.turns), key=key)
            self._pairs = signatures.pairs()

    def problem(self, place: int) -> str:
        """Return why the record at `place` is not kept; "" keeps it. Call it for each place in turn."""
        if self._pairs.get(place) in self._kept:
            return "a near duplicate of a better one"
        if self._limit is not None:
            pool = self._pools.setdefault(_image_key(self._records[place]), RougePool())
            prompt = _prompt(self._records[place])
            if pool.nearest(prompt) > self._limit:
                return "too near to a better one (ROUGE-L)"
            pool.add(prompt)
        self._kept.add(place)
        return ""


def _image_key(record: Record) -> str:
    return "|".join(image_name(image) for image in record.images)


def _out_of_bounds(score: float | None, keep: Keep) -> str:
    if score is None:
        return ""
    if keep.least is not None and score < keep.least:
        return "the score is too low"
    return "the score is too high" if keep.most is not None and score > keep.most else ""


def _prompt(record: Record) -> str:
    return next((turn.text for turn in record.turns if turn.role == "user"), "")


def _task(record: Record) -> str:
    return str(record.meta.get("task") or record.source or "selected")


def _made(one: Scored) -> Made:
    build: dict[str, Any] = {"how": "given", **(one.record.meta.get("build") or {}), "score": one.score}
    if one.reply is not None:
        build |= {"scored_by": one.reply.teacher, "score_request": one.reply.id}
    return Made(_task(one.record), replace(one.record, meta={**one.record.meta, "build": build}), False)


def with_licence(records: Iterable[Record], licence: str | None) -> list[Record]:
    """Return the records, those without a licence with this one."""
    return [record if record.licence else replace(record, licence=licence) for record in records]
