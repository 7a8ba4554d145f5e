"""Asks a model a task's questions and keeps every answer.

In: anything that can `generate`, and a Task. Out: a `Result`, and answers-<label>.jsonl: a line of settings,
then one line per question, appended batch by batch. A run that was cut off goes on where it stopped; answers
of another model or other settings are refused, never mixed in.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmit.data.image_identity import inside_name
from mmit.data.thoughts import split_thought
from mmit.errors import MmitError, ModelError
from mmit.eval.answers import (
    ASKED,
    FORMAT,
    NUMBERS,
    AnswerRow,
    kept_settings,
    lines,
    open_answers,
    rank_file,
    read_answers,
)
from mmit.eval.answers import merge as merge_answers
from mmit.eval.metrics import METRICS, Score, by_cluster, get_metric
from mmit.eval.ranks import ALONE, Ranks
from mmit.eval.tasks import Item, Task, task_items
from mmit.io import append, write_atomic
from mmit.text import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from mmit.records import Image, Record

CHUNK = 8  # batches handed to the model at once, for it to sort and to share pictures among


class Generates(Protocol):
    """What an evaluation needs of a model; `mmit.generate.Model` has it."""

    def generate(
        self,
        records: Sequence[Record],
        *,
        batch_size: int,
        max_new_tokens: int,
        blank_images: bool = False,
        temperature: float = 0.0,
    ) -> list[str]:
        """Answer questions.

        Args:
            records: each ends with the user's turn. batch_size: records at once. max_new_tokens: of an answer at most.
            blank_images: show the mean colour of the encoder in place of pictures.
            temperature: 0 takes the likeliest token.

        Returns:
            one answer per record, in their order.
        """
        ...


class Scores(Protocol):
    """What an evaluation by likelihood needs of a model; `mmit.generate.Model` has it."""

    def score(
        self,
        records: Sequence[Record],
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int,
        blank_images: bool = False,
    ) -> list[list[float]]:
        """Measure how likely answers are.

        Args:
            records: each ends with the user's turn. choices: the answers to each.
            batch_size: records at once. blank_images: show the mean colour of the encoder in place of pictures.

        Returns:
            for each record the log-probability, in nats, of each of its choices.
        """
        ...


class Lazy:
    """A model that is built when it is first asked: never, if all of its answers are on file."""

    def __init__(self, build: Callable[[], Generates]) -> None:
        self._build = build
        self._model: Generates | None = None

    def _built(self) -> Any:
        if self._model is None:
            self._model = self._build()
        return self._model

    def generate(self, records: Sequence[Record], **options: Any) -> list[str]:
        """Build the model if need be, and let it answer."""
        answers: list[str] = self._built().generate(records, **options)
        return answers

    def score(self, records: Sequence[Record], choices: Any, **options: Any) -> list[list[float]]:
        """Build the model if need be, and let it say how likely the choices are."""
        return _scorer(self._built()).score(records, choices, **options)


@dataclass(frozen=True, slots=True)
class Result:
    """One model's answers to a task, scored; `generated` of the `score.n` are new, the rest were on file."""

    label: str
    score: Score
    invalid_rate: float
    path: Path
    seconds: float
    generated: int
    thoughts: int = 0  # answers that began with a thought, which is not scored


@dataclass(frozen=True, slots=True)
class Arm:
    """Whose answers a file holds: answers of another arm are refused there, never mixed in.

    Attributes:
        fingerprint: tells this model's answers from another's, e.g. a checkpoint's hash.
        label: names the file of answers.
        number_format: what the model computes in, e.g. "bf16"; None where that is not known.
        blank_images: the model sees a blank image in place of each.
    """

    fingerprint: str
    label: str = "tuned"
    number_format: str | None = None
    blank_images: bool = False


