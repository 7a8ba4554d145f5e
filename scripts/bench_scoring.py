"""How long each metric takes to score many answers, on one core.

In: how many answers (a million by default) and which metrics. Out: a table, seconds for answers that repeat as a
benchmark's do, and for answers that are all different. Runs no model; exit code 1 if a metric misses the limit.

    python scripts/bench_scoring.py --answers 1000000 --limit 60
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mmit.eval.metrics import METRICS

WORDS = "red blue two dogs the a man on street left right yes no table cat sitting large 3 45 1,200 5% it's".split()
LETTERS = "ABCD"
OPTIONS = ["a red car", "two dogs", "the street", "nothing of these"]
Columns = tuple[list[str], list[Any]]


def phrases(draw: random.Random, n: int, longest: int) -> list[str]:
    """Return n texts of 1 to `longest` words."""
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(n)]


def answers(draw: random.Random, n: int, *, distinct: bool, longest: int = 4) -> list[str]:
    """Return n answers: of a few thousand different ones, or all different."""
    if distinct:
        return [f"{text} {number}." for number, text in enumerate(phrases(draw, n, longest))]
    return draw.choices([text + draw.choice(["", "."]) for text in phrases(draw, 3000, longest)], k=n)


def lettered(draw: random.Random, n: int, *, distinct: bool) -> list[str]:
    """Return n answers to multiple-choice questions."""
    said = answers(draw, n, distinct=distinct)
    forms = ["{}", "{}.", "({})", "The answer is {}.", "{1}"]
    return [draw.choice(forms).format(draw.choice(LETTERS), text) for text in said]


def vqa(draw: random.Random, n: int, distinct: bool) -> Columns:
    """Ten human answers a question, half of the questions with a majority."""
    gold = answers(draw, 20_000 if not distinct else n, distinct=distinct)
    pool = gold[:20_000]
    references = [[own] * 7 + draw.choices(pool, k=3) for own in draw.choices(gold, k=n)]
    return [draw.choice((row[0], row[9])) for row in references], references


def short(draw: random.Random, n: int, distinct: bool) -> Columns:
    """One short answer a question."""
    return answers(draw, n, distinct=distinct), answers(draw, n, distinct=distinct)


def several(draw: random.Random, n: int, distinct: bool) -> Columns:
    """Two accepted answers a question, of up to ten words."""
    said = answers(draw, n, distinct=distinct, longest=10)
    gold = answers(draw, n, distinct=distinct, longest=10)
    return said, [[one, other] for one, other in zip(gold, reversed(said), strict=True)]


def yes_no(draw: random.Random, n: int, distinct: bool) -> Columns:
    """Yes or no, with words around it."""
    said = [f"{draw.choice(('Yes', 'no', 'No'))}, {text}" for text in answers(draw, n, distinct=distinct)]
    return said, draw.choices(["yes", "no"], k=n)


def pairs(draw: random.Random, n: int, distinct: bool) -> Columns:
    """MME: two questions about each picture."""
    said, gold = yes_no(draw, n, distinct)
    kinds = ["existence", "count", "position", "OCR"]
    return said, [{"answer": g, "category": kinds[i // 2 % 4], "image": i // 2} for i, g in enumerate(gold)]


def statements(draw: random.Random, n: int, distinct: bool) -> Columns:
    """NLVR2."""
    said, gold = yes_no(draw, n, distinct)
    names = [f"test1-{i // 4}-{i % 4}-0" for i in range(n)]
    labels = ["True" if one == "yes" else "False" for one in gold]
    return said, [{"label": label, "identifier": name} for label, name in zip(labels, names, strict=True)]


def choice(draw: random.Random, n: int, distinct: bool) -> Columns:
    """A letter of four options, with their texts."""
    reference = {letter: {"answer": letter, "options": OPTIONS} for letter in LETTERS}
    return lettered(draw, n, distinct=distinct), [reference[letter] for letter in draw.choices(LETTERS, k=n)]


def letter(draw: random.Random, n: int, distinct: bool) -> Columns:
    """A letter, without the options' texts."""
    return lettered(draw, n, distinct=distinct), draw.choices(LETTERS, k=n)


