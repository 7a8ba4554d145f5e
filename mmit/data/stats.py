"""What is in a data set: counts per source, lengths, image sizes, what the loss is taken on, diversity of prompts.

Takes rows once, keeps numbers and a sample of prompts, never records; gives JSON, and histograms as PNG files. Reads
images' headers only. Judges nothing: that is the linter's part (mmit/data/lint/linter.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmit.data.chat_writer import IMAGE_SLOT, Encoded
from mmit.data.diversity import nearest_rouge_l, root_and_object
from mmit.data.image_identity import image_name
from mmit.data.images import image_size
from mmit.errors import ImageError, RecordError
from mmit.records import Image, Record

TOP_ROOTS, TOP_OBJECTS = 20, 4  # as in the figure of Self-Instruct

Encode = Callable[[Record], Sequence[Encoded]]


@dataclass
class SourceStats:
    """Of the records of one source; lengths are in characters, `tokens` with image tokens."""

    records: int = 0
    text_only: int = 0
    turns: int = 0
    images: int = 0
    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)  # of pairs
    rejected: list[int] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)  # verdicts on answers, True for good
    tokens: list[int] = field(default_factory=list)
    text_tokens: int = 0
    image_tokens: int = 0
    supervised: int = 0

    def add(self, record: Record) -> None:
        """Count a record."""
        self.records += 1
        self.turns += len(record.turns)
        self.images += len(record.images)
        self.text_only += not record.images
        for turn in record.turns:
            if turn.role != "system":
                (self.prompts if turn.role == "user" else self.answers).append(len(turn.text))
        if record.rejected is not None:
            self.chosen.append(len(record.turns[-1].text))
            self.rejected.append(len(record.rejected.text))
        if record.label is not None:
            self.labels.append(record.label)

    def add_tokens(self, encoded: Encoded, *, image_tokens: int) -> None:
        """Count one encoded sample of a record."""
        slots = encoded.ids.count(IMAGE_SLOT)
        self.text_tokens += len(encoded.ids) - slots
        self.image_tokens += slots * image_tokens
        self.supervised += sum(encoded.supervised)
        # A slot stands for all tokens of its image.
        self.tokens.append(len(encoded.ids) + slots * (image_tokens - 1))

    def to_json(self) -> dict[str, Any]:
        """Return counts and summaries of lengths."""
        out: dict[str, Any] = {
            "records": self.records,
            "text_only": self.text_only,
            "turns": self.turns,
            "images": self.images,
            "prompt_characters": summary(self.prompts),
            "answer_characters": summary(self.answers),
        }
        if self.rejected:
            out["pairs"] = {
                "chosen_characters": summary(self.chosen),
                "rejected_characters": summary(self.rejected),
                "chosen_longer": sum(a > b for a, b in zip(self.chosen, self.rejected, strict=True)),
                "chosen_shorter": sum(a < b for a, b in zip(self.chosen, self.rejected, strict=True)),
            }
        if self.labels:
            out["labels"] = {"good": sum(self.labels), "bad": len(self.labels) - sum(self.labels)}
        if self.tokens:
            every = self.text_tokens + self.image_tokens
            out["tokens"] = summary(self.tokens)
            out["total"] = {"text": self.text_tokens, "image": self.image_tokens, "supervised": self.supervised}
            out["supervised_share_of_text"] = round(self.supervised / max(self.text_tokens, 1), 4)
            out["supervised_share_of_all"] = round(self.supervised / max(every, 1), 4)
        return out


@dataclass
class Stats:
    """Of a whole data set."""

    sources: dict[str, SourceStats] = field(default_factory=dict)
    licences: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    not_encoded: int = 0
    image_sizes: list[tuple[int, int]] = field(default_factory=list)  # (W, H) of each different image
    unreadable_images: int = 0
    roots: Counter[tuple[str, str]] = field(default_factory=Counter)
    without_root: int = 0
    rouge: list[float] = field(default_factory=list)

    @property
    def whole(self) -> SourceStats:
        """The sum over the sources."""
        out = SourceStats()
        for name in SourceStats.__dataclass_fields__:
            empty = getattr(out, name)
            setattr(out, name, sum((getattr(source, name) for source in self.sources.values()), empty))
        return out

    def top_roots(self) -> list[tuple[str, int, list[tuple[str, int]]]]:
        """Return (root, count, its commonest objects) of the commonest roots."""
        roots: Counter[str] = Counter()
        for (root, _), count in self.roots.items():
            roots[root] += count
        out = []
        for root, count in roots.most_common(TOP_ROOTS):
            objects = Counter({thing: n for (verb, thing), n in self.roots.items() if verb == root and thing})
            out.append((root, count, objects.most_common(TOP_OBJECTS)))
        return out

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data, the sources largest first."""
        ordered = sorted(self.sources.items(), key=lambda item: -item[1].records)
        sides = np.array(self.image_sizes, dtype=np.int64).reshape(-1, 2)
        prompts = sum(self.roots.values())
        return {
            "whole": self.whole.to_json(),
            "sources": {name: source.to_json() for name, source in ordered},
            "licences": dict(self.licences.most_common()),
            "bad_rows": self.bad,
            "not_encoded": self.not_encoded,
            "images": {
                "different": len(self.image_sizes) + self.unreadable_images,
                "unreadable": self.unreadable_images,
                "width": summary(sides[:, 0].tolist()),
                "height": summary(sides[:, 1].tolist()),
                "megapixels": round(float((sides[:, 0] * sides[:, 1]).mean() / 1e6), 4) if len(sides) else 0.0,
            },
            "diversity": {
                "method": "heuristic root and object, see mmit.data.diversity; ROUGE-L F1 with the nearest prompt",
                "prompts": prompts + self.without_root,
                "without_root": self.without_root,
                "different_pairs": len(self.roots),
                "roots": [{"root": r, "count": n, "objects": dict(objects)} for r, n, objects in self.top_roots()],
                "rouge_l_sample": len(self.rouge),
                "rouge_l_nearest": summary(self.rouge),
                "rouge_l_share_above_0.7": round(sum(v > 0.7 for v in self.rouge) / max(len(self.rouge), 1), 4),
            },
        }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return count, mean, smallest, median, 95 % quantile and largest; {} of nothing."""
    if not len(values):
        return {}
    found = np.array(values, dtype=np.float64)
    low, half, high, top = np.quantile(found, [0, 0.5, 0.95, 1])
    numbers = {"mean": found.mean(), "min": low, "median": half, "p95": high, "max": top}
    return {"count": len(values)} | {name: round(float(value), 3) for name, value in numbers.items()}


def collect(
    rows: Iterable[Record | RecordError],
    *,
    encode: Encode | None = None,
    image_tokens: int | None = None,
    sample: int = 500,
    seed: int = 0,
) -> Stats:
    """Read rows once and count.

    Args:
        rows: records; bad rows are only counted.
        encode: record -> its training samples; a record it refuses (RecordError) is counted as not encoded.
        image_tokens: M, tokens per image; None counts an image as one.
        sample: prompts drawn for the nearest neighbours, which take time by the square of it.
        seed: decides which.
    """
    stats, prompts = Stats(), _Reservoir(sample, seed)
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, RecordError):
            stats.bad += 1
            continue
        source = stats.sources.setdefault(row.source or "not stated", SourceStats())
        source.add(row)
        stats.licences[row.licence or "not stated"] += 1
        # System turns are left out: one text of the format, and not what somebody asked.
        for turn in row.turns:
            if turn.role == "user" and turn.text.strip():
                prompts.take(turn.text)
                _count_root(stats, turn.text)
        for image in row.images:
            _measure(stats, image, seen)
        if encode is not None:
            try:
                for encoded in encode(row):
                    source.add_tokens(encoded, image_tokens=image_tokens or 1)
            except RecordError:
                stats.not_encoded += 1
    stats.rouge = nearest_rouge_l(prompts.kept) if len(prompts.kept) > 1 else []
    return stats


def _count_root(stats: Stats, prompt: str) -> None:
    found = root_and_object(prompt)
    if found is None:
        stats.without_root += 1
    else:
        stats.roots[found] += 1


def _measure(stats: Stats, image: Image, seen: set[str]) -> None:
    key = image_name(image)
    if key in seen:
        return
    seen.add(key)
    try:
        stats.image_sizes.append(image_size(image))
    except ImageError:
        stats.unreadable_images += 1


class _Reservoir:
    """An even sample of texts that come one by one (Vitter 1985)."""

    def __init__(self, size: int, seed: int) -> None:
        self.kept: list[str] = []
        self._size, self._rng, self._seen = size, random.Random(seed), 0

    def take(self, text: str) -> None:
        self._seen += 1
        if len(self.kept) < self._size:
            self.kept.append(text)
        elif (place := self._rng.randrange(self._seen)) < self._size:
            self.kept[place] = text
