"""Preference pairs of easy-VQA: the right answer to a question over a wrong one of its kind.

python scripts/easy_vqa_pairs.py data/easy-vqa/train.jsonl --out data/easy-vqa [--train 1000] [--held-out 200]

Reads records of several questions about a picture, takes one question of each, and writes pairs-train.jsonl and
pairs-held-out.jsonl, which share no picture. The wrong answer is drawn among those of questions of the same kind.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mmit.records import Image, Record, Text, Turn, read_jsonl, write_jsonl

KINDS = (
    ("yes", "no"),
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)


def pair(record: Record, draw: random.Random) -> Record:
    """One question of a record with its answer, and a wrong one."""
    number = 2 * draw.randrange(len(record.turns) // 2)
    asked, answer = record.turns[number : number + 2]
    pictures = tuple(part for part in record.turns[0].parts if isinstance(part, Image))
    texts = tuple(part for part in asked.parts if isinstance(part, Text))
    wrong = [word for kind in KINDS if answer.text in kind for word in kind if word != answer.text]
    rejected = Turn("assistant", (Text(draw.choice(wrong)),))
    return replace(record, turns=(replace(asked, parts=(*pictures, *texts)), answer), rejected=rejected)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=200)
    given = parser.parse_args()
    draw = random.Random(0)
    pairs = (pair(record, draw) for record in read_jsonl(given.records))
    for name, count in (("train", given.train), ("held-out", given.held_out)):
        write_jsonl(islice(pairs, count), given.out / f"pairs-{name}.jsonl")


if __name__ == "__main__":
    main()
