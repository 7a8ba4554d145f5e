"""YAML as mmit reads and writes it, and edits of the plain data that comes out.

In: YAML text or `key=value` overrides. Out: dicts, lists and scalars, with the line each key stands on.
Scalars follow YAML 1.2, so `off` and `yes` are text and `1e-3` is a number (PyYAML's own rules are of 1.1).
Refused: aliases (an edit of one place would change another), duplicate keys, tags that build objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from yaml.composer import Composer

from mmit.errors import ConfigError

Keys = tuple[str | int, ...]
_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # No leading zeros, so that `010` is neither 8 nor 10 but text, which a number field then refuses.
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))",
        list("-+.0123456789"),
    ),
]


# libyaml, where PyYAML was built with it, finds and writes tokens several times as fast. Nodes are composed here either
# way: libyaml's own composer cannot be told to refuse aliases.
_LOADERS: Any = (Composer, yaml.CSafeLoader) if yaml.__with_libyaml__ else (yaml.SafeLoader,)
_DUMPER: Any = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper
ONE_LINE = 2**31 - 1  # libyaml counts the columns of a line in 32 bits


class _Loader(*_LOADERS):  # type: ignore[misc]
    def __init__(self, text: str) -> None:
        _LOADERS[-1].__init__(self, text)
        Composer.__init__(self)

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            number: int = super().construct_yaml_int(node)
            return number
        except ValueError:  # Python reads no number of more than some thousand digits
            problem = f"a whole number of {len(node.value):,} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor} is not supported, write the value again", event.start_mark
            )
        return super().compose_node(parent, index)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(_DUMPER):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    # Plain and single-quoted text folds line breaks; escapes keep them, and keep a key on one line.
    style = '"' if any(c in value for c in "\n\x85\u2028\u2029") else None
    scalar: yaml.Node = dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)
    return scalar


_Dumper.add_representer(str, _text)

# The dumper needs the same rules to know which texts must be quoted.
for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)


def parse_yaml(text: str, *, where: str) -> tuple[Any, dict[Keys, int]]:
    """Return the data of one YAML document and the line of every key in it. Raises ConfigError."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines = dict(_lines(node, ()))
            return (None if node is None else loader.construct_document(node)), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}" if mark and where else where
        context = f" {error.context}" if error.context else ""
        raise ConfigError(f"not valid YAML: {error.problem}{context}", where=place) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {str(error).splitlines()[0]}", where=where) from None


def _lines(node: yaml.Node | None, path: Keys) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                problem = f"key '{name}' stands here and on line {seen[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[name] = line
            yield (*path, name), line
            yield from _lines(value, (*path, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1
            yield from _lines(value, (*path, index))


def dump_yaml(data: Any) -> str:
    """Return `data` as block YAML that `parse_yaml` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def inline_yaml(value: Any) -> str:
    """Return `value` as one line of YAML, as it can stand after `key=`."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=ONE_LINE)
    return text.removesuffix("\n").removesuffix("\n...")


def merge(base: Any, over: Any) -> Any:
    """Return `base` with `over` on top: mappings key by key, anything else replaced whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) of nested mappings and lists; an empty one is a leaf itself."""
    if isinstance(data, (Mapping, list, tuple)) and data:
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, data


def parse_override(text: str) -> tuple[Keys, Any]:
    """Split `a.b.0=value`; the value is YAML. Raises ConfigError."""
    where = f"override '{text}'"
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError("not of the form key=value", where=where, remedy="Write a dotted key, e.g. train.steps=50")
    data, _ = parse_yaml(value, where=where)
    return tuple(int(part) if part.isdecimal() else part for part in parts), data


def set_key(tree: Any, keys: Keys, value: Any, *, where: str) -> Any:
    """Return `tree` with `value` at `keys`, itself left as it is; sections on the way are made.

    Args:
        tree: plain data. keys: names, and numbers of entries of lists; a list may grow by one entry.
        value: plain data. where: for the error.

    Raises:
        ConfigError: a value on the way has no keys, or a list no such entry.
    """
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(tree, list) or (tree is None and isinstance(key, int)):
        items = list(tree or [])
        if not isinstance(key, int) or key > len(items):
            raise ConfigError(
                f"'{key}' is not an entry of a list of {len(items)}",
                where=where,
                remedy=f"Use an index up to {len(items)} (which adds an entry), or set the whole list",
            )
        old = items[key] if key < len(items) else None
        return [*items[:key], set_key(old, rest, value, where=where), *items[key + 1 :]]
    if not isinstance(tree, dict) and tree is not None:
        raise ConfigError(f"'{key}' is looked up in {tree!r}, which has no keys", where=where)
    found = tree or {}
    return {**found, str(key): set_key(found.get(str(key)), rest, value, where=where)}
