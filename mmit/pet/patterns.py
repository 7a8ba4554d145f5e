"""Patterns and verbalizers: wordings of one task that end where the answer begins, and what each label is said as.

Owns the YAML layout below. In: the file. Out: a record for a row's fields, with or without an answer. Refuses two
labels that are said alike, one that is said as the beginning of another, an empty one, a label without one, fewer than
two labels, and a pattern that shows more or fewer images than a row has.

    task: colour
    fields: [image]               # what a row has besides its label
    labels: [red, blue]           # as the rows write them
    verbalizer: {red: red, blue: blue}   # what each is said as; left out: the label itself
    patterns:
      - {id: what, input: "{{ image }}What colour is it?"}
      - {id: note, input: "{{ image }}Complete: it is", verbalizer: {red: a red one, blue: a blue one}}
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmit.data.choices import CHOICES, SHARES
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Record, Text, Turn
from mmit.templates.bank import SEPARATOR, Bank, Template, read_text
from mmit.templates.render import render
from mmit.yamlio import parse_yaml

KEYS = ("task", "licence", "fields", "labels", "verbalizer", "patterns")
_PATTERN_KEYS = ("id", "input", "verbalizer")
_ANSWER = "answer"  # the field that stands for the answer in the template of a pattern
_REMEDY = "Write labels: [red, blue] and, where they are said otherwise, verbalizer: {red: ..., blue: ...}."


@dataclass(frozen=True)
class Pattern:
    """One wording, and what each label is said as in it, in the order of the labels."""

    template: Template  # of the question; its other side is the answer
    verbalizer: Mapping[str, str]

    @property
    def id(self) -> str:
        """Its name in the file."""
        return self.template.id

    @property
    def answers(self) -> tuple[str, ...]:
        """What the labels are said as, in their order."""
        return tuple(self.verbalizer.values())

    def record(
        self,
        fields: Mapping[str, Any],
        label: str | None = None,
        *,
        shares: Sequence[float] | None = None,
        where: str = "",
        **provenance: Any,
    ) -> Record:
        """Return the record of a row.

        Args:
            fields: images as `Image`, or lists of them.
            label: the answer; None leaves the first label's in its place, for a record whose answer is not read.
            shares: of the labels, where the answer is not certain; kept in the meta, as the choices are.
            provenance: id, source, row, licence and meta of the record.

        Raises:
            RecordError: the row does not suit the pattern.
        """
        answer = self.answers[0] if label is None else self.verbalizer[label]
        made = render(self.template, {**fields, _ANSWER: answer}, rng=random.Random(0), row=where)
        shown = sum(isinstance(part, Image) for part in made.parts)
        given = sum(len(images_of(value)) for value in fields.values())
        if shown != given:
            problem = f"shows {shown} image(s), and the row has {given}"
            place = f"{where}, pattern {self.id}" if where else f"pattern {self.id}"
            raise RecordError(problem, where=place, remedy="Place each image of a row once, and name no other.")
        meta = {**provenance.pop("meta", {}), CHOICES: list(self.answers)}
        if shares is not None:
            meta[SHARES] = [float(share) for share in shares]
        turns = (Turn("user", made.parts), Turn("assistant", (Text(made.target),)))
        return Record(turns, meta=meta, **provenance)


def images_of(value: Any) -> list[Image]:
    """Return the images of a field."""
    return [item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, Image)]


@dataclass(frozen=True)
class Patterns:
    """The patterns of one task."""

    task: str
    labels: tuple[str, ...]
    fields: tuple[str, ...]
    patterns: tuple[Pattern, ...]
    licence: str | None = None
    where: str = ""

    @cached_property
    def by_id(self) -> dict[str, Pattern]:
        """The patterns by their names."""
        return {pattern.id: pattern for pattern in self.patterns}

    def named(self, name: str | None, *, where: str = "") -> Pattern:
        """Return the pattern of a name, the first for None. Raises ConfigError."""
        if name is None:
            return self.patterns[0]
        if name not in self.by_id:
            raise ConfigError(f"there is no pattern '{name}'", where=where, remedy=nearest(name, self.by_id))
        return self.by_id[name]


def read_patterns(path: Path) -> Patterns:
    """Read a file of patterns (see the module docstring). Raises ConfigError."""
    rows, _ = parse_yaml(read_text(path), where=str(path))
    return patterns_of(rows, where=str(path))


def patterns_of(rows: Any, *, where: str = "patterns") -> Patterns:
    """Return the patterns that a mapping of the layout above describes. Raises ConfigError."""
    _check_keys(rows, KEYS, where)
    task = rows.get("task")
    if not isinstance(task, str) or not task:
        raise ConfigError("'task' is missing", where=where, remedy="Name the task, e.g. task: colour")
    labels = tuple(str(label) for label in _list(rows.get("labels"), "labels", where))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        problem = "two labels are the same" if len(set(labels)) < len(labels) else f"there are {len(labels)} labels"
        raise ConfigError(problem, where=f"{where}: labels", remedy="Name two different labels or more.")
    fields = tuple(str(name) for name in _list(rows.get("fields", ["image"]), "fields", where))
    if _ANSWER in fields:
        problem = f"a field is named '{_ANSWER}', which stands for the verbalized label"
        raise ConfigError(problem, where=f"{where}: fields", remedy="Rename the column.")
    listed = _list(rows.get("patterns"), "patterns", where)
    shared = rows.get("verbalizer")
    found = tuple(_pattern(row, number, labels, shared, where) for number, row in enumerate(listed, 1))
    bank = Bank(task, tuple(p.template for p in found), fields=(*fields, _ANSWER), where=where)
    bank.check()
    return Patterns(task, labels, fields, found, licence=rows.get("licence"), where=where)


def _pattern(row: Any, number: int, labels: tuple[str, ...], shared: Any, where: str) -> Pattern:
    place = f"{where}, pattern {number}"
    _check_keys(row, _PATTERN_KEYS, place)
    name = str(row.get("id") or number)
    place, asked = f"{where}#{name}", row.get("input")
    if not isinstance(asked, str) or not asked.strip():
        raise ConfigError("'input' is missing or no text", where=place, remedy="Write the question as Jinja text.")
    if SEPARATOR in asked:
        remedy = "Write the question alone: the verbalizer says the answers."
        raise ConfigError(f"'input' holds '{SEPARATOR}'", where=place, remedy=remedy)
    if _ANSWER in Template(name, asked, where=place).names:
        raise ConfigError(f"reads '{_ANSWER}', and so tells it", where=place, remedy="Ask without it.")
    template = Template(name, f"{asked}{SEPARATOR}{{{{ {_ANSWER} }}}}", where=place)
    return Pattern(template, _verbalizer(row.get("verbalizer", shared), labels, place))


def _verbalizer(given: Any, labels: tuple[str, ...], place: str) -> dict[str, str]:
    """What each label is said as, in their order."""
    where = f"{place}: verbalizer"
    if given is None:
        given = {label: label for label in labels}
    if not isinstance(given, Mapping):
        raise ConfigError(f"is a {type(given).__name__}", where=where, remedy=_REMEDY)
    texts = {str(label): text for label, text in given.items()}
    for label in texts:
        if label not in labels:
            raise ConfigError(f"'{label}' is no label", where=where, remedy=nearest(label, labels))
    found: dict[str, str] = {}
    for label in labels:
        if label not in texts:
            raise ConfigError(f"the label '{label}' is missing", where=where, remedy="Say what it is said as.")
        text = texts[label]
        if not isinstance(text, str) or not text.strip():
            problem = f"the text for '{label}' is " + ("empty" if isinstance(text, str) or text is None else "no text")
            raise ConfigError(problem, where=where, remedy="Write a text, in quotes where YAML reads another thing.")
        found[label] = text
    for label, text in found.items():
        for other, longer in found.items():
            if label == other:
                continue
            if text == longer:
                problem = f"'{label}' and '{other}' are both said as '{text}'"
                raise ConfigError(problem, where=where, remedy="Say them apart.")
            if longer.startswith(text) and not longer[len(text)].isalnum():
                # Which of the two it is would hang on where the answer ends, not on what it says.
                problem = f"'{text}' ('{label}') is the beginning of '{longer}' ('{other}')"
                raise ConfigError(problem, where=where, remedy="Reword one of them.")
    return found


def _list(value: Any, key: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"'{key}' is missing or no list", where=where, remedy=f"Write {key}: [...].")
    return value


def _check_keys(row: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(row, Mapping):
        raise ConfigError(f"is a {type(row).__name__}, not a mapping", where=where, remedy=f"Keys: {', '.join(keys)}.")
    for key in row:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}'", where=where, remedy=nearest(str(key), keys))
