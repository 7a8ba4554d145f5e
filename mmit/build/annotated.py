"""Annotated rows x templates -> instruction records (Flan, arXiv:2109.01652; P3, arXiv:2110.08207).

In: rows of fields, banks of templates, shares and a seed. Out: one Record per row and drawn wording, or the reason why
there is none. What a row becomes depends on the seed, the task and the row's number alone, so that a build can be cut
off, resumed or spread over processes without a difference. Refuses a bank that reads fields the rows do not have.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmit.build.licences import combined
from mmit.data.formats.boxes import check_options, with_boxes
from mmit.data.image_identity import image_name
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Record, Text, Turn
from mmit.templates.bank import SEPARATOR
from mmit.templates.options import OptionStyle
from mmit.templates.render import Rendered, draw, render
from mmit.templates.shots import Pool, check_shots, with_shots

if TYPE_CHECKING:
    from mmit.build.rows import Rows
    from mmit.templates.bank import Bank, Template

SHOT_ANSWERS = ("right", "wrong")
_VALUE = re.compile(r"'([^']*)'|\d[\d,]*(?:\.\d+)?()")  # what a problem quotes or counts
POOL = 5_000  # rows that examples are drawn from; a sample of all rows where there are more


@dataclass(frozen=True)
class Recipe:
    """How rows become records.

    Attributes:
        seed: decides wordings, options, examples and their order.
        split: which wordings of the banks: train, held_out or all.
        per_row: wordings a row gets from each bank.
        count: use only so many wordings of each bank, drawn by the seed; a smaller number is a part of a larger.
        inversion: share of rows whose wording is turned around, where the bank has such (Flan 2022 takes 0.3).
        options: how choices are listed.
        shots: share of records by their number of solved examples.
        shot_answers: right, or wrong: each example then shows another answer of its label space, never the right one
            (the delusive examples of Kung and Peng, arXiv:2305.11383).
        boxes: how boxes are written that a wording spells as <box>(x1,y1),(x2,y2)</box> of 0 to 1000: as numbers or
            with a family's tokens (`mmit.data.formats.boxes.WAYS`); None leaves these letters as they are.
        held_out: clusters that are kept for evaluation.
        set_aside: share of the images (of the rows, where they have none) that held-out clusters ask about, and no
            other does: a held-out question about a trained image would measure memory.
    """

    seed: int = 0
    split: str = "train"
    per_row: int = 1
    count: int | None = None
    inversion: float = 0.0
    options: OptionStyle = OptionStyle()
    shots: Mapping[int, float] = field(default_factory=lambda: {0: 1.0})
    shot_answers: str = "right"
    boxes: str | None = None
    held_out: tuple[str, ...] = ()
    set_aside: float = 0.1

    def __post_init__(self) -> None:
        check_shots(self.shots)
        check_options(self.boxes)
        if self.shot_answers not in SHOT_ANSWERS:
            remedy = nearest(str(self.shot_answers), SHOT_ANSWERS)
            raise ConfigError(f"is '{self.shot_answers}'", where="shot_answers", remedy=remedy)
        if not 0 <= self.inversion <= 1:
            raise ConfigError(f"is {self.inversion}", where="inversion", remedy="Give a number from 0 to 1.")
        if not 0 < self.set_aside < 1:
            raise ConfigError(f"is {self.set_aside}", where="holdout.images", remedy="Give a share between 0 and 1.")
        for name, value in (("per_row", self.per_row), ("count", self.count)):
            if value is not None and value < 1:
                raise ConfigError(f"is {value}", where=f"templates.{name}", remedy="Give 1 or more.")

    def wordings(self, bank: Bank) -> tuple[Template, ...]:
        """Return the wordings of a bank that records are drawn from. Raises ConfigError: it has fewer than `count`."""
        chosen = bank.of_split(self.split)
        plain = [template.id for template in chosen if not template.inverted]
        if self.count is None:
            return chosen
        if self.count > len(plain):
            problem = f"{self.count} wordings, but task '{bank.task}' has {len(plain)} that are not inverted"
            raise ConfigError(problem, where="templates.count", remedy="Lower it, or add templates.")
        random.Random(f"{self.seed}|wordings|{bank.task}").shuffle(plain)
        kept = set(plain[: self.count])
        return tuple(template for template in chosen if template.inverted or template.id in kept)


@dataclass(frozen=True)
class Made:
    """One record, and whether its cluster is held out."""

    task: str
    record: Record
    held_out: bool


@dataclass(frozen=True)
class Dropped:
    """A row and wording, or a text of a teacher, that gave no record; `reason` is one of few, `text` what it met."""

    task: str
    row: str
    template: str
    reason: str
    text: str = ""


@dataclass(frozen=True)
class _Place:
    """Where a row comes from."""

    where: str
    number: int
    source: str
    licence: str | None


def check_banks(banks: Sequence[Bank], recipe: Recipe) -> None:
    """Refuse banks of one task name, held-out clusters that no bank has, and a build without a task left.

    Raises ConfigError.
    """
    tasks = [bank.task for bank in banks]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        remedy = "Give each bank a task of its own."
        raise ConfigError(f"two banks have the task '{twice[0]}'", where="bank", remedy=remedy)
    clusters = sorted({bank.cluster for bank in banks if bank.cluster})
    for cluster in recipe.held_out:
        if cluster not in clusters:
            problem = f"no bank is of the cluster '{cluster}'"
            raise ConfigError(problem, where="holdout.clusters", remedy=nearest(cluster, clusters))
    if banks and all(bank.cluster in recipe.held_out for bank in banks):
        problem = "every task is held out, nothing is left to train on"
        raise ConfigError(problem, where="holdout.clusters", remedy=f"Hold fewer of {', '.join(clusters)} out.")
    for bank in banks:
        chosen = recipe.wordings(bank)
        if recipe.per_row > len(chosen):
            problem = f"{recipe.per_row} wordings per row, but task '{bank.task}' has {len(chosen)}"
            raise ConfigError(problem, where="templates.per_row", remedy="Lower it, or add templates.")


def annotated(
    open_rows: Callable[[], Rows],
    banks: Sequence[Bank],
    recipe: Recipe,
    *,
    source: str,
    licence: str | None = None,
) -> Iterator[Made | Dropped]:
    """Yield the records, and what gave none, in the order of the rows.

    Args:
        open_rows: begins a pass over the rows; called twice where examples are asked for.
        source: name of the rows, for provenance. licence: of the rows.

    Raises:
        ConfigError: a bank does not suit the rows, or the recipe cannot be followed.
    """
    stage = renderer(open_rows, banks, recipe, source=source, licence=licence)
    for row in checked(open_rows(), banks):
        yield from stage([row])


def renderer(
    open_rows: Callable[[], Rows], banks: Sequence[Bank], recipe: Recipe, *, source: str, licence: str | None = None
) -> Renderer:
    """Return the stage of a build.

    Args:
        open_rows: begins a pass over the rows; shots take a second one.
        banks: of templates. recipe: how they are drawn.
        source, licence: of the rows.

    Raises:
        ConfigError: as `annotated`.
    """
    check_banks(banks, recipe)
    # Examples for held-out questions come from held-out rows alone, and the others from the others.
    pools = {}
    if any(count and share for count, share in recipe.shots.items()):
        for aside in {False, bool(recipe.held_out)}:
            pools[aside] = _Examples(open_rows, recipe, aside=aside)
    return Renderer(tuple(banks), recipe, pools, source, licence)


def checked(rows: Rows, banks: Sequence[Bank]) -> Rows:
    """Yield the rows after a look at the first one that can be read: it tells what the fields are.

    A later row that lacks some is dropped by itself. Raises ConfigError.
    """
    known = False
    for number, row in rows:
        if not known and not isinstance(row, RecordError):
            _check_fields(banks, row)
            known = True
        yield number, row


@dataclass(frozen=True)
class Renderer:
    """The stage of a build: a batch of (row number, fields) -> what they become. It can be pickled."""

    banks: tuple[Bank, ...]
    recipe: Recipe
    pools: Mapping[bool, _Examples]
    source: str
    licence: str | None

    def __call__(self, rows: Iterable[tuple[int, dict[str, Any] | RecordError]]) -> list[Made | Dropped]:
        """Return the records of the rows, and what gave none, in their order. Raises ConfigError."""
        return [item for number, row in rows for item in self._of(number, row)]

    def _of(self, number: int, row: dict[str, Any] | RecordError) -> Iterator[Made | Dropped]:
        place = f"{self.source}:{number}"
        if isinstance(row, RecordError):
            for bank in self.banks:
                yield _dropped(bank, place, "", row.problem, ())
            return
        aside = _is_aside(row, number, self.recipe)
        for bank in self.banks:
            if (bank.cluster in self.recipe.held_out) == aside:
                where = _Place(place, number, self.source, self.licence)
                yield from _of_row(bank, row, self.recipe, self.pools.get(aside), where)


def _is_aside(row: Mapping[str, Any], number: int, recipe: Recipe) -> bool:
    """Whether a row belongs to the held-out clusters; rows that share an image always go together."""
    if not recipe.held_out:
        return False
    # The first image alone decides: a row of several images would otherwise need every set they are in to agree.
    # Its file's name without the folder: the same images are set aside wherever they lie.
    name = os.path.basename(next(iter(_image_names(row)), str(number)))
    return random.Random(f"{recipe.seed}|aside|{name}").random() < recipe.set_aside


def _check_fields(banks: Sequence[Bank], row: Mapping[str, Any]) -> None:
    for bank in banks:
        for name in bank.fields:
            if name not in row:
                problem = f"the rows have no field '{name}'"
                raise ConfigError(problem, where=bank.where, remedy=nearest(name, sorted(map(str, row))))


def _of_row(
    bank: Bank,
    row: dict[str, Any],
    recipe: Recipe,
    pool: _Examples | None,
    at: _Place,
) -> Iterator[Made | Dropped]:
    # Seeded by the row's own number: a worker that begins in the middle draws what one process would have drawn.
    rng = random.Random(f"{recipe.seed}|{bank.task}|{at.number}")
    templates = draw(recipe.wordings(bank), rng=rng, inversion=recipe.inversion, count=recipe.per_row)
    for template in templates:
        try:
            asked = render(template, row, rng=rng, options=recipe.options, row=at.where)
            shots = pool.of(row, at.number, template, asked, rng) if pool else []
            rendered = with_shots(asked, [shot for _, shot in shots])
            record = with_boxes(_record(rendered, bank, template, row, at), boxes=recipe.boxes)
            record.meta["build"]["shots"] = [name for name, _ in shots]
            record.meta["build"]["seed"] = recipe.seed
            record.validate()
        except RecordError as error:
            yield _dropped(bank, at.where, template.id, error.problem, row)
        else:
            yield Made(bank.task, record, bank.cluster in recipe.held_out)


def _dropped(bank: Bank, place: str, template: str, problem: str, names: Iterable[object]) -> Dropped:
    """What was dropped, its reason without what differs from row to row: `build.json` counts by reason.

    Names of fields stay in the reason; `text` has all of it.
    """
    known = {*map(str, names), *bank.fields, SEPARATOR}
    reason = _VALUE.sub(lambda found: found[0] if found[1] in known else "…", problem)
    return Dropped(bank.task, place, template, reason, problem[:500] if reason != problem else "")


def _record(
    rendered: Rendered,
    bank: Bank,
    template: Template,
    row: Mapping[str, Any],
    at: _Place,
) -> Record:
    meta: dict[str, Any] = {"task": bank.task, "cluster": bank.cluster}
    if rendered.choices is not None and not template.inverted:
        meta["choices"] = list(rendered.choices)
    if template.metrics:
        meta["metrics"] = list(template.metrics)
    meta["build"] = {
        "how": "annotated",
        "template": template.id,
        "digest": template.digest,
        "inverted": template.inverted,
        "options": rendered.options.style if rendered.options else None,
    }
    return Record(
        (Turn("user", rendered.parts), Turn("assistant", (Text(rendered.target),))),
        id=f"{row.get('id', at.number)}/{bank.task}/{template.id}",
        source=at.source,
        row=at.number,
        licence=combined([at.licence, bank.licence]),
        meta=meta,
    )


class _Examples:
    """The rows that solved examples are made of: a seeded sample, drawn in one pass (Vitter 1985)."""

    def __init__(self, open_rows: Callable[[], Rows], recipe: Recipe, *, aside: bool) -> None:
        rng = random.Random(f"{recipe.seed}|examples")
        kept: list[tuple[int, dict[str, Any]]] = []
        seen = 0
        for number, row in open_rows():
            if isinstance(row, RecordError) or _is_aside(row, number, recipe) != aside:
                continue
            seen += 1
            if len(kept) < POOL:
                kept.append((number, row))
            # Each further row takes a place with probability POOL / seen: at the end all rows were equally likely.
            elif (at := rng.randrange(seen)) < POOL:
                kept[at] = (number, row)
        self._recipe = recipe
        self._at = {number: at for at, (number, _) in enumerate(kept)}
        self._pool = Pool(kept, [_image_names(row) for _, row in kept])

    def of(
        self, row: Mapping[str, Any], number: int, template: Template, asked: Rendered, rng: random.Random
    ) -> list[tuple[str, Rendered]]:
        """Draw the examples of one question, with the wording and the style of options that it has."""
        shares = self._recipe.shots
        count = rng.choices(list(shares), weights=list(shares.values()))[0]
        style = OptionStyle(1.0, (asked.options.style,), self._recipe.options.answer) if asked.options else None
        shots = []
        for at in self._pool.draw(count, rng=rng, images=_image_names(row), skip=self._at.get(number)):
            shown, fields = self._pool.rows[at]
            example = render(template, fields, rng=rng, options=style)
            if self._recipe.shot_answers == "wrong":
                example = _wrong(example, rng)
            shots.append((str(fields.get("id", shown)), example))
        return shots


def _wrong(example: Rendered, rng: random.Random) -> Rendered:
    others = [choice for choice in example.choices or () if choice != example.target]
    if not others or example.target not in (example.choices or ()):
        remedy = "Give the template choices, and let options.answer be text."
        raise RecordError("an example has no wrong answer", remedy=remedy)
    return replace(example, target=rng.choice(others))


def _image_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    values = [v for value in row.values() for v in (value if isinstance(value, list) else [value])]
    return tuple(sorted({image_name(value) for value in values if isinstance(value, Image)}))
