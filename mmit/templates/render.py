"""Fields of a row -> what is asked and what is answered, by one template: the only renderer.

In: a template, a mapping of fields (images as `mmit.records.Image`), a generator. Out: `Rendered`: the parts of the
question in reading order, the answer, the choices. A template places an image by `{{ image }}`; what a field's text
holds can never become an image or the separator between question and answer. Refuses an empty side, a missing field,
choices that repeat, an answer that is none of them, an image on the answer's side, and an image that the template
leaves out.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Part, Text
from mmit.templates.bank import RENDERED, SANDBOX, SEPARATOR, Template, check_choices
from mmit.templates.options import Options, OptionStyle, shown

MAX_FIELD = 100_000  # characters of one field
# Digits between private-use characters: no filter alters them, and no text of a row can guess this process's number.
_NONCE = "".join(secrets.choice("0123456789") for _ in range(16))
_OPEN, _CLOSE = f"\ue000{_NONCE}\ue001", "\ue002"
_BAR = f"\ue003{_NONCE}\ue004"


@dataclass(frozen=True)
class Rendered:
    """One question and its answer.

    Attributes:
        parts: of the user's turn, in reading order.
        target: the answer.
        choices: the answers that the row allows; None where any text may be the answer.
        options: how they were listed; None where they were not.
    """

    parts: tuple[Part, ...]
    target: str
    choices: tuple[str, ...] | None
    options: Options | None = None


def render(
    template: Template,
    fields: Mapping[str, Any],
    *,
    rng: random.Random,
    options: OptionStyle | None = None,
    row: str = "",
) -> Rendered:
    """Render one row.

    Args:
        fields: the row's values; images are Image, a list of them where a template indexes `images`.
        rng: what decides `choice`, whether choices are listed, and in which style and order.
        options: how choices are listed; a template that writes them itself (`choices_in_prompt`) gets no list.
            Templates that name `options_` place the list; otherwise it follows the question.
        row: the row's place, for messages.

    Raises:
        RecordError: the row does not suit the template. ConfigError: the template or `options` is unusable.
    """
    images: list[Image] = []
    values = {name: _value(name, value, images, row) for name, value in fields.items()}
    if clash := sorted(RENDERED & set(values)):
        remedy = "Rename the field: templates get this name from the choices."
        raise RecordError(f"a field is named '{clash[0]}'", where=row, remedy=remedy)
    choices = _choices(template, values, rng, row)
    listed = _listed(template, choices, options, rng)
    text = "" if listed is None else listed.text
    values |= {"answer_choices": choices, "options_": text, "options_str": text}
    sides = template.compiled.render(values, rng=rng, row=row).split(SEPARATOR)
    place = f"{row}, template {template.where or template.id}" if row else f"template {template.where or template.id}"
    if len(sides) != 2:
        problem = f"renders to {len(sides)} sides, not to a question and an answer"
        raise RecordError(problem, where=place, remedy=f"Let exactly one '{SEPARATOR}' be written for every row.")
    asked, target = (side.strip() if template.strip else side for side in sides)
    if listed is not None and not template.names_options:
        asked = f"{asked}\n\n{listed.text}"
    parts = _parts(asked, images, place)
    if not target.strip():
        raise RecordError("the answer is empty", where=place, remedy="Fill the row's field, or leave the row out.")
    if _OPEN in target:
        remedy = "Place the image in the question."
        raise RecordError("the answer holds an image", where=place, remedy=remedy)
    shown_images = sum(isinstance(part, Image) for part in parts)
    if images and not shown_images and not template.inverted:
        problem = f"the row has {len(images)} image(s), and the template shows none"
        raise RecordError(problem, where=place, remedy="Write {{ image }} where the image belongs.")
    # Whether they are listed is drawn; what may be answered must not depend on that.
    if choices is not None and not template.inverted and target.strip() not in choices:
        problem = f"the answer '{target.strip()[:80]}' is not among the choices"
        raise RecordError(
            problem, where=place, remedy=f"Fix the row's label, or the choices: {', '.join(choices)[:200]}"
        )
    if listed is not None and not template.inverted:
        target = listed.answers[target.strip()]
    target = target.replace(_BAR, SEPARATOR)
    allowed = None if choices is None else tuple(choice.replace(_BAR, SEPARATOR) for choice in choices)
    return Rendered(parts, target, allowed, listed)


def ask(template: Template, fields: Mapping[str, Any], *, row: str = "") -> tuple[Part, ...]:
    """Return what a template asks, for a row whose answer is known otherwise: fields that the answer needs may lack.

    Raises:
        ConfigError: the question needs more than `fields`, or a list of choices.
    """
    question = SANDBOX.compiled(template.jinja.split(SEPARATOR)[0], where=template.where or template.id)
    if missing := sorted(question.names - set(fields)):
        known = ", ".join(fields)
        problem = f"the question needs '{missing[0]}', and of a question that is asked only {known} is known"
        raise ConfigError(problem, where=template.where or template.id, remedy="Take a template that needs no more.")
    images: list[Image] = []
    values = {name: _value(name, value, images, row) for name, value in fields.items()}
    asked = question.render(values, row=row)
    return _parts(asked.strip() if template.strip else asked, images, row)


def _value(name: str, value: Any, images: list[Image], row: str) -> Any:
    if isinstance(value, Image):
        images.append(value)
        return f"{_OPEN}{len(images) - 1}{_CLOSE}"
    if isinstance(value, str):
        if len(value) > MAX_FIELD:
            problem = f"the field '{name}' has {len(value):,} characters, at most {MAX_FIELD:,}"
            raise RecordError(problem, where=row, remedy="Cut it, or leave the row out.")
        return value.replace(SEPARATOR, _BAR)
    if isinstance(value, (list, tuple)):
        return [_value(name, item, images, row) for item in value]
    if isinstance(value, Mapping):
        return {key: _value(name, item, images, row) for key, item in value.items()}
    return value


def _choices(template: Template, values: Mapping[str, Any], rng: random.Random, row: str) -> list[str] | None:
    """The row's choices, still with the mark for `|||` in them."""
    if template.choices is None:
        return None
    compiled = template.compiled_choices
    if compiled is None:
        return list(template.choices)
    choices = [choice.strip() for choice in compiled.render(values, rng=rng, row=row).split(SEPARATOR)]
    check_choices(choices, where=f"{row}, template {compiled.where}", error=RecordError)
    return choices


