"""Metrics that need a judge: MM-Vet (a share of the reference per answer), LLaVA-Bench (two answers compared).

In: answers, references, and a teacher (`mmit.teachers`), which owns retries and pace. Out: a Score; every judgement is
appended to a file with its prompt, and one on file is not asked for again. The wording is mmit's own: give the
published one as `prompt` for comparison with published numbers. A judgement without a number is asked for again and
then an error, never a zero.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.errors import ConfigError, MmitError
from mmit.eval.metrics.score import Score, check_lengths, mean_score, need, options_of, split
from mmit.io import append
from mmit.records import json_lines
from mmit.teachers.desk import Account, priced
from mmit.teachers.request import Draw, Request, user

if TYPE_CHECKING:
    from mmit.teachers.request import Teacher

TRIES = 3
_NUMBER = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?)(?![\d.])")
_PAIR = re.compile(r"^\s*(\d+(?:\.\d+)?)[\s,/]+(\d+(?:\.\d+)?)\s*$")

_MMVET = """Compare the prediction with the ground truth and give a correctness between 0.0 (totally wrong) and 1.0
(totally right), in steps of 0.1. "<AND>" in the ground truth means that the prediction is right only if it has all of
the parts; "<OR>" means that one of them suffices. Judge what is said, not how.

Question: {question}
Ground truth: {answer}
Prediction: {prediction}

Reply with the number alone.
Correctness:"""

_LLAVA = """Two AI assistants answered a question about a picture that you cannot see; it is described to you.

[Description]
{context}

[Question]
{question}

[Assistant 1]
{answer}
[End of Assistant 1]

[Assistant 2]
{prediction}
[End of Assistant 2]

