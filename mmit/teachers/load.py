"""Teachers by what a config says: `open: local:FOLDER`, `open: https://HOST/v1#MODEL`, `open: replay:JOURNAL`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.errors import ConfigError, nearest
from mmit.teachers.endpoint import Endpoint
from mmit.teachers.journal import Replay

if TYPE_CHECKING:
    from mmit.teachers.request import Teacher

SHARED = ("open", "name", "terms", "price")
OPTIONS = {
    "endpoint": ("key_env", "in_flight", "per_minute", "tokens_per_minute", "tries", "pause", "deadline"),
    "local": ("batch_size", "window", "device"),
    "replay": ("only", "lenient"),
}
_FORMS = "Write open: local:FOLDER, open: https://HOST/v1#MODEL, or open: replay:JOURNAL."


def open_teachers(described: Any, *, folder: str = "", lenient: bool = False) -> list[Teacher]:
    """Open one teacher or a list of them. Raises ConfigError.

    Args:
        described: a text such as `local:runs/quickstart`, a mapping with `open` and options, or a list of these.
        folder: what a relative path of a journal starts from. A model's folder starts at the working directory, as in
            every other command.
        lenient: replayed teachers drop what is not recorded.
    """
    if not described:
        raise ConfigError("'teacher' is missing", where="teacher", remedy=_FORMS)
    listed = described if isinstance(described, list) else [described]
    teachers = [_open({"open": one} if isinstance(one, str) else one, folder) for one in listed]
    if lenient:
        replayed = [teacher for teacher in teachers if isinstance(teacher, Replay)]
        if not replayed:
            remedy = "Leave it out, or open: replay:JOURNAL."
            raise ConfigError("--lenient is for replayed teachers", where="teacher", remedy=remedy)
        for teacher in replayed:
            teacher.lenient = True
    names = [teacher.name for teacher in teachers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two teachers are named '{twice[0]}'", where="teacher", remedy="Give each a name.")
    return teachers


def _open(described: Any, folder: str) -> Teacher:
    if not isinstance(described, Mapping) or not isinstance(described.get("open"), str):
        raise ConfigError(f"cannot tell which teacher is meant by {described!r}", where="teacher", remedy=_FORMS)
    spec = described["open"]
    kind, _, rest = spec.partition(":")
    kind = "endpoint" if kind in ("http", "https") else kind
    if kind not in OPTIONS or not rest:
        raise ConfigError(f"cannot open '{spec}'", where="teacher.open", remedy=_FORMS)
    known = (*SHARED, *OPTIONS[kind])
    for key in described:
        if key not in known:
            raise ConfigError(
                f"unknown key '{key}' of teacher {spec}", where="teacher", remedy=nearest(str(key), known)
            )
    options = {key: value for key, value in described.items() if key != "open" and value is not None}
    _check_types(options)
    if kind == "endpoint":
        url, _, model = spec.partition("#")
        return Endpoint(url, model, **options)
    if kind == "replay":
        path = Path(folder) / rest
        return Replay(path, **options)
    from mmit.teachers.local import Local  # which imports torch

    return Local(rest, **options)


def _check_types(options: Mapping[str, Any]) -> None:
    kinds = {field.name: str(field.type) for field in fields(Endpoint)} | {"batch_size": "int", "window": "int"}
    for key, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kinds.get(key) in ("int", "float") and (not number or value < 0):
            raise ConfigError(f"{key} is {value!r}", where="teacher", remedy="Give a number, 0 or more.")
        if kinds.get(key) == "int" and not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{key} is {value!r}", where="teacher", remedy="Give a whole number, 1 or more.")
    if not isinstance(options.get("lenient", False), bool):
        raise ConfigError(f"lenient is {options['lenient']!r}", where="teacher", remedy="Write true or false.")
    price = options.get("price", {})
    if not isinstance(price, Mapping) or not price.keys() <= {"input", "output"}:
        remedy = "Write price: {input: 0.15, output: 0.6}, per million tokens."
        raise ConfigError(f"price is {price!r}", where="teacher.price", remedy=remedy)
