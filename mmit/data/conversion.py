"""Conversions: a file of another format as mmit JSONL, kept with what was found wrong with its rows.

Owns the folder of conversions: DATA.jsonl holds the records, DATA.verdicts.json the bad rows and the keys that stayed
in the meta. The verdicts are part of the conversion: whoever opens it later gets the same bad rows as the one who made
it. Refuses nothing by itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmit.data.formats import import_file
from mmit.errors import ImageError, RecordError
from mmit.io import write_atomic
from mmit.records import Record, write_jsonl


@dataclass(frozen=True)
class Verdicts:
    """What a conversion found: bad rows with the number of records before each, and keys kept in the meta only."""

    bad: tuple[tuple[int, RecordError], ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)

    def among(self, limit: int | None) -> tuple[RecordError, ...]:
        """The bad rows that stand before the end of the first `limit` records."""
        return tuple(error for before, error in self.bad if limit is None or before < limit)


def convert(
    origin: Path,
    file: Path,
    *,
    format: str,
    image_root: str | None,
    options: Mapping[str, Any],
    on_bad: Callable[[RecordError], None] | None,
) -> Verdicts:
    """Convert a file into JSONL unless that was done before.

    Args:
        origin: the file of another format. file: the JSONL; its verdicts lie beside it.
        format, image_root, options: see `import_file`.
        on_bad: receives the bad rows, those of an earlier conversion too; None raises the first and keeps nothing.

    Returns:
        what was found when the file was converted.

    Raises:
        RecordError: a bad row without an `on_bad`, or a file that is not of the format.
    """
    # Both files or none: the JSONL is written first, so a conversion that was killed between the two is made again.
    beside = file.with_suffix(".verdicts.json")
    if not (file.exists() and beside.exists()):
        bad: list[tuple[int, RecordError]] = []
        kept: Counter[str] = Counter()
        done = 0

        def collect(error: RecordError) -> None:
            if on_bad is None:
                raise error
            # With the number of records before it: of a source that is cut to its first N records, only the bad rows
            # among these count.
            bad.append((done, error))

        def counted(records: Iterator[Record]) -> Iterator[Record]:
            nonlocal done
            for record in records:
                yield record
                done += 1

        records = import_file(origin, format, image_root=image_root, on_bad=collect, kept=kept, **options)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(counted(records), file)
        _write(beside, bad, kept)
    return _read(beside)


def _write(path: Path, bad: list[tuple[int, RecordError]], kept: Mapping[str, int]) -> None:
    rows = [
        {
            "before": before,
            "image": isinstance(e, ImageError),
            "where": e.where,
            "problem": e.problem,
            "remedy": e.remedy,
        }
        for before, e in bad
    ]
    write_atomic(path, json.dumps({"bad": rows, "kept": dict(kept)}, ensure_ascii=False))


def _read(path: Path) -> Verdicts:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        bad = []
        for row in held["bad"]:
            kind = ImageError if row["image"] else RecordError
            bad.append((row["before"], kind(row["problem"], where=row["where"], remedy=row["remedy"])))
        return Verdicts(tuple(bad), held["kept"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"the verdicts of a conversion cannot be read: {error}"
        raise RecordError(problem, where=str(path), remedy="Remove this file: the data is converted again.") from error
