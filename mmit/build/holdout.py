"""Hold tasks or clusters of tasks out of records that are there already, and find what leaks across the line.

In: records whose meta names their task and cluster (those of any `mmit build`, or of an import that states them). Out:
`Made` with `held_out` set, and `Dropped` for what may stand on neither side. Three leaks are looked for: a training
record shows an image of a held-out one (the same bytes, whatever the file is called), stems from the same row of the
same source (itself or one of its solved examples), or asks in a wording that is nearly a held-out one. Looks at
wordings by the words that most prompts of a template share, so it needs no bank.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmit.build.annotated import Dropped, Made
from mmit.data.diversity import RougePool, rouge_words
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Record

CHECKS = ("image", "source", "template")
NEAR = 0.85  # ROUGE-L of two wordings: one word of seven differs
_SAMPLE = 50  # prompts of a template that its words are found in
_SHARED = 0.8  # of them, that a word must be in to belong to the wording


class Leak(NamedTuple):
    """A training record and the held-out one it gives away; `kind` is one of CHECKS."""

    kind: str
    train: str
    held_out: str
    what: str


@dataclass(frozen=True)
class Plan:
    """What is held out.

    Attributes:
        clusters, tasks: by the names in the records' meta.
        images: share of the images (of the rows, where there are none) that held-out records are about, and no others;
            None leaves every record where its task puts it.
        check: the leaks that are looked for.
        seed: decides which images.
    """

    clusters: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    images: float | None = None
    check: tuple[str, ...] = CHECKS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images is not None and not 0 < self.images < 1:
            remedy = "Give a share between 0 and 1, or leave it out."
            raise ConfigError(f"is {self.images}", where="holdout.images", remedy=remedy)
        for kind in self.check:
            if kind not in CHECKS:
                raise ConfigError(f"unknown check '{kind}'", where="check", remedy=nearest(str(kind), CHECKS))
        if not self.clusters and not self.tasks:
            remedy = "Name clusters or tasks: holdout: {clusters: [place]}"
            raise ConfigError("nothing is held out", where="holdout", remedy=remedy)

    def holds(self, record: Record) -> bool:
        """Whether a record's task is held out."""
        return _named(record, "cluster") in self.clusters or task_of(record) in self.tasks


def held_out(
    open_records: Callable[[], Iterable[Record]], plan: Plan, *, drop_leaks: bool = False
) -> tuple[Iterator[Made | Dropped], list[Leak]]:
    """Return the records on their sides of the line, and the leaks that are left.

    Args:
        open_records: begins a pass over the records; three are made.
        drop_leaks: leave training records that leak out, with the reason, instead.

    Raises:
        ConfigError: a cluster or task that no record has, or nothing is left to train on. RecordError: a missing image.
    """
    _check_names(open_records(), plan)
    found = list(_leaks(open_records, plan))
    leaking = {leak.train: leak for leak in found} if drop_leaks else {}
    return _sides(open_records(), plan, leaking), [] if drop_leaks else found


def _sides(records: Iterable[Record], plan: Plan, leaking: Mapping[str, Leak]) -> Iterator[Made | Dropped]:
    names = _Names()
    for record in records:
        place, wording = _place(record), str(_build(record).get("template", ""))
        reason = _misplaced(record, plan, names)
        if reason is None and not plan.holds(record) and place in leaking:
            leak = leaking[place]
            reason = _REASONS[leak.kind]
        if reason is None:
            yield Made(task_of(record), record, plan.holds(record))
        else:
            yield Dropped(task_of(record), place, wording, reason)


_REASONS = {
    "image": "it shows an image of a held-out record",
    "source": "it stems from the row of a held-out record",
    "template": "its wording is nearly that of a held-out task",
}


def _misplaced(record: Record, plan: Plan, names: _Names) -> str | None:
    """Why a record may stand on neither side where images are set apart."""
    if plan.images is None:
        return None
    # Drawn for each image by itself, from its digest: a further record or another order changes nobody's side. A record
    # of several images stands on a side only where all of them are.
    keys = names.of(record) or [f"{record.source}:{record.row}"]
    aside = [random.Random(f"{plan.seed}|aside|{key}").random() < plan.images for key in keys]
    if plan.holds(record):
        return None if all(aside) else "its image is trained on"
    return "its image is set aside" if any(aside) else None


def _leaks(open_records: Callable[[], Iterable[Record]], plan: Plan) -> Iterator[Leak]:
    # Two passes: every held-out record has to be known before the first training one can be compared, and only digests
    # and words of them fit into memory.
    names = _Names()
    images: dict[str, str] = {}
    rows: dict[tuple[str, str], str] = {}
    wordings = _Wordings()
    for record in open_records():
        if _misplaced(record, plan, names) is not None:
            continue
        if "template" in plan.check:
            wordings.take(record, held_out=plan.holds(record))
        if plan.holds(record):
            for name in names.of(record) if "image" in plan.check else ():
                images.setdefault(name, _place(record))
            for row in _rows(record) if "source" in plan.check else ():
                rows.setdefault(row, _place(record))
    near = wordings.near()
    for record in open_records():
        if plan.holds(record) or _misplaced(record, plan, names) is not None:
            continue
        for name in names.of(record) if images else ():
            if name in images:
                yield Leak("image", _place(record), images[name], "the same image")
        for row in _rows(record) if rows else ():
            if row in rows:
                yield Leak("source", _place(record), rows[row], f"{row[1]} of {row[0]}")
        if (key := _Wordings.key(record)) in near:
            yield Leak("template", _place(record), *near[key])


