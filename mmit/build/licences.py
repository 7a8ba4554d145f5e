"""Licences of built rows: SPDX expressions, combined from all that a row is made of, and held against a list.

A row made of several things carries the terms of all of them: `MIT AND CC-BY-4.0`. What is not allowed by name stops
the build: terms that forbid commercial use, copyleft, and unknown terms as well as any other licence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mmit.errors import ConfigError

UNKNOWN = "LicenseRef-unknown"
_TERM = re.compile(r"[A-Za-z0-9.+-]+")
_SPLIT = re.compile(r"\s+AND\s+")


def combined(licences: Iterable[str | None]) -> str:
    """Return the expression of all licences together; None stands for unknown terms."""
    terms: dict[str, None] = {}
    for licence in licences:
        for term in terms_of(licence):
            terms[term] = None
    return " AND ".join(sorted(terms)) or UNKNOWN


def terms_of(licence: str | None) -> list[str]:
    """Return the terms that must all be met; an OR inside stays one term, in brackets."""
    if licence is None or not licence.strip():
        return [UNKNOWN]
    return [
        term.strip() if " OR " not in term or term.strip().startswith("(") else f"({term.strip()})"
        for term in _SPLIT.split(licence.strip())
    ]


def check_allowed(counts: Counter[str], allowed: Sequence[str] | None, *, where: str) -> None:
    """Refuse rows whose terms are not on the list; None allows everything but what forbids or requires something.

    Args:
        counts: rows by licence expression.
        allowed: SPDX names. A choice such as `(MIT OR GPL-3.0-only)` is met by any of its names.

    Raises:
        ConfigError: lists each term that is not allowed with its rows.
    """
    refused: Counter[str] = Counter()
    for expression, rows in counts.items():
        for term in terms_of(expression):
            if not _allowed(term, allowed):
                refused[term] += rows
    if refused:
        listed = ", ".join(f"{term} ({rows:,} rows)" for term, rows in refused.most_common())
        remedy = f"Leave these rows out, or allow their terms by name: allow_licences: [{', '.join(refused)}]"
        raise ConfigError(f"terms that are not allowed: {listed}", where=where, remedy=remedy)


def check_stated(stated: Mapping[str, str | None], allowed: Sequence[str] | None) -> None:
    """Refuse, before a record is made, what states no licence, unless unknown terms are allowed by name.

    Args:
        stated: where -> the licence that it states, None for none.

    Raises:
        ConfigError: naming the first that states none, and what to write there.
    """
    for where, licence in stated.items():
        if UNKNOWN in terms_of(licence) and not _allowed(UNKNOWN, allowed):
            problem = f"terms that are not allowed: {UNKNOWN}, for it states no licence"
            remedy = f"Write `licence: CC-BY-4.0`, or whichever applies, into it; or allow_licences: [{UNKNOWN}]."
            raise ConfigError(problem, where=where, remedy=remedy)


def _allowed(term: str, allowed: Sequence[str] | None) -> bool:
    names = [name for name in _TERM.findall(term) if name not in ("OR", "WITH")]
    if allowed is not None:
        return term in allowed or any(name in allowed for name in names)
    return any(not _restrictive(name) for name in names)


def _restrictive(name: str) -> bool:
    """Non-commercial terms, copyleft of software, and terms nobody stated."""
    upper = name.upper()
    return "-NC" in upper or "GPL" in upper or name == UNKNOWN