@dataclass(frozen=True, slots=True)
class How:
    """How questions are asked and scored: the same for a model and all its baselines.

    Attributes:
        sample: number of questions of a task, drawn with `seed`; None takes the task's own sample, or all.
        seed: of samples and of resampled intervals; None takes the task's.
        batch_size: questions per call of the model.
        metric: what scores the answers; None takes METRICS[task.metric].
        ranks: the processes that share the questions; all of them get the same result.
        overwrite: drop the answers on file and start anew.
        progress: show a progress bar.
        console: where tables are printed; None is standard output.
    """

    sample: int | None = None
    seed: int | None = None
    batch_size: int = 64
    metric: Callable[..., Score] | None = None
    ranks: Ranks = ALONE
    overwrite: bool = False
    progress: bool = True
    console: Console | None = None


AS_STATED = How()


def evaluate(
    model: Generates,
    task: Task,
    arm: Arm,
    *,
    out_dir: str | os.PathLike[str],
    items: Sequence[Item] | None = None,
    how: How = AS_STATED,
) -> Result:
    """Ask `model` the task's questions, greedily, and score the answers.

    Args:
        model: what answers.
        task: what is asked and how it is scored.
        arm: whose answers these are.
        out_dir: folder of answers-<label>.jsonl; made if need be.
        items: ask exactly these; None asks the task's, or the sample of `how`.
        how: how they are asked.

    Raises:
        MmitError: the answers on file are of another model, task or setting, or damaged; or the model does
            not give one text per question.
    """
    seed, ranks = task.seed if how.seed is None else how.seed, how.ranks
    start = time.monotonic()
    items = task_items(task, how.sample, seed) if items is None else list(items)
    settings = _settings(task, arm)
    path = Path(out_dir) / f"answers-{arm.label}.jsonl"
    asked = {item.id: _asked(item) for item in items}
    if ranks.rank == 0:
        open_answers(path, settings, asked, overwrite=how.overwrite)
    ranks.barrier()  # from here every rank reads the same file, which nobody writes until answers are gathered
    settings = kept_settings(path, settings)
    rows = read_answers(path, settings, asked)
    missing = len(asked.keys() - rows.keys())
    target = path if ranks.world == 1 else rank_file(path, ranks.rank)
    if target != path:
        write_atomic(target, lines([settings]))
    title, show = f"{task.name} {arm.label}", how.progress and not ranks.rank
    with _bar(title, len(items), done=len(items) - missing, show=show) as bar:
        # Whole chunks, by their number: what a rank asks does not depend on what the others have finished.
        for batch in _chunks(items, how.batch_size)[ranks.rank :: ranks.world]:
            # A chunk that is answered in part is asked again as a whole, for the sake of the batches in it (`_chunks`);
            # the answers on file stay.
            if all(item.id in rows for item in batch):
                continue
            answers = _answers(model, task, batch, batch_size=how.batch_size, blank_images=arm.blank_images)
            pairs = zip(batch, answers, strict=True)
            new = [asked[item.id] | answer for item, answer in pairs if item.id not in rows]
            append(target, lines(new))  # at once: an evaluation that is killed loses one chunk
            rows |= {row["id"]: row for row in new}
            bar(len(new))
    rows = _gather(path, settings, asked, ranks=ranks) if ranks.world > 1 else rows
    score = _score_and_keep(path, settings, rows, items=items, ranks=ranks, score=_scorer_of(task, how.metric, seed))
    ordered = [rows[item.id] for item in items]
    invalid = invalid_rate(task, score, [row["answer"] for row in ordered])
    thoughts = sum("thought" in row for row in ordered)
    return Result(arm.label, score, invalid, path, time.monotonic() - start, missing, thoughts)


def _gather(path: Path, settings: AnswerRow, asked: Mapping[str, AnswerRow], *, ranks: Ranks) -> dict[str, AnswerRow]:
    """Bring the answers of all ranks together; every rank gets all of them."""
    ranks.barrier()
    if ranks.rank == 0:
        merge_answers(path, settings, asked)
    ranks.barrier()
    rows = read_answers(path, settings, asked)
    ranks.barrier()  # before the first rank writes the file anew
    return rows


def _scorer_of(task: Task, metric: Callable[..., Score] | None, seed: int) -> Callable[[Sequence[AnswerRow]], Score]:
    chosen = metric or get_metric(task.metric)
    return lambda rows: _score(chosen, rows, seed)


