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
    below: float = math.inf
    choices: tuple[Any, ...] = ()

    def check(self, value: Any, *, where: str) -> None:
        """Raise ModelError unless `value` is of the kind, within the limits and among the choices."""
        if self.choices and value not in self.choices:
            raise ModelError(f"is {value!r}", where=where, remedy=nearest(str(value), [str(c) for c in self.choices]))
        types, what = EXPECTED[self.kind]
        # The exact type: True is an int in Python, and 1.0 no number of layers.
        wrong = not self.choices and (type(value) not in types)
        if wrong or (self.kind in ("whole", "number") and not self.least <= value < self.below):
            limits = f", {self.least:g} or more" if self.least > -math.inf else ""
            limits += f" and below {self.below:g}" if self.below < math.inf else ""
            raise ModelError(f"is {value!r}", where=where, remedy=f"give {what}{limits}")


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
