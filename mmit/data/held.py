"""What records hold, counted for reports: system texts, thoughts, tools, weights, pictures beside the text.

In: records as they pass. Out: lines for a reader who wants to see what an importer understood and what carries loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mmit.records import Image, Record, Text

_ORDER: tuple[str, ...] = ("system turn", "user turn", "assistant turn", "tool turn", "image", "thought", "tool call")
_ORDER += ("record with tools", "record with template arguments", "record with a rejected answer")
_ORDER += ("record with an answer labelled good", "record with an answer labelled bad")


class Held:
    """Counts over records; `lines` tells them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.weights: Counter[tuple[str, float]] = Counter()

    def watch(self, rows: Iterator[Any]) -> Iterator[Any]:
        """Pass rows on, and count those that are records."""
        for row in rows:
            if isinstance(row, Record):
                self.take(row)
            yield row

    def take(self, record: Record) -> None:
        """Count one record."""
        for turn in record.turns:
            self.counts[f"{turn.role} turn"] += 1
            self.counts["thought"] += turn.thinking is not None
            self.counts["tool call"] += len(turn.tool_calls)
            self.counts["image"] += sum(isinstance(part, Image) for part in turn.parts)
            spans = [part.weight for part in turn.parts if isinstance(part, Text) and part.weight is not None]
            for weight in spans:
                self.weights[f"span of {turn.role} turns", float(weight)] += 1
            if turn.weight is not None:
                self.weights[f"{turn.role} turn", float(turn.weight)] += 1
        self.counts["record with tools"] += bool(record.tools)
        self.counts["record with template arguments"] += bool(record.template_args)
        self.counts["record with a rejected answer"] += record.rejected is not None
        if record.label is not None:
            self.counts[f"record with an answer labelled {'good' if record.label else 'bad'}"] += 1
        if record.weight != 1:
            self.weights["record", float(record.weight)] += 1

    def lines(self, most: int = 8) -> list[str]:
        """Return "read: 3 user turns, ..." and, where data states weights, "loss weights: 0 on 2 assistant turns"."""
        found = [_of(self.counts[name], name) for name in _ORDER if self.counts[name]]
        out = [f"read: {', '.join(found)}"] if found else []
        if self.weights:
            told = [f"{weight:g} on {_of(n, what)}" for (what, weight), n in self.weights.most_common(most)]
            more = f" and {len(self.weights) - most} more" if len(self.weights) > most else ""
            out.append(f"loss weights: {', '.join(told)}{more}; all other answers 1")
        return out


def _of(count: int, what: str) -> str:
    if count == 1:
        return f"1 {what}"
    head, middle, tail = what.partition(" with " if " with " in what else " of ")
    return f"{count:,} {head}s{middle}{tail}"
