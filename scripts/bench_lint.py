"""Measure the linter's text checks: rows per minute on one core, reading included.

    python scripts/bench_lint.py --rows 100000

Writes rows of mmit JSONL (a question and an answer of about 90 words together, 2 % near copies), then lints them as
`mmit data check` does. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import tempfile
import time
from pathlib import Path

from mmit.data.lint.linter import lint
from mmit.data.rows import read_rows
from mmit.records import Record, write_jsonl

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "io", "ou") for c in ("n", "r", "st", "l", "ck")]


def records(count: int, *, words: int) -> list[Record]:
    """Records of random words; each fiftieth is the one before it with a word changed."""
    rng = random.Random(0)
    out: list[Record] = []
    for number in range(count):
        question, answer = rng.choices(VOCABULARY, k=words // 4), rng.choices(VOCABULARY, k=words - words // 4)
        if number % 50 == 49:
            before = out[-1].turns
            question, answer = before[0].text.split(), before[1].text.split()
            answer[rng.randrange(len(answer))] = "changed"
        out.append(Record.triple(" ".join(question), " ".join(answer), id=str(number)))
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=90)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_jsonl(records(args.rows, words=args.words), path)
        wall, cpu = time.perf_counter(), time.process_time()
        report = lint(read_rows(path, "mmit"))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = path.stat().st_size
    print(
        json.dumps(
            {
                "rows": args.rows,
                "words_per_row": args.words,
                "megabytes": round(size / 1e6, 1),
                "cpu_seconds": round(cpu, 2),
                "wall_seconds": round(wall, 2),
                "rows_per_minute": round(args.rows / cpu * 60),
                "near_duplicates": len(report.findings.get("near-duplicate-record", [])),
                "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "python": platform.python_version(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