def _score_and_keep(
    path: Path,
    settings: AnswerRow,
    rows: Mapping[str, AnswerRow],
    *,
    items: Sequence[Item],
    ranks: Ranks,
    score: Callable[[Sequence[AnswerRow]], Score],
) -> Score:
    """Score the answers; the first rank writes the file anew, with verdicts."""
    ordered, names = [rows[item.id] for item in items], {item.id for item in items}
    if ranks.rank:
        ranks.barrier()  # after the first rank: what a judge has said is on file by now
        return score(ordered)
    # The first rank scores alone, then the others: a judge that is asked keeps what it says, and is not asked twice.
    found = score(ordered)
    others = [row for name, row in rows.items() if name not in names]
    # Scored rows come first; answers to questions outside this sample are kept, without a score.
    write_atomic(path, lines([settings, *_with_scores(ordered, found), *_with_scores(others, None)]))
    ranks.barrier()
    return found


def _settings(task: Task, arm: Arm) -> AnswerRow:
    """Return the first line of a file of answers: what must be equal for them to be kept.

    Neither metric nor sample: a metric can score answers that another asked for, and a sample can grow.
    """
    settings: AnswerRow = {"format": FORMAT, "task": task.name, "max_new_tokens": task.max_new_tokens}
    settings |= {"label": arm.label, "fingerprint": arm.fingerprint, "blank_images": arm.blank_images}
    if task.stop:
        settings["stop"] = task.stop
    if task.answer_by != "generate":
        settings["answer_by"] = task.answer_by
    if arm.number_format is not None:
        settings[NUMBERS] = arm.number_format
    return settings


def answers_to(model: Generates | Scores, task: Task, items: Sequence[Item], *, batch_size: int) -> list[str]:
    """Return one answer per question, thoughts left out; nothing is written. Raises what the model raises.

    Args:
        model: generates, or scores where the task asks for choices. task: its prompt and limits.
        items: the questions. batch_size: questions at once.
    """
    chunks = _chunks(items, batch_size)
    rows = [_answers(model, task, chunk, batch_size=batch_size, blank_images=False) for chunk in chunks]
    return [row["answer"] for chunk in rows for row in chunk]


def invalid_rate(task: Task, score: Score, answers: Sequence[str]) -> float:
    """Return the share of answers outside the task's closed set as the metric reads them.

    Without a closed set: the share that the metric cannot read.
    """
    if task.answers is None or task.metric not in METRICS:
        return score.unparsed_rate
    # What the metric reads of each possible answer, by letting it score them against themselves.
    known = METRICS[task.metric](task.answers, task.answers)
    valid = set(map(str, known.details.get("parsed", task.answers)))
    return sum(str(read) not in valid for read in score.details.get("parsed", answers)) / len(answers)


def _asked(item: Item) -> AnswerRow:
    """Return the row of a question without its answer, as it comes back from JSON."""
    row = {
        "id": item.id,
        "group": item.group,
        "prompt": item.text,
        "images": [_name(image) for image in item.prompt.images],
        "reference": item.reference,
    }
    try:
        plain: AnswerRow = json.loads(json.dumps(row, allow_nan=False))
        return plain
    except (TypeError, ValueError) as error:
        problem = f"a reference that JSON cannot keep: {error}"
        remedy = "References are text, numbers, lists and mappings of these."
        raise MmitError(problem, where=item.id, remedy=remedy) from error