class _Wordings:
    """The wordings of templates, from the prompts that they gave."""

    def __init__(self) -> None:
        self._prompts: dict[tuple[str, str], list[set[str]]] = defaultdict(list)
        self._first: dict[tuple[str, str], list[str]] = {}
        self._held_out: dict[tuple[str, str], str] = {}  # -> its first record

    @staticmethod
    def key(record: Record) -> tuple[str, str]:
        """Task and template."""
        return task_of(record), str(_build(record).get("template", ""))

    def take(self, record: Record, *, held_out: bool) -> None:
        key = self.key(record)
        prompt = next((turn.parts for turn in record.turns if turn.role == "user"), ())
        # Solved examples stand before the question: what follows the last image is all question.
        texts = [part.text for part in prompt if not isinstance(part, Image)]
        words = rouge_words(texts[-1]) if texts else []
        if len(self._prompts[key]) < _SAMPLE:
            self._prompts[key].append(set(words))
            self._first.setdefault(key, words)
        if held_out:
            self._held_out.setdefault(key, _place(record))

    def near(self) -> dict[tuple[str, str], tuple[str, str]]:
        """Return {key in training: (a held-out record, both wordings)} for wordings that are nearly held-out ones."""
        # One wording with another, not prompt with prompt: the fields that a template fills in would hide what is
        # alike.
        kept = [(key, self._wording(key)) for key in self._held_out]
        found = {}
        for key in self._prompts:
            if key in self._held_out or not (wording := self._wording(key)):
                continue
            for other, held in kept:
                pool = RougePool()
                pool.add(held)
                if held == wording or (len(wording.split()) > 2 and pool.nearest(wording) >= NEAR):
                    found[key] = self._held_out[other], f"'{wording}' is nearly '{held}'"
                    break
        return found

    def _wording(self, key: tuple[str, str]) -> str:
        prompts = self._prompts[key]
        counts = Counter(word for prompt in prompts for word in prompt)
        return " ".join(word for word in self._first[key] if counts[word] >= _SHARED * len(prompts))


class _Names:
    """Digests of images, each file read once."""

    def __init__(self) -> None:
        self._of_path: dict[str, str] = {}

    def of(self, record: Record) -> list[str]:
        """Return the digests of a record's images. Raises RecordError."""
        return [self._digest(image, record) for image in record.images]

    def _digest(self, image: Image, record: Record) -> str:
        source = image.source
        if isinstance(source, str):
            if source not in self._of_path:
                try:
                    self._of_path[source] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
                except OSError as error:
                    problem = f"its image cannot be read: {error.strerror}"
                    raise RecordError(problem, where=source, remedy=f"It is an image of {_place(record)}.") from error
            return self._of_path[source]
        return hashlib.sha256(source if isinstance(source, bytes) else source.tobytes()).hexdigest()


def _check_names(records: Iterable[Record], plan: Plan) -> None:
    known: dict[str, set[str]] = {"cluster": set(), "task": set()}
    trained = False
    for record in records:
        known["cluster"].add(_named(record, "cluster"))
        known["task"].add(task_of(record))
        trained = trained or not plan.holds(record)
    for kind, names in (("cluster", plan.clusters), ("task", plan.tasks)):
        for name in names:
            if name not in known[kind]:
                there = sorted(known[kind] - {""})
                remedy = nearest(name, there) if there else f"The records' meta must name a {kind}."
                raise ConfigError(f"no record is of the {kind} '{name}'", where=f"holdout.{kind}s", remedy=remedy)
    if not trained:
        remedy = "Hold fewer clusters or tasks out."
        raise ConfigError("every record is held out, nothing is left to train on", where="holdout", remedy=remedy)


def task_of(record: Record) -> str:
    """Return the task that a record's meta names; "records" where it names none."""
    return _named(record, "task") or "records"


def _named(record: Record, key: str) -> str:
    value = record.meta.get(key)
    return value if isinstance(value, str) else ""


def _build(record: Record) -> Mapping[str, Any]:
    found = record.meta.get("build")
    return found if isinstance(found, Mapping) else {}


def _rows(record: Record) -> list[tuple[str, str]]:
    """The rows a record stems from: its own, and those of its solved examples, by what their records are called."""
    build, source = _build(record), record.source or ""
    shots = build.get("shots")
    rows = [f"id {shot}" for shot in shots] if isinstance(shots, list) else []
    if record.id:
        rows.append("id " + record.id.removesuffix(f"/{task_of(record)}/{build.get('template', '')}"))
    if record.row is not None and not build:  # a built record is called by its row or by that row's id
        rows.append(f"row {record.row}")
    return [(source, row) for row in dict.fromkeys(rows)]


def _place(record: Record) -> str:
    return record.id or f"{record.source}:{record.row}"
