"""Syntax trees of the repository's own files, which several tests look through."""

from __future__ import annotations

import ast
from pathlib import Path


def nodes_of(source: str | Path) -> list[ast.AST]:
    """All nodes of the tree of Python source, given as text or by its file."""
    return list(ast.walk(ast.parse(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)))


def dotted(node: ast.AST) -> str:
    """The source of an expression; `a.b.c` without `ast.unparse`, which takes a hundred times as long."""
    parts, inner = [], node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        return ".".join([inner.id, *reversed(parts)])
    return ast.unparse(node)
