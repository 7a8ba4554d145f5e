"""One word for one thing: docs/glossary.md says which; here the other words are held to be gone, or to become fewer."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trees import nodes_of

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "mmit").rglob("*.py"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GONE = re.compile(r"(?i)\b(?:mend(?:s|ed|ing)?|bundles?)\b|\bthe eye\b")
# Names of several things once; each is one class now.
ONE_CLASS = ("Shown", "SampledRow", "Row", "Plan", "Layout", "Encoder", "State")
# Identifiers that still say picture where the glossary says image.
PICTURES = 92


@functools.cache
def defined(path: Path) -> tuple[tuple[str, str], ...]:
    """Names that a module defines, with the kind: class, function, argument, variable."""
    return tuple(_defined(path))


def _defined(path: Path) -> Iterator[tuple[str, str]]:
    for node in nodes_of(path):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield type(node).__name__, node.name
        elif isinstance(node, ast.arg):
            yield "arg", node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield "variable", node.id


@pytest.mark.parametrize("path", [*SOURCES, *PROSE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_that_are_gone(path: Path) -> None:
    text = path.read_text("utf-8")
    if path.name == "glossary.md":
        text = "\n".join(line.rsplit("|", 2)[0] for line in text.splitlines())  # its last column lists them
    assert [found[0] for found in GONE.finditer(text)] == []


def test_a_class_name_stands_for_one_thing() -> None:
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        for kind, name in defined(path):
            if kind == "ClassDef" and name in ONE_CLASS:
                where.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_pictures_become_fewer() -> None:
    found = {(path, name) for path in SOURCES for _, name in defined(path) if "picture" in name.lower()}
    assert len(found) <= PICTURES, "say image in new names (docs/glossary.md)"


def test_the_glossary_has_a_line_for_each_word_once() -> None:
    words = re.findall(r"^\| (\w[\w -]*) \|", (ROOT / "docs" / "glossary.md").read_text("utf-8"), re.M)
    assert len(words) == len(set(words)) > 15