def _listed(
    template: Template, choices: list[str] | None, options: OptionStyle | None, rng: random.Random
) -> Options | None:
    if template.names_options:  # FLAN's wordings count on their list
        if choices is None:
            return None
        style = options or OptionStyle(1.0)
        return shown(choices, rng.choice(style.styles), rng=rng, answer=style.answer)
    if choices is None or options is None or template.choices_in_prompt or template.inverted:
        return None
    if rng.random() >= options.share:
        return None
    return shown(choices, rng.choice(options.styles), rng=rng, answer=options.answer)


def _parts(asked: str, images: list[Image], place: str) -> tuple[Part, ...]:
    """Split the question at its image marks."""
    parts: list[Part] = []
    pieces = asked.split(_OPEN)
    for piece, first in zip(pieces, itertools.chain([True], itertools.repeat(False)), strict=False):
        text = piece
        if not first:
            number, closed, text = piece.partition(_CLOSE)
            if not closed or not number.isdigit():
                remedy = "Print {{ image }} as it is, without filters."
                raise RecordError("the template cuts an image in two", where=place, remedy=remedy)
            parts.append(images[int(number)])
        if text:
            parts.append(Text(text.replace(_BAR, SEPARATOR)))
    if not parts or not any(isinstance(p, Image) or p.text.strip() for p in parts):
        raise RecordError("the question is empty", where=place, remedy="Fill the row's fields, or leave the row out.")
    return tuple(parts)


def draw(templates: tuple[Template, ...], *, rng: random.Random, inversion: float, count: int) -> list[Template]:
    """Draw different wordings.

    Args:
        templates: of a task. rng: the random numbers. count: how many.
        inversion: probability that each is an inverted one (asks for what others give), where there are such.

    Raises:
        ConfigError: there are fewer than `count`.
    """
    if count > len(templates):
        problem = f"{count} wordings per row are asked for, the bank has {len(templates)}"
        raise ConfigError(problem, where="templates.per_row", remedy="Lower it, or add templates.")
    plain = [t for t in templates if not t.inverted]
    turned = [t for t in templates if t.inverted]
    rng.shuffle(plain)
    rng.shuffle(turned)
    drawn = []
    for _ in range(count):
        pool = turned if turned and (rng.random() < inversion or not plain) else plain or turned
        drawn.append(pool.pop())
    return drawn
