"""Pattern-exploiting training on easy-VQA: single patterns, PET, iPET, plain tuning on one prompt, all labels.

    pip install easy-vqa
    python scripts/pet_shapes.py --start runs/base --task shape --labelled 16 --out runs/pet-shapes

`--start` is a run that has not seen the test pictures, nor the last --more pictures of the training split, which become
unlabelled ones too. Labelled, unlabelled and held-out rows are different pictures. All models take the same steps, but
for the students (--student-steps) and the one with all labels (--full-steps). Prints a Markdown table
of accuracies on the held-out pictures, each the mean over seeds with the interval of the pictures; figures of every
seed are in OUT/figures.json. What is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import mmit
from mmit import pet
from mmit.build.rows import open_rows
from mmit.eval.metrics.intervals import clustered
from mmit.generate import load
from mmit.io import write_atomic
from mmit.pet.settings import Fitting, Generations
from mmit.pet.task import LABELLED, STUDENT

PATTERNS = {
    "shape": [
        {"id": "what", "input": "{{ image }}What shape is in the image?"},
        {"id": "complete", "input": "{{ image }}Complete the sentence: the image shows a"},
        {"id": "sorted", "input": "Sort this picture into a drawer by its form: {{ image }}"},
    ],
    "colour": [
        {"id": "what", "input": "{{ image }}What color is the shape?"},
        {"id": "complete", "input": "{{ image }}Complete the sentence: the color of the shape is"},
        {"id": "sorted", "input": "Sort this picture into a drawer by its paint: {{ image }}"},
    ],
}


def examples_of(task: str, split: str) -> list[pet.Example]:
    """Each picture of a split with its label."""
    rows, licence, source = open_rows({"package": "easy-vqa-attributes", "split": split})
    return [pet.Example({"image": row["image"]}, row[task], source, n, licence) for n, row in rows if "shape" in row]


def rows_of(
    task: str, seed: int, sizes: tuple[int, int, int], *, more: int = 0
) -> tuple[list[str], list[list[pet.Example]]]:
    """The labels, and labelled, unlabelled (with labels, for the model that has all) and held-out rows."""
    examples = examples_of(task, "test")
    labels = sorted({str(example.label) for example in examples})
    random.Random(0).shuffle(examples)
    held_out, rest = examples[: sizes[2]], examples[sizes[2] :]  # the same for all seeds
    random.Random(seed).shuffle(rest)
    extra = examples_of(task, "train")[-more:] if more else []
    return labels, [rest[: sizes[0]], [*extra, *rest[sizes[0] : sizes[0] + sizes[1] - more]], held_out]


def main() -> None:
    """Run what is left and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", choices=list(PATTERNS), default="shape")
    parser.add_argument("--labelled", type=int, default=16)
    parser.add_argument("--unlabelled", type=int, default=300)
    parser.add_argument("--more", type=int, default=0, help="of the unlabelled, from the end of the training split")
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--student-steps", type=int, help="of PET's and iPET's students; default --steps")
    parser.add_argument("--full-steps", type=int, default=60)
    parser.add_argument("--generations", type=int, default=2, help="of iPET; 1 leaves it out")
    parser.add_argument("--lr", type=float, default=3e-4)
    given = parser.parse_args()
    if given.more > given.unlabelled:
        parser.error(f"--more {given.more} is more than --unlabelled {given.unlabelled}")
    figures: dict[str, dict[str, list[int]]] = {}
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        one_seed(given, seed, figures)
    print(table(figures))
    print(rule(figures))


