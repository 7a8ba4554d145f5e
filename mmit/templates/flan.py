"""FLAN's patterns (Wei et al. 2021, arXiv:2109.01652): the literal PATTERNS of its templates.py.

Takes the Python file and a key, gives a Bank. The file is parsed, never run: only assignments whose value is a literal
are read, and `skipped` of the bank names the others. A pattern's `{field}` becomes a Jinja field. A target that differs
from most of its key's targets is FLAN's "turned around" kind and is marked as inverted.
"""

from __future__ import annotations

import ast
import string
from collections import Counter
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, nearest
from mmit.templates.bank import SEPARATOR, Bank, Template, read_text

NAME = "PATTERNS"


def read_patterns(path: Path, *, name: str = NAME) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the literal mapping `name` of a Python file, and the assignments that are no literals with the reason.

    Raises ConfigError.
    """
    where = str(path)
    try:
        tree = ast.parse(read_text(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not Python: {error}", where=where, remedy="Give FLAN's templates.py.") from error
    found: dict[str, Any] | None = None
    skipped: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            text = ast.unparse(target)
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError, RecursionError, MemoryError):
                skipped[text] = "its value is computed, not a literal"
                continue
            if text == name and isinstance(value, dict):
                found = value
    if found is None:
        remedy = f"Computed tables cannot be read without running the file. {name} must be a literal mapping."
        raise ConfigError(f"has no literal mapping '{name}'", where=where, remedy=remedy)
    return found, skipped


def read_flan(path: Path, key: str) -> Bank:
    """Read the patterns of one key. Raises ConfigError."""
    patterns, skipped = read_patterns(path)
    where = str(path)
    if key not in patterns:
        problem = f"has no patterns for '{key}'" if key else "has patterns for many tasks; name one"
        raise ConfigError(problem, where=where, remedy=f"Write flan:{path}#KEY; {nearest(key, list(patterns))}")
    rows = patterns[key]
    usual = Counter(target for _, target in rows).most_common(1)[0][0]
    templates = tuple(
        Template(
            id=f"{key}-{number}",
            jinja=f"{_jinja(asked, where)}{SEPARATOR}{_jinja(target, where)}",
            inverted=target != usual,
            reference="FLAN",
            where=f"{where}#{key}-{number}",
        )
        for number, (asked, target) in enumerate(rows, 1)
    )
    return Bank(key, templates, licence="Apache-2.0", where=f"{where}#{key}", skipped=skipped)


def _jinja(pattern: str, where: str) -> str:
    """A pattern of str.format as Jinja text."""
    parts: list[str] = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(pattern):
            # A brace or ||| of the pattern's own text must not be read as Jinja's or as the separator.
            parts.append(f"{{{{ {literal!r} }}}}" if "{" in literal or SEPARATOR in literal else literal)
            if field is not None:
                if not field.isidentifier() or spec or conversion:
                    raise ValueError(f"the field '{field}' is not a plain name")
                parts.append(f"{{{{ {field} }}}}")
    except ValueError as error:
        problem = f"a pattern cannot be read: {error}: {pattern[:80]!r}"
        raise ConfigError(problem, where=where, remedy="Fix it.") from error
    return "".join(parts)
