"""A bank of templates: several wordings of one task, read from a file and checked before use.

Owns Template and Bank and mmit's own YAML layout; `mmit.templates.load` opens other kinds of files too. A template is
one Jinja text with `|||` between what is asked and what is answered, as in PromptSource; the YAML of mmit writes the
two sides under `input` and `target`. Refuses ids that occur twice, wordings that occur twice, empty sides, and
templates that read a field the bank does not declare.

    task: shape                     # what the wordings ask for
    cluster: attributes             # related tasks; hold-out works by cluster
    licence: Apache-2.0             # of the wordings
    fields: [image, colour, shape]  # what a row has
    choices: [circle, rectangle, triangle]
    templates:
      - {id: what, input: "{{ image }}What shape is this?", target: "{{ shape }}"}
      - {id: draw, input: "Name a {{ colour }} shape.", target: "{{ shape }}", inverted: true, split: held_out}
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mmit.errors import ConfigError, nearest
from mmit.templates.sandbox import Compiled, Sandbox
from mmit.yamlio import parse_yaml

SEPARATOR = "|||"
SPLITS = ("train", "held_out")
SANDBOX = Sandbox()
# Names the renderer gives every template besides the row's fields.
RENDERED = frozenset({"answer_choices", "options_", "options_str"})
_BANK_KEYS = ("task", "cluster", "licence", "fields", "choices", "templates")
_TEMPLATE_KEYS = ("id", "input", "target", "choices", "inverted", "split", "metrics", "choices_in_prompt", "reference")


@dataclass(frozen=True)
class Template:
    """One wording of a task.

    Attributes:
        jinja: both sides, `|||` between them.
        choices: the answers a row allows: a list, or Jinja text that renders to them with `|||` between; None where
            any text may be the answer. Templates see them as `answer_choices`.
        inverted: the sides are turned around: a part of what is usually given is the answer.
        split: `held_out` wordings are never used to build training data.
        strip: take white space from both ends of both sides, as PromptSource does.
        where: the file and the template, for messages.
    """

    id: str
    jinja: str
    choices: tuple[str, ...] | str | None = None
    inverted: bool = False
    split: Literal["train", "held_out"] = "train"
    metrics: tuple[str, ...] = ()
    choices_in_prompt: bool | None = None
    reference: str = ""
    strip: bool = False
    where: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: it compiles for itself."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @cached_property
    def compiled(self) -> Compiled:
        """The template, compiled. Raises ConfigError."""
        return SANDBOX.compiled(self.jinja, where=self.where or self.id)

    @cached_property
    def compiled_choices(self) -> Compiled | None:
        """The text of `choices`, compiled; None where they are a list or missing. Raises ConfigError."""
        if not isinstance(self.choices, str):
            return None
        return SANDBOX.compiled(self.choices, where=f"{self.where or self.id}, choices")

    @cached_property
    def names(self) -> frozenset[str]:
        """The fields of a row that the template and its choices read."""
        choices = self.compiled_choices
        return (self.compiled.names | (choices.names if choices else frozenset())) - RENDERED

    @property
    def names_options(self) -> bool:
        """The template says itself where the list of choices stands."""
        return bool(self.compiled.names & {"options_", "options_str"})

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of the wording, which tell two versions of one id apart."""
        return hashlib.sha256(f"{self.jinja}\0{self.choices}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Bank:
    """The templates of one task."""

    task: str
    templates: tuple[Template, ...]
    cluster: str = ""
    fields: tuple[str, ...] = ()  # () where the file declares none
    licence: str | None = None
    where: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict, hash=False)  # what a reader could not take: name -> reason

    def of_split(self, split: str) -> tuple[Template, ...]:
        """Return the templates of a split, or all for `all`. Raises ConfigError for an unknown or empty one."""
        if split == "all":
            return self.templates
        if split not in SPLITS:
            raise ConfigError(f"unknown split '{split}'", where=self.where, remedy=nearest(split, (*SPLITS, "all")))
        chosen = tuple(t for t in self.templates if t.split == split)
        if not chosen:
            raise ConfigError(
                f"no template of task '{self.task}' is in the split '{split}'",
                where=self.where,
                remedy=f"Give at least one template 'split: {split}', or use split: all.",
            )
        return chosen

    def check(self, *, repeated: bool = False) -> None:
        """Compile every template and hold the rules of a bank; `repeated` allows a wording to occur twice.

        Raises ConfigError naming the template.
        """
        if not self.templates:
            raise ConfigError("the bank has no templates", where=self.where, remedy="Add at least one.")
        ids: dict[str, Template] = {}
        wordings: dict[str, str] = {}
        for template in self.templates:
            if template.id in ids:
                problem = f"two templates have the id '{template.id}'"
                raise ConfigError(problem, where=self.where, remedy="Give each template an id of its own.")
            ids[template.id] = template
            wording = " ".join(template.jinja.split())
            if wording in wordings and not repeated:
                problem = f"the templates '{wordings[wording]}' and '{template.id}' have the same wording"
                raise ConfigError(problem, where=self.where, remedy="Remove one of them.")
            wordings[wording] = template.id
            self._check_template(template)

    def _check_template(self, template: Template) -> None:
        unknown = sorted(template.names - set(self.fields)) if self.fields else []
        if unknown:
            problem = f"reads the field '{unknown[0]}', which is not among the fields of the bank"
            raise ConfigError(problem, where=template.where, remedy=nearest(unknown[0], self.fields))
        sides = template.jinja.split(SEPARATOR)
        if len(sides) < 2:
            remedy = "Write what is asked, then |||, then the answer."
            raise ConfigError(f"has no separator '{SEPARATOR}'", where=template.where, remedy=remedy)
        if len(sides) == 2:  # more of them may stand in the branches of a condition: the renderer counts what is left
            for name, side in zip(("input", "target"), sides, strict=True):
                if not side.strip():
                    raise ConfigError(f"the {name} is empty", where=template.where, remedy=f"Write the {name}.")
        if isinstance(template.choices, tuple):
            check_choices(template.choices, where=template.where)


