"""Sections of a config: strict typed data, help on every key, and validation errors in words.

In: subclasses of `Section` (the text under a field is its help), and plain data that failed to become one.
Out: lines of help, or one `ConfigError` naming every wrong key with its place, value and what was expected.
Also lets the mode of a section be switched in one line, together with the options that belong to it.
Knows nothing of any particular section.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from mmit.errors import ConfigError, nearest
from mmit.yamlio import Keys, inline_yaml, set_key


class Section(BaseModel):
    """Base of all sections: unknown keys refused, nothing coerced ("8" is not 8), immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Entry(NamedTuple):
    """One line of help."""

    key: str
    type: str
    default: str
    help: str


def describe(section: type[Section], *, prefix: str = "", defaults: Section | None = None) -> Iterator[Entry]:
    """Yield every key that can be set, in order; entries of a list are written `data.train.0.path`."""
    for name, field in section.model_fields.items():
        default = field.default if defaults is None else getattr(defaults, name)
        inner, is_list = _section_in(field.annotation), get_origin(field.annotation) is list
        # A section with a default of its own is told by its keys; an optional one or a list has a line too.
        if inner is None or is_list or default is None:
            if field.is_required():
                shown = "required"
            else:
                shown = inline_yaml(list(default) if isinstance(default, tuple) else default)
            kind = _type_text(field.annotation, field.metadata)
            yield Entry(f"{prefix}{name}", kind, shown, " ".join((field.description or "").split()))
        if inner is not None:
            below = default if isinstance(default, Section) else None
            yield from describe(inner, prefix=f"{prefix}{name}." + ("0." if is_list else ""), defaults=below)


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section class in `Section`, `Section | None` or `list[Section]`."""
    # In Python 3.10 list[...] is an instance of type that no issubclass takes.
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = [section for part in get_args(annotation) if (section := _section_in(part))]
    return found[0] if found else None


_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}
_BOUNDS: dict[type, list[tuple[str, str]]] = {
    Ge: [(">=", "ge")],
    Gt: [(">", "gt")],
    Le: [("<=", "le")],
    Lt: [("<", "lt")],
}


def _type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type as a person would say it: "whole number > 0 or null"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(args[0], args[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(arg) for arg in args)
    if origin is Literal:
        return " | ".join(args)
    if origin is tuple:
        return f"[{', '.join(_type_text(arg) for arg in args)}]"
    notes = [note for item in metadata for note in (item.metadata if isinstance(item, FieldInfo) else [item])]
    if origin is list:
        least = "non-empty " if any(isinstance(note, MinLen) for note in notes) else ""
        plural = "" if get_origin(args[0]) is Literal else "s"
        return f"{least}list of {_type_text(args[0])}{plural}"
    if origin is dict:
        return "mapping with text keys"
    bounds = [f"{sign} {getattr(note, key)}" for note in notes for sign, key in _BOUNDS.get(type(note), ())]
    return " ".join([_TYPES.get(annotation, "section"), ", ".join(bounds)]).rstrip()


def config_error(
    error: ValidationError,
    section: type[Section],
    raw: Any,
    *,
    where: str = "",
    origins: Mapping[Keys, str] | None = None,
) -> ConfigError:
    """Say in words why plain data is not a section.

    Args:
        error: pydantic's. section: the class. raw: the data.
        where: file of the section. origins: file and line of each key.

    Returns:
        the error to raise: one problem with its place, or a list of all.
    """
    origins = origins or {}
    found: dict[str, tuple[str, str]] = {}
    for item in error.errors():
        path, problem = _explain(dict(item), section, raw)
        dotted = ".".join(map(str, path))
        nearby = (path[:size] for size in range(len(path), 0, -1))
        place = next((origins[keys] for keys in nearby if keys in origins), where)
        # A union reports once per member type; the first says it all.
        found.setdefault(dotted, (place, f"{dotted}: {problem}" if dotted else problem))
    if len(found) == 1:
        ((place, problem),) = found.values()
        return ConfigError(problem, where=place)
    listed = "".join(f"\n  {place}: {text}" if place else f"\n  {text}" for place, text in found.values())
    return ConfigError(f"{len(found)} problems{listed}", where=where)


def _explain(item: dict[str, Any], root: type[Section], raw: Any) -> tuple[Keys, str]:
    """Return the key path of one pydantic error, free of its union tags, and the problem in words."""
    path: Keys = ()
    annotation: Any = root
    metadata: list[Any] = []
    for key in item["loc"]:
        section = _section_in(annotation)
        if section is None:
            break
        path = (*path, key)
        if isinstance(key, int) and get_origin(annotation) is list:
            annotation, metadata = section, []
        elif (field := section.model_fields.get(str(key))) is not None:
            annotation, metadata = field.annotation, field.metadata
        else:
            value = brief(_value_at(raw, path))
            return path, f"unknown key (value {value}); {nearest(str(key), section.model_fields)}"
    value, expected = _value_at(raw, path), _type_text(annotation, metadata)
    if item["type"] == "missing":
        return path, f"required ({expected}) but missing"
    if item["type"] == "value_error":
        return path, str(item["ctx"]["error"])
    if get_origin(annotation) is Literal and isinstance(value, str):
        return path, f"unknown value '{value}'; {nearest(value, get_args(annotation))}"
    unquoted = "text" in expected and isinstance(value, (int, float))
    hint = "; put it in quotes to make it text" if unquoted else ""
    section = _section_in(annotation)
    if value is None and section and not any(field.is_required() for field in section.model_fields.values()):
        hint = "; leave the key out for its defaults"
    return path, f"expected {expected}, got {brief(value)}{hint}"


def _value_at(raw: Any, path: Keys) -> Any:
    for key in path:
        try:
            raw = raw[key]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def without_old_options(
    raw: dict[str, Any], below: dict[str, Any], from_above: Callable[[Keys], bool], modes: Mapping[Keys, str]
) -> tuple[dict[str, Any], list[str]]:
    """Let a `mode` be switched in one line: options that a layer below gave to another mode fall away.

    Args:
        raw: a config with its upper layer (overrides, or a file over its base) on top. below: without that layer.
        from_above: whether the upper layer gave this key.
        modes: sections with a mode and options, and their default mode.

    Returns:
        `raw` without those options, and a line on each section that lost some.
    """
    notes = []
    for keys, default in modes.items():
        plan, plan_below = _section(raw, keys), _section(below, keys)
        options = plan.get("options")
        mode, before = plan.get("mode", default), plan_below.get("mode", default)
        if mode == before or not isinstance(options, dict):
            continue
        kept = {key: value for key, value in options.items() if from_above((*keys, "options", key))}
        if gone := [key for key in options if key not in kept]:
            raw = set_key(raw, (*keys, "options"), kept, where="")
            name = ".".join(map(str, keys))
            notes.append(f"{name}.mode is {mode} in place of {before}, so the options {', '.join(gone)} are left out")
    return raw, notes


def _section(raw: Any, keys: Keys) -> dict[str, Any]:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw if isinstance(raw, dict) else {}


def brief(value: Any) -> str:
    """Return `value` as YAML on one line, cut for a message."""
    try:
        text = inline_yaml(value)
    except yaml.representer.RepresenterError:  # an object handed over from Python
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
