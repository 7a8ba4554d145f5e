"""Rows -> templates -> validated records -> JSON lines on disk, timed.

    python scripts/bench_build.py [--rows 1000000] [--workers 2] [--rounds 1]

The rows are a CSV file of texts of ordinary length with labels; the bank has three wordings, half of the records list
their options, a tenth shows two solved examples. Prints seconds, CPU seconds, rows a second and peak memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

from mmit.build.annotated import Recipe, checked, renderer
from mmit.build.executor import Lines, run
from mmit.build.rows import open_rows
from mmit.build.write import Stated, write_build
from mmit.templates.bank import Bank, Template
from mmit.templates.options import OptionStyle

CHOICES = ("negative", "positive")
BANK = Bank(
    "mood",
    (
        Template("a", "{{ text }}\nIs this review positive or negative?|||{{ label }}", choices=CHOICES),
        Template("b", "Judge the review.\n\n{{ text }}|||{{ label }}", choices=CHOICES),
        Template("c", "{{ text }} Was the writer pleased?|||{{ label }}", choices=CHOICES),
    ),
    cluster="sentiment",
    fields=("text", "label"),
    licence="CC0-1.0",
)
RECIPE = Recipe(options=OptionStyle(0.5, ("letters", "numbers", "dashes")), shots={0: 0.9, 2: 0.1})


def write_rows(path: Path, count: int) -> None:
    """Write the rows: about 170 characters each."""
    words = "a film that is longer than it needs to be and shorter than its idea deserves".split()
    with open(path, "w", encoding="utf-8") as file:
        file.write("text,label\n")
        for row in range(count):
            text = f"Review {row}: " + " ".join(words[(row + i * 7) % len(words)] for i in range(30))
            file.write(f"{text},{CHOICES[row % 7 % 2]}\n")


def timed(path: Path, out: Path, workers: int) -> tuple[float, float]:
    """Build once; return seconds and CPU seconds, those of workers included."""
    began, used = time.perf_counter(), os.times()
    opened = partial(open_rows, {"path": str(path), "licence": "CC-BY-4.0"})
    stage = renderer(lambda: opened()[0], (BANK,), RECIPE, source="rows.csv", licence="CC-BY-4.0")
    made = run(Lines(stage, out), checked(opened()[0], (BANK,)), workers=workers)
    counts = write_build(made, out, Stated({}))
    assert counts.total == sum(counts.accepted.values())
    return time.perf_counter() - began, sum(os.times()[:4]) - sum(used[:4])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write_rows(path, given.rows)
        for at in range(given.rounds):
            for workers in dict.fromkeys((0, given.workers)):
                wall, cpu = timed(path, Path(folder) / f"out-{at}-{workers}", workers)
                peak = max(
                    resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
                )
                rate = given.rows / wall
                print(
                    f"workers {workers}: {wall:.1f} s, {cpu:.1f} CPU s, {rate:,.0f} rows a second, {peak / 1024:.0f} MB"
                )


if __name__ == "__main__":
    main()