def check_choices(choices: Sequence[str], *, where: str, error: type = ConfigError) -> None:
    """Refuse choices that are empty or occur twice, with `error` placed at `where`."""
    for number, choice in enumerate(choices):
        if not choice.strip():
            raise error(f"choice {number + 1} is empty", where=where, remedy="Fill it in, or leave it out.")
        if choice in choices[:number]:
            raise error(f"the choice '{choice[:80]}' occurs twice", where=where, remedy="Leave one of them out.")


def read_text(path: Path) -> str:
    """Return the text of a file of templates, patterns or a build's config. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise ConfigError(problem, where=str(path), remedy="Check the path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", where=str(path), remedy="Save it as UTF-8.") from error


def read_bank(path: Path) -> Bank:
    """Read a bank in mmit's own layout (see the module docstring). Raises ConfigError."""
    where = str(path)
    rows, _ = parse_yaml(read_text(path), where=where)
    _check_keys(rows, _BANK_KEYS, where)
    task = rows.get("task")
    if not isinstance(task, str) or not task:
        raise ConfigError("'task' is missing", where=where, remedy="Name the task, e.g. task: shape")
    fields = _texts(rows.get("fields", []), "fields", where)
    shared = _choices(rows.get("choices"), where)
    listed = rows.get("templates")
    if not isinstance(listed, list):
        raise ConfigError("'templates' is missing or no list", where=where, remedy="List the templates.")
    templates = tuple(_template(row, number, where, shared) for number, row in enumerate(listed, 1))
    cluster, licence = rows.get("cluster") or "", rows.get("licence")
    return Bank(task, templates, cluster=cluster, fields=fields, licence=licence, where=where)


def _template(row: Any, number: int, where: str, shared: tuple[str, ...] | str | None) -> Template:
    place = f"{where}, template {number}"
    _check_keys(row, _TEMPLATE_KEYS, place)
    name = str(row.get("id") or number)
    place = f"{where}#{name}"
    for side in ("input", "target"):
        if not isinstance(row.get(side), str):
            raise ConfigError(f"'{side}' is missing or no text", where=place, remedy=f"Write the {side} as Jinja text.")
        if SEPARATOR in row[side]:
            raise ConfigError(f"'{side}' holds '{SEPARATOR}'", where=place, remedy="Write the sides without it.")
    for key in ("inverted", "choices_in_prompt"):
        if not isinstance(row.get(key, False), bool):
            raise ConfigError(f"'{key}' is {row[key]!r}", where=place, remedy="Write true or false.")
    split = row.get("split", "train")
    if split not in SPLITS:
        raise ConfigError(f"unknown split '{split}'", where=place, remedy=nearest(str(split), SPLITS))
    own = row.get("choices")
    return Template(
        id=name,
        jinja=f"{row['input']}{SEPARATOR}{row['target']}",
        choices=_choices(own, place) if "choices" in row else shared,
        inverted=row.get("inverted", False),
        split=split,
        metrics=_texts(row.get("metrics", []), "metrics", place),
        choices_in_prompt=row.get("choices_in_prompt"),
        reference=str(row.get("reference") or ""),
        where=place,
    )


def _choices(value: Any, where: str) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    return _texts(value, "choices", where)


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"'{key}' is no list of texts", where=where, remedy=f"Write {key}: [a, b].")
    return tuple(value)


def _check_keys(row: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(row, dict):
        raise ConfigError(f"is a {type(row).__name__}, not a mapping", where=where, remedy=f"Keys: {', '.join(keys)}.")
    for key in row:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}'", where=where, remedy=nearest(str(key), keys))