def one_seed(given: argparse.Namespace, seed: int, figures: dict[str, dict[str, list[int]]]) -> None:
    """Which held-out rows each arm gets right, added to `figures`: arm -> seed -> rows."""
    folder = given.out / f"seed{seed}"
    sizes = (given.labelled, given.unlabelled, given.held_out)
    labels, (few, rest, held_out) = rows_of(given.task, seed, sizes, more=given.more)
    patterns = pet.patterns_of({"task": given.task, "labels": labels, "patterns": PATTERNS[given.task]})
    first, bare = patterns.patterns[0], [replace(row, label=None) for row in rest]
    tune = {"llm": {"mode": "lora", "lr": given.lr, "options": {"r": 16, "alpha": 32}}}
    how = Fitting(repetitions=1, steps=given.steps, tune=tune, seed=seed)

    def note(arm: str, model: Any, pattern: pet.Pattern = first) -> None:
        known = folder / f"{arm}.json"
        if not known.exists():
            right = pet.scores(load(model), pattern, held_out).argmax(1) == [
                labels.index(str(r.label)) for r in held_out
            ]
            write_atomic(known, json.dumps(right.astype(int).tolist()))
        figures.setdefault(arm, {})[str(seed)] = json.loads(known.read_text())
        write_atomic(given.out / "figures.json", json.dumps(figures))
        print(f"seed {seed}: {arm} {np.mean(figures[arm][str(seed)]):.3f}", flush=True)

    for pattern in patterns.patterns:
        note(f"start, {pattern.id}", given.start, pattern)
    for fitted in pet.fit(given.start, patterns, few, dir=folder / "task", how=how):
        if fitted.generation == 0:
            note(f"pattern {fitted.pattern}", folder / "task" / fitted.run, patterns.by_id[fitted.pattern])
    for arm, count in (("PET", 1), ("iPET", given.generations))[: min(given.generations, 2)]:
        student = folder / arm
        if not student.exists():
            more: dict[str, Any] = {"unlabelled": bare, "generations": Generations(count=count)}
            pet.fit(given.start, patterns, few, dir=folder / "task", how=how, **more)
            shutil.rmtree(folder / "task" / LABELLED, ignore_errors=True)
            shutil.rmtree(folder / "task" / STUDENT, ignore_errors=True)
            pet.label(folder / "task", patterns, bare)
            longer = replace(how, lm=0.0, steps=given.student_steps or given.steps)
            pet.distil(given.start, folder / "task", how=longer).rename(student)
        note(arm, student)
    for arm, some, steps, kind in (
        ("one prompt, tuned", few, given.steps, "sft"),
        ("all labels", [*few, *rest], given.full_steps, "choices"),
    ):
        if not (folder / arm / "finished.json").exists():
            records = [first.record(row.fields, row.label, id=row.where) for row in some]
            settings = {"train.objective.kind": kind, "data.split_turns": False, "run.seed": seed}
            whole: dict[str, Any] = {"steps": steps, "settings": settings, "resume": "auto"}
            if not mmit.train(given.start, records, dir=folder / arm, tune=tune, **whole).finished:
                raise SystemExit("stopped by a signal; the same command goes on")
        note(arm, folder / arm)


def table(figures: dict[str, dict[str, list[int]]]) -> str:
    """Accuracies in percent by arm: the mean over seeds, the interval over pictures, each seed."""
    lines = ["| arm | accuracy | 95 % interval | by seed |", "|---|--:|--:|---|"]
    for arm, seeds in figures.items():
        right = np.array(list(seeds.values()), dtype=float)  # (seeds, rows)
        names = [str(n) for _ in right for n in range(right.shape[1])]
        low, high = clustered(right.flatten(), names, seed=0)
        each = ", ".join(f"{100 * value:.1f}" for value in right.mean(1))
        lines.append(f"| {arm} | {100 * right.mean():.1f} | {100 * low:.1f}-{100 * high:.1f} | {each} |")
    return "\n".join(lines)


def rule(figures: dict[str, dict[str, list[int]]]) -> str:
    """Whether PET is at least the mean of its single patterns: the difference on the same pictures, in points."""
    single = np.mean([list(seeds.values()) for arm, seeds in figures.items() if arm.startswith("pattern ")], axis=0)
    apart = np.array(list(figures["PET"].values()), dtype=float) - single  # (seeds, rows)
    names = [str(n) for _ in apart for n in range(apart.shape[1])]
    low, high = clustered(apart.flatten(), names, seed=0)
    told = f"{100 * apart.mean():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"\nrule: PET >= mean of its single patterns: {told}, {'met' if apart.mean() >= 0 else 'failed'}"


if __name__ == "__main__":
    main()