Rate helpfulness, relevance, accuracy and level of detail of each answer by an overall score from 1 to 10, higher being
better. Do not let the order of the answers influence you. On the first line write only the two scores, of assistant 1
and then of assistant 2, separated by a space. After that, explain.
"""


def _share(text: str) -> list[float] | None:
    found = _NUMBER.findall(text.strip().splitlines()[0]) if text.strip() else []
    return [float(found[-1])] if found else None


def _two(text: str) -> list[float] | None:
    found = _PAIR.match(text.strip().splitlines()[0]) if text.strip() else None
    scores = [float(number) for number in found.groups()] if found else []
    return scores if scores and all(1 <= score <= 10 for score in scores) else None


@dataclass(frozen=True, slots=True)
class Rubric:
    """What a judge is asked, and how its reply is read. `keys` are those that a reference must have."""

    prompt: str
    keys: tuple[str, ...]
    read: Callable[[str], list[float] | None]


JUDGES: dict[str, Rubric] = {
    "judge:mmvet": Rubric(_MMVET, ("question", "answer", "capability"), _share),
    "judge:llava_bench": Rubric(_LLAVA, ("question", "context", "answer", "category"), _two),
}


def check_judged(name: str, reference: Any, *, where: str) -> None:
    """Raise MmitError if a reference has not what the judge `name` is told of a question."""
    need(reference, JUDGES[name].keys, where=where)
    if "capability" in JUDGES[name].keys:
        options_of(reference["capability"], where=f"{where}: capability")


class Judge:
    """A metric that asks a judge; called like those in METRICS.

    Args:
        name: which of JUDGES.
        teacher: who judges.
        path: JSONL file of the judgements.
        judge: the judge's name, kept with each judgement; another's judgements are not taken.
        prompt: wording in place of JUDGES' own, with {question}, {answer}, {prediction} (and {context}).

    Attributes:
        account: requests, attempts and tokens of the judge so far.
    """

    def __init__(self, name: str, teacher: Teacher, *, path: Path, judge: str, prompt: str | None = None) -> None:
        self.name, self.teacher, self.path, self.judge = name, teacher, path, judge
        self.rubric, self.prompt = JUDGES[name], prompt or JUDGES[name].prompt
        self.account = Account()
        if "{prediction}" not in self.prompt:
            raise ConfigError("the judge's prompt has no {prediction}", where=name, remedy="Say where it goes.")

    def __call__(
        self,
        predictions: Sequence[str],
        references: Sequence[Mapping[str, Any]],
        *,
        groups: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Score:
        """Judge what is not on file, and score. Raises MmitError."""
        check_lengths(self.name, predictions, references=references)
        keys: list[str] = []
        prompts: dict[str, str] = {}
        for prediction, reference in zip(predictions, references, strict=True):
            check_judged(self.name, reference, where=self.name)
            asked = self._asked(prediction, reference)
            keys.append(hashlib.sha256(f"{self.judge}\0{asked}".encode()).hexdigest()[:24])
            prompts[keys[-1]] = asked
        done = self._on_file()
        done |= self._ask({key: asked for key, asked in prompts.items() if key not in done})
        given = [done[key] for key in keys]
        if self.name == "judge:llava_bench":
            return _ratio(np.asarray(given), groups=groups, seed=seed)
        return _mean(given, references, seed=seed)

    def _asked(self, prediction: str, reference: Mapping[str, Any]) -> str:
        text = self.prompt
        # One pass over the template, so that braces in an answer are not taken for places.
        fields = {**reference, "prediction": prediction}
        return re.sub(
            r"\{(question|answer|context|prediction)\}", lambda place: str(fields.get(place[1], place[0])), text
        )

    def _ask(self, prompts: Mapping[str, str]) -> dict[str, list[float]]:
        """Ask for the judgements of prompts by key. Raises MmitError if one has no score after TRIES replies."""
        done: dict[str, list[float]] = {}
        reply = ""
        for attempt in range(TRIES):
            # Another seed, or a server that caches would repeat the reply that could not be read.
            draw = Draw(max_tokens=512, seed=attempt)
            keys = {Request(user(asked), draw, "judge"): key for key, asked in prompts.items() if key not in done}
            for request, said in self.teacher.ask(keys):
                self.account.add(replace(said, cost=priced(said, self.teacher.price)))
                reply, key = said.text, keys[request]
                scores = self.rubric.read(reply)
                row = {"key": key, "judge": self.judge, "prompt": prompts[key], "reply": reply, "scores": scores}
                self._keep(row)
                if scores is not None:
                    done[key] = scores
            if len(done) == len(prompts):
                return done
        problem = f"the judge gave no score in {TRIES} replies, the last being {reply[:80]!r}"
        raise MmitError(problem, where=self.judge, remedy="Take another judge; judgements so far are kept.")

    def _keep(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, json.dumps(row) + "\n")

    def _on_file(self) -> dict[str, list[float]]:
        if not self.path.exists():
            return {}
        # A line that a killed process left half is asked for again.
        rows = [row for _, row in json_lines(self.path) if isinstance(row, dict)]
        return {row["key"]: row["scores"] for row in rows if row.get("scores") is not None}


def _mean(given: list[list[float]], references: Sequence[Mapping[str, Any]], *, seed: int) -> Score:
    values = [scores[0] for scores in given]
    by: dict[str, list[float]] = {}
    for value, reference in zip(values, references, strict=True):
        for capability in options_of(reference["capability"], where="judge:mmvet"):
            by.setdefault(capability, []).append(value)
    per = {name: mean_score("judge", "mmvet", part, seed=seed) for name, part in sorted(by.items())}
    whole = mean_score("judge", "mmvet", values, seed=seed)
    return Score("judge", "mmvet", whole.value, whole.n, whole.ci95, by_group=per, details={"values": values})


def _ratio(pairs: np.ndarray, *, groups: Sequence[str] | None, seed: int) -> Score:
    """Return the model's mean over the reference's mean; `pairs` (n, 2) are (reference, model)."""

    def part(rows: np.ndarray) -> tuple[float, tuple[float, float]]:
        drawn = np.random.default_rng(seed).integers(0, len(rows), (1000, len(rows)))
        sums = rows[drawn].sum(1)
        low, high = np.quantile(sums[:, 1] / sums[:, 0], [0.025, 0.975])
        return float(rows[:, 1].sum() / rows[:, 0].sum()), (float(low), float(high))

    by = {}
    for name, at in split(groups).items():
        value, ci95 = part(pairs[at])
        by[name] = Score("judge", "llava_bench", value, len(at), ci95)
    value, ci95 = part(pairs)
    ratios = (pairs[:, 1] / pairs[:, 0]).tolist()
    return Score("judge", "llava_bench", value, len(pairs), ci95, by_group=by, details={"values": ratios})
