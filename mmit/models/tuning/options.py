"""Options of tuning methods: which a method takes, what each may be, and an error that says so.

In: the `options` of one component as plain data. Out: every option of the method, defaults filled in. Knows no
method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmit.errors import ModelError, nearest

Kind = Literal["whole", "number", "flag", "text", "names", "numbers"]
EXPECTED: dict[Kind, tuple[tuple[type, ...], str]] = {
    "whole": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "flag": ((bool,), "true or false"),
    "text": ((str,), "a text"),
    "names": ((list, tuple, str), "a list of names, or one text"),
    "numbers": ((list, tuple), "a list of whole numbers"),
}


@dataclass(frozen=True, slots=True)
class Option:
    """What one option may be; a value of None means its default."""

    default: Any
    kind: Kind
    least: float = -math.inf
    above: float = -math.inf  # as `least`, and not this number itself
    below: float = math.inf
    choices: tuple[Any, ...] = ()

    def check(self, value: Any, *, where: str) -> None:
        """Raise ModelError unless `value` is of the kind, within the limits and among the choices."""
        if self.choices and value not in self.choices:
            raise ModelError(f"is {value!r}", where=where, remedy=nearest(str(value), [str(c) for c in self.choices]))
        types, what = EXPECTED[self.kind]
        # The exact type: True is an int in Python, and 1.0 no number of layers.
        wrong = not self.choices and (type(value) not in types or not _entries(value, self.kind))
        number = self.kind in ("whole", "number")
        if wrong or (number and not (self.least <= value < self.below and value > self.above)):
            limits = f", {self.least:g} or more" if self.least > -math.inf else ""
            limits += f", more than {self.above:g}" if self.above > -math.inf else ""
            limits += f" and below {self.below:g}" if self.below < math.inf else ""
            raise ModelError(f"is {value!r}", where=where, remedy=f"give {what}{limits}")


def _entries(value: Any, kind: Kind) -> bool:
    """Whether the entries of a list can be; an empty one would choose nothing, or everything, without a word."""
    if kind not in ("names", "numbers"):
        return True
    entry = str if kind == "names" else int
    return bool(value) and (isinstance(value, str) or all(type(v) is entry and v != "" for v in value))


Options = Mapping[str, Option]


def read_options(
    given: Mapping[str, Any], allowed: Options, *, mode: str, where: str, others: Mapping[str, Options]
) -> dict[str, Any]:
    """Fill in the defaults of a method's options.

    Args:
        given: what the config says.
        allowed: the options of the method.
        mode, where: its name and the place of its options in the config, for messages.
        others: options of every mode of the component, to recognise one that belongs elsewhere.

    Raises:
        ModelError: an option the method does not take, or a value it cannot be.
    """
    for key, value in given.items():
        if key not in allowed:
            owners = [name for name, options in others.items() if key in options]
            remedy = nearest(key, allowed) if allowed else f"mode '{mode}' takes no options"
            if owners:
                remedy += f"; it is an option of {', '.join(owners)}: replace the options together with the mode"
            raise ModelError(f"mode '{mode}' has no option '{key}'", where=where, remedy=remedy)
        if value is not None:
            allowed[key].check(value, where=f"{where}.{key}")
    return {key: option.default if given.get(key) is None else given[key] for key, option in allowed.items()}