def circular(draw: random.Random, n: int, distinct: bool) -> Columns:
    """MMBench: four rotations of each question."""
    said, gold = choice(draw, n, distinct)
    return said, [one | {"index": i // 4 + i % 4 * 1_000_000} for i, one in enumerate(gold)]


def subjects(draw: random.Random, n: int, distinct: bool) -> Columns:
    """MMMU: one open question in ten."""
    said, gold = choice(draw, n, distinct)
    kinds = [("open" if i % 10 == 0 else "multiple-choice") for i in range(n)]
    given = ["12" if kind == "open" else one["answer"] for kind, one in zip(kinds, gold, strict=True)]
    rows = [{"answer": a, "question_type": k, "options": OPTIONS} for a, k in zip(given, kinds, strict=True)]
    return said, rows


def maths(draw: random.Random, n: int, distinct: bool) -> Columns:
    """MathVista: half multiple choice, half integers."""
    row = {"question_type": "multi_choice", "answer_type": "text", "choices": OPTIONS, "answer": "two dogs"}
    other = {"question_type": "free_form", "answer_type": "integer", "choices": None, "answer": "12"}
    return lettered(draw, n, distinct=distinct), [row if i % 2 else other for i in range(n)]


def written(draw: random.Random, n: int, distinct: bool) -> Columns:
    """OCRBench."""
    said, gold = short(draw, n, distinct)
    return said, [{"answers": [one], "dataset": "IIIT5K"} for one in gold]


def solved(draw: random.Random, n: int, distinct: bool) -> Columns:
    """GSM8K: some sentences, then the number."""
    said, gold = (answers(draw, n, distinct=distinct, longest=40) for _ in range(2))
    ends = draw.choices(["12", "1,200", "-3", "$45"], k=n)
    return [f"{a}\n#### {e}" for a, e in zip(said, ends, strict=True)], [f"{g}\n#### 12" for g in gold]


def obeyed(draw: random.Random, n: int, distinct: bool) -> Columns:
    """IFEval: two instructions a prompt."""
    names = ["punctuation:no_comma", "length_constraints:number_words"]
    row = {"instruction_id_list": names, "kwargs": [{}, {"relation": "at least", "num_words": 20}]}
    return answers(draw, n, distinct=distinct, longest=40), [row] * n


DATA: dict[str, Callable[[random.Random, int, bool], Columns]] = {
    "vqa": vqa,
    "exact": short,
    "gqa": short,
    "ai2d": letter,
    "anls": several,
    "relaxed": short,
    "rouge_l": several,
    "ocrbench": written,
    "gsm8k": solved,
    "pope": yes_no,
    "mme": pairs,
    "nlvr": statements,
    "nlvr2": statements,
    "choice": choice,
    "seed": letter,
    "scienceqa": letter,
    "realworldqa": letter,
    "mmbench": circular,
    "mmmu": subjects,
    "mathvista": maths,
    "ifeval": obeyed,
}


def seconds(name: str, n: int, *, distinct: bool) -> float:
    """Return the processor time that a metric takes for n answers, made beforehand."""
    said, gold = DATA[name.split(":")[0]](random.Random(0), n, distinct)
    start = time.process_time()  # not the wall's: another process may have the core meanwhile
    METRICS[name](said, gold)
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a metric takes longer than the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a metric may take")
    parser.add_argument("--metrics", default="", help="names with commas; all that need no extra package by default")
    parser.add_argument("--repeated-only", action="store_true", help="leave out answers that are all different")
    options = parser.parse_args(arguments)
    every = [name for name in METRICS if name.split(":")[0] in DATA and not name.endswith("nltk")]
    slow = 0
    print(f"{'metric':22} {'repeated':>10} {'distinct':>10}   processor seconds for {options.answers:,} answers")
    for name in [one.strip() for one in options.metrics.split(",") if one.strip()] or every:
        kinds = [False] if options.repeated_only else [False, True]
        taken = [seconds(name, options.answers, distinct=distinct) for distinct in kinds]
        late = max(taken) > options.limit
        slow += late
        cells = [f"{one:10.1f}" for one in taken] + ["         -"] * (2 - len(taken))
        print(f"{name:22} {' '.join(cells)}{'   over the limit' if late else ''}", flush=True)
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
