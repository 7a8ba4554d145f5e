"""Every error a user can meet: where it is, what is wrong, what to do about it.

Owns the exception types of mmit and the wording of "unknown key" messages. Nothing in mmit raises a bare
ValueError at a user; a traceback that reaches a person is a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class MmitError(Exception):
    """One clear error. `where` is a file, row or key; `remedy` is an instruction the user can follow."""

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        super().__init__("\n".join(filter(None, [f"{where}: {problem}" if where else problem, remedy])))

    @property
    def facts(self) -> list[str]:
        """Class name, problem, place and remedy: what `from_facts` makes the error of again."""
        return [type(self).__name__, self.problem, self.where, self.remedy]


class RecordError(MmitError):
    """A record breaks the rules of the record format, or does not fit the model."""


class TooLong(RecordError):
    """A record that a model's context has no room for."""


class ImageError(RecordError):
    """A picture is missing, unreadable, of a refused format or too large."""


class ConfigError(MmitError):
    """A configuration key or value is unknown, missing or contradicts another."""


class ModelError(MmitError):
    """A model component cannot be built or its parts do not fit together."""


class CheckpointError(MmitError):
    """A checkpoint folder is incomplete, changed since it was written, or of another model."""


class WriteError(MmitError):
    """A file cannot be written: the disk is full or broken, or the folder is closed to this user."""


def from_facts(facts: Sequence[str]) -> Any:
    """Make an error of its `facts`; an MmitError where its class is not known."""
    name, problem, where, remedy = facts
    kind: Any = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, MmitError)):
        kind = MmitError
    return kind(problem, where=where, remedy=remedy)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean 'x'? valid: a, b, c" for an unknown `word`."""
    valid = sorted(choices)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}valid: {', '.join(valid)}"


@contextmanager
def located(place: str) -> Iterator[None]:
    """Put `place`, the config key that is at work, in front of where an MmitError inside arose."""
    try:
        yield
    except MmitError as error:
        where = f"{place}: {error.where}" if error.where else place
        raise type(error)(error.problem, where=where, remedy=error.remedy) from error
