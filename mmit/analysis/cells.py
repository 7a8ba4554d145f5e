"""Scores of a study: from files of answers to arrays by arm, seed and question.

In: the folders in which `mmit eval` left its answers. Out: for one set of questions a `Table`: for each arm and seed
one score a question, and what is known of each question (image, task, wording, possible answers). Refuses arms that
answered other questions, and metrics without a verdict on single answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.analysis.transform import label_space
from mmit.errors import MmitError
from mmit.eval.answers import TUNED, scored_answers

if TYPE_CHECKING:
    from mmit.records import Record


@dataclass(frozen=True)
class Question:
    """What a study knows of a question."""

    id: str
    image: str
    task: str
    wording: str
    choices: tuple[str, ...]
    reference: Any


@dataclass
class Table:
    """One set of questions: scores[arm][seed] is (Q,), answers[arm][seed] the Q texts."""

    name: str
    questions: Sequence[Question]
    scores: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    answers: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    @property
    def images(self) -> list[str]:
        """The image of each question; questions without one stand for themselves."""
        return [question.image for question in self.questions]

    def stacked(self, arm: str) -> np.ndarray:
        """Scores of an arm: (seeds, Q), in the order of the seeds."""
        return np.stack([self.scores[arm][seed] for seed in sorted(self.scores[arm])])

    def of(self, places: Sequence[int], name: str) -> Table:
        """Return the table of some of the questions."""
        part = Table(name, [self.questions[place] for place in places])
        part.scores = {arm: {s: row[list(places)] for s, row in by.items()} for arm, by in self.scores.items()}
        part.answers = {a: {s: [row[p] for p in places] for s, row in by.items()} for a, by in self.answers.items()}
        return part

    def by(self, key: str) -> dict[str, list[int]]:
        """Return the places of the questions by `task` or `wording`."""
        found: dict[str, list[int]] = {}
        for place, question in enumerate(self.questions):
            found.setdefault(getattr(question, key), []).append(place)
        return dict(sorted(found.items()))


def question_of(record: Record) -> Question:
    """Return what the record that a question was made of says about it."""
    build = record.meta.get("build")
    wording = str(build.get("template")) if isinstance(build, Mapping) and build.get("template") else ""
    task = str(record.meta.get("task") or "")
    choices = record.meta.get("choices")
    listed = tuple(choices) if isinstance(choices, list) else ()
    return Question(record.id, "", task, f"{task}/{wording}" if wording else task, listed, record.turns[-1].text)


def _answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the scored answers of a cell by id. Raises MmitError: not there, not scored, or without verdicts."""
    path = folder / TUNED
    rows = scored_answers(path, again="Run the study again")
    if any(row["correct"] is None for row in rows.values()):
        problem = "the metric has no verdict on single answers"
        raise MmitError(problem, where=str(path), remedy="Choose a metric such as exact, choice or anls:lmms.")
    return rows


def table_of(name: str, folders: Mapping[tuple[str, int], Path], known: Mapping[str, Question]) -> Table:
    """Read the answers of all finished cells.

    Args:
        folders: (arm, seed) -> folder of answers.
        known: what is known of questions by their id; the rest is read from the answers.

    Raises:
        MmitError: two cells answered different questions.
    """
    table: Table | None = None
    asked: dict[str, tuple[Any, ...]] = {}
    for (arm, seed), folder in folders.items():
        rows = _answers(folder)
        if table is None:
            table = Table(name, [_question(row, known.get(one)) for one, row in rows.items()])
            asked = {one: _asked(row) for one, row in rows.items()}
        # Compared as they were asked, wording and images included: ids alone survive a change of the task.
        if {one: _asked(row) for one, row in rows.items()} != asked:
            changed = [one for one in {**asked, **rows} if one not in rows or asked.get(one) != _asked(rows[one])]
            problem = f"arm '{arm}', seed {seed} answered other questions than the first arm, such as '{changed[0]}'"
            raise MmitError(problem, where=str(folder), remedy="Remove the study's folder and run it again.")
        ordered = [rows[question.id] for question in table.questions]
        table.scores.setdefault(arm, {})[seed] = np.array([float(row["correct"]) for row in ordered])
        table.answers.setdefault(arm, {})[seed] = [str(row["answer"]) for row in ordered]
    return table or Table(name, [])


def _asked(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["prompt"], tuple(row["images"]), repr(row["reference"])


def _question(row: Mapping[str, Any], known: Question | None) -> Question:
    image = "\n".join(row["images"]) or f"question {row['id']}"
    if known is None:
        group = str(row.get("group") or "")
        return Question(row["id"], image, group, group, (), row["reference"])
    return Question(known.id, image, known.task, known.wording, known.choices, known.reference)


def with_spaces(table: Table, trained: Sequence[Record]) -> set[str]:
    """Give questions without choices the label space of their task in training; returns the tasks that got one.

    Where the task's answers are no labels, or a reference is none of them, it stays unknown.
    """
    counts = _answer_counts(trained)
    closed = {}
    for task, places in table.by("task").items():
        space = label_space(list(counts.get(task, Counter()).elements()))
        if space and {plain_answer(table.questions[place].reference) for place in places} <= set(space):
            closed[task] = space
    given = {q.task for q in table.questions if not q.choices and q.task in closed}
    table.questions = [
        replace(q, choices=closed[q.task]) if not q.choices and q.task in closed else q for q in table.questions
    ]
    return given


def chance(table: Table) -> float | None:
    """Return the expected score of a guess in the label space, None where that of some question is not known."""
    if not table.questions or not all(question.choices for question in table.questions):
        return None
    return float(np.mean([1 / len(question.choices) for question in table.questions]))


def plain_answer(answer: Any) -> str:
    """Return an answer as it is counted."""
    return str(answer).strip().lower()


def _answer_counts(trained: Sequence[Record]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for record in trained:
        counts.setdefault(str(record.meta.get("task") or ""), Counter())[plain_answer(record.turns[-1].text)] += 1
    return counts


def majority(table: Table, trained: Sequence[Record]) -> float | None:
    """Return the share of questions whose answer is the commonest one of its task in the training records."""
    # From the training records: taken from the test, it would know the answers it is scored by.
    counts = _answer_counts(trained)
    if not table.questions or any(question.task not in counts for question in table.questions):
        return None
    # Of equally common answers the first by name, so that it does not depend on the order of the records.
    common = {task: min(c for c, n in found.items() if n == max(found.values())) for task, found in counts.items()}
    return float(np.mean([plain_answer(q.reference) == common[q.task] for q in table.questions]))


def sensitivity(table: Table, arm: str) -> dict[str, Any] | None:
    """Return how much an arm's score hangs on the wording; None with a single wording.

    Standard deviation over mean of the wordings of a task, averaged over tasks that have several (MultiInstruct,
    Xu et al. 2023), and the lowest and highest wording.
    """
    means = {name: float(table.stacked(arm)[:, places].mean()) for name, places in table.by("wording").items()}
    by_task: dict[str, list[float]] = {}
    for question in table.questions:
        by_task.setdefault(question.task, [])
    for name, mean in means.items():
        by_task.setdefault(name.partition("/")[0], []).append(mean)
    several = [values for values in by_task.values() if len(values) > 1 and np.mean(values) > 0]
    if not several:
        return None
    ratio = float(np.mean([np.std(values) / np.mean(values) for values in several]))
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return {"sensitivity": ratio, "lowest": [low, means[low]], "highest": [high, means[high]]}
