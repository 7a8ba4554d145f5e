"""The list of choices behind a question, in several styles, in an order that the answer does not depend on.

In: choices and a generator. Out: the text to append, and what to answer for each choice. Styles: FLAN's dashes
("OPTIONS:" and "- a"), numbers ("1. a") and letters ("A. a"). With `answer="mark"` the answer is the letter or number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmit.errors import ConfigError, nearest

STYLES = ("dashes", "numbers", "letters")
ANSWERS = ("text", "mark")
_BY_MARK = {
    "letters": "Answer with the option's letter from the given choices directly.",
    "numbers": "Answer with the option's number from the given choices directly.",
}


@dataclass(frozen=True)
class Options:
    """A list of choices as it is shown."""

    style: str
    text: str
    answers: Mapping[str, str]  # choice -> what to answer
    order: tuple[str, ...]


@dataclass(frozen=True)
class OptionStyle:
    """How choices are shown: the share of questions that show them, in which styles, and what is answered.

    Raises ConfigError for a share outside [0, 1] and unknown styles.
    """

    share: float = 0.0
    styles: tuple[str, ...] = ("dashes",)
    answer: str = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"is {self.share}", where="options.share", remedy="Give a number from 0 to 1.")
        if not self.styles:
            raise ConfigError("is empty", where="options.styles", remedy=f"Name some of {', '.join(STYLES)}.")
        for style in self.styles:
            if style not in STYLES:
                raise ConfigError(f"unknown style '{style}'", where="options.styles", remedy=nearest(style, STYLES))
        if self.answer not in ANSWERS:
            raise ConfigError(f"is '{self.answer}'", where="options.answer", remedy=nearest(self.answer, ANSWERS))
        if self.answer == "mark" and "dashes" in self.styles:
            remedy = "Use the styles letters and numbers, or options.answer: text."
            raise ConfigError("dashes have no mark to answer with", where="options.answer", remedy=remedy)


def shown(choices: Sequence[str], style: str, *, rng: random.Random, answer: str = "text") -> Options:
    """Lay the choices out in random order.

    Args:
        choices: their texts. style: letters, numbers or dashes. rng: the random numbers.
        answer: what an answer is: "text" of the choice, or its "mark".

    Raises:
        ConfigError: more than 26 choices in letters.
    """
    order = list(choices)
    rng.shuffle(order)
    if style == "letters" and len(order) > 26:
        problem = f"{len(order)} choices cannot be lettered"
        raise ConfigError(problem, where="options.styles", remedy="Use the style numbers.")
    marks = [chr(65 + i) if style == "letters" else str(i + 1) for i in range(len(order))]
    if style == "dashes":
        lines = ["OPTIONS:", *(f"- {choice}" for choice in order)]
    else:
        lines = [f"{mark}. {choice}" for mark, choice in zip(marks, order, strict=True)]
    answers = dict(zip(order, marks if answer == "mark" else order, strict=True))
    if answer == "mark":
        lines.append(_BY_MARK[style])
    return Options(style, "\n".join(lines), answers, tuple(order))