def _name(image: Image) -> str:
    # The path as given: a file of answers stays valid where the working directory is another.
    return image.source if isinstance(image.source, str) else inside_name(image)


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Return runs of items in data order, where questions about one picture are neighbours.

    The model makes batches of a chunk as it likes. Chunks depend neither on which answers are on file nor on the number
    of ranks: in low precision an answer may hang on its neighbours.
    """
    if size < 1:
        raise MmitError(f"batches of {size}", where="batch_size", remedy="Give at least 1.")
    return [items[start : start + CHUNK * size] for start in range(0, len(items), CHUNK * size)]


def _answers(
    model: Generates | Scores, task: Task, chunk: Sequence[Item], *, batch_size: int, blank_images: bool
) -> list[AnswerRow]:
    """Return {"answer": text} per question, with "likelihoods" of its choices where these decide."""
    records = [item.prompt for item in chunk]
    options: dict[str, Any] = {"batch_size": batch_size, "blank_images": blank_images}
    if task.answer_by == "generate":
        if task.stop:
            options["stop"] = tuple(task.stop)
        answers = model.generate(records, max_new_tokens=task.max_new_tokens, temperature=0.0, **options)  # type: ignore[union-attr]
        if len(answers) != len(chunk) or not all(isinstance(answer, str) for answer in answers):
            problem = f"{len(answers)} answers to {len(chunk)} questions, or some that are not text"
            raise ModelError(problem, where="generate", remedy="It must return one text per record, in order.")
        return [_without_thought(answer) for answer in answers]
    likelihoods = _scorer(model).score(records, [item.choices for item in chunk], **options)
    if [len(row) for row in likelihoods] != [len(item.choices) for item in chunk]:
        remedy = "It must return a list per record with one number per choice."
        raise ModelError("numbers that do not fit the choices", where="score", remedy=remedy)
    return [_likeliest(task, item, row) for item, row in zip(chunk, likelihoods, strict=True)]


def _without_thought(answer: str) -> AnswerRow:
    thought, said = split_thought(answer)
    return {"answer": said, "thought": thought} if said != answer else {"answer": answer}


def _scorer(model: Any) -> Scores:
    scores: Scores = model
    if not hasattr(model, "score"):
        problem = "the task compares likelihoods of choices, which this model does not tell"
        raise ModelError(problem, where="answer_by", remedy="Set answer_by: generate, or evaluate an mmit model.")
    return scores


def _likeliest(task: Task, item: Item, likelihoods: Sequence[float]) -> AnswerRow:
    """Return the choice of the highest log-likelihood, the first of equals."""
    # Longer choices have lower likelihoods for their length alone; which of the two is compared is the task's to say.
    per_character = task.answer_by == "likelihood_per_character"
    lengths = [len(choice) if per_character else 1 for choice in item.choices]
    best = max(range(len(lengths)), key=lambda n: likelihoods[n] / lengths[n])
    return {"answer": item.choices[best], "likelihoods": [float(value) for value in likelihoods]}


def _score(metric: Callable[..., Score], rows: Sequence[AnswerRow], seed: int) -> Score:
    some = any(row["group"] is not None for row in rows)
    groups = ["other" if row["group"] is None else row["group"] for row in rows] if some else None
    answers, references = [row["answer"] for row in rows], [row["reference"] for row in rows]
    found = metric(answers, references, groups=groups, seed=seed)
    # Questions about one image are no independent draws; a question without an image stands alone.
    images = ["\n".join(row["images"]) or f"question {row['id']}" for row in rows]
    return by_cluster(found, images, groups=groups, seed=seed)


def _with_scores(rows: Sequence[AnswerRow], score: Score | None) -> Iterator[AnswerRow]:
    """Add what the metric read (`parsed`) and its verdict (`correct`: true, false, or partial credit).

    Metrics over more than single answers (captions, pairs of questions) have none of these: null.
    """
    details = {} if score is None else score.details
    columns = [details.get(key, ()) for key in ("parsed", "values")]
    # Of another length are metrics that count something else than single answers, such as pairs of them.
    parsed, values = (column if len(column) == len(rows) else [None] * len(rows) for column in columns)
    for row, read, value in zip(rows, parsed, values, strict=True):
        correct = bool(value) if value in (0, 1) else value
        kept = {key: row[key] for key in ("id", *ASKED, "answer", "thought", "likelihoods") if key in row}
        yield kept | {"parsed": read, "correct": correct}


@contextmanager
def _bar(title: str, total: int, *, done: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Show questions answered and time left; yields a function that counts further ones."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal(stderr=True), disable=not show) as bar:
        task_id = bar.add_task(title, total=total, completed=done)
        yield lambda count: bar.advance(task_id, count)
