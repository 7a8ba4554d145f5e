"""Recovery against the number of intrinsic dimensions: ten tasks on easy-VQA whose question is the same.

    pip install easy-vqa
    mmit merge runs/quickstart runs/quickstart-merged
    python scripts/intrinsic_shapes.py --start runs/quickstart-merged --out runs/intrinsic

Only a soft prompt tells the tasks apart. A space of d numbers is found from the prompts of the seen tasks by
reconstruction, then with the loss on the tasks too; in it each task is tuned anew from the mean, the unseen ones as
well, on rows of training. Told of test pictures: the accuracy of the likeliest label, and the cross-entropy of the
right one over the labels, which says more of few pictures. Recovery is (intrinsic - none) / (soft prompt - none), each
summed over the tasks. What is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import mmit
from mmit import pet
from mmit.analysis.intrinsic import TaskLoss
from mmit.build.rows import open_rows
from mmit.generate import Model, load
from mmit.io import write_atomic
from mmit.models.intrinsic import Back, IntrinsicPrompt, Tasks, find_subspace
from mmit.models.tuning.structure import base_model
from mmit.models.virtual import PROMPT, SoftPrompt
from mmit.train.checkpoint.model import find

QUESTION = "{{ image }}What is it?"
WARMTH = {"red": "warm", "yellow": "warm", "brown": "warm", "blue": "cold", "green": "cold", "teal": "cold"}
FRENCH = {"circle": "cercle", "rectangle": "boite", "triangle": "trigone"}
CORNERS = {"circle": "none", "rectangle": "four", "triangle": "three"}
TASKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "shape": lambda row: str(row["shape"]),
    "colour": lambda row: str(row["colour"]),
    "column": lambda row: str(row["column"]),
    "row": lambda row: str(row["row"]),
    "size": lambda row: str(row["size"]),
    "french": lambda row: FRENCH[row["shape"]],
    "plain": lambda row: "yes" if row["colour"] in ("black", "gray") else "no",
    "corners": lambda row: CORNERS[row["shape"]],
    "warmth": lambda row: WARMTH.get(row["colour"], "plain"),
    "round": lambda row: "yes" if row["shape"] == "circle" else "no",
}
UNSEEN = ("corners", "warmth", "round")
SEEN = tuple(name for name in TASKS if name not in UNSEEN)


def main() -> None:
    """Run what is left and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=8, help="of a soft prompt")
    parser.add_argument("--rows", type=int, default=200, help="pictures to train a task on")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--row-tokens", type=int, default=256, help="of a step")
    parser.add_argument("--steps", type=int, default=60, help="of a soft prompt")
    parser.add_argument("--z-steps", type=int, default=60, help="of tuning in a space")
    parser.add_argument("--map-steps", type=int, default=2000, help="of a space, on reconstruction alone")
    parser.add_argument("--task-steps", type=int, default=70, help="of a space, on both losses")
    parser.add_argument("--lr", type=float, default=1e-2, help="of soft prompts")
    parser.add_argument("--z-lr", type=float, default=0.2, help="in a space, in units of the numbers' spread")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = given.out / "figures.json"
    found: dict[str, dict[str, list[float]]] = json.loads(known.read_text()) if known.exists() else {}
    trained, held_out = rows_of("train", given.rows), rows_of("test", given.held_out)
    patterns = {name: pattern_of(name, trained) for name in TASKS}
    runs = {name: soft_prompt(given, patterns[name], trained) for name in TASKS}
    model, loss = load(given.start), TaskLoss(list(runs.values()))

    def note(arm: str, name: str, prompt: Callable[[], torch.nn.Module | None]) -> None:
        key = f"{arm}/{name}"
        if key not in found:
            found[key] = judge(model, prompt(), patterns[name], held_out)
            write_atomic(known, json.dumps(found))
        told = ", ".join(f"{measure} {np.mean(values):.3f}" for measure, values in found[key].items())
        print(f"{key}: {told}", flush=True)

    prompts = {
        name: load_file(find(run) / "llm_tuned.safetensors")[f"{PROMPT}.embeddings"] for name, run in runs.items()
    }
    for name in TASKS:
        note("none", name, lambda: None)
        note("soft", name, lambda name=name: SoftPrompt(prompts[name]))
    for dim in given.dims:
        if all(f"{dim}/{name}" in found for name in TASKS):
            continue
        # The seen tasks come first in TASKS and in the loss, so that their numbers are those of the space.
        tasks = Tasks(loss, given.task_steps)
        layers, z = find_subspace(
            torch.stack([prompts[name] for name in SEEN]), dim, steps=given.map_steps, tasks=tasks
        )
        for number, name in enumerate(TASKS):
            note(str(dim), name, lambda number=number, layers=layers, z=z: tuned(given, layers, z, loss, number))
    print(table(found, given.dims, "right"))
    print(table(found, given.dims, "entropy"))
    print(rule(found, given.dims[-1]))


def rows_of(split: str, count: int) -> list[pet.Example]:
    """The first pictures of a split with what they show."""
    rows, licence, source = open_rows({"package": "easy-vqa-attributes", "split": split})
    found = []
    for number, row in rows:
        found.append(pet.Example(row, None, source, number, licence))
        if len(found) == count:
            break
    return found


def pattern_of(name: str, rows: Sequence[pet.Example]) -> pet.Pattern:
    """The question of a task and its answers."""
    labels = sorted({TASKS[name](row.fields) for row in rows})
    patterns = [{"id": name, "input": QUESTION}]
    return pet.patterns_of({"task": name, "labels": labels, "patterns": patterns}).patterns[0]


def soft_prompt(given: argparse.Namespace, pattern: pet.Pattern, rows: Sequence[pet.Example]) -> Path:
    """The run of a task's soft prompt; all begin with the same words."""
    folder, answer = given.out / "soft" / pattern.id, TASKS[pattern.id]
    if not (folder / "finished.json").exists():
        records = [pattern.record({"image": r.fields["image"]}, answer(r.fields), id=r.where) for r in rows]
        llm = {"mode": "soft_prompt", "lr": given.lr, "options": {"tokens": given.tokens}}
        row = {"data.pack_tokens": given.row_tokens, "data.max_length": given.row_tokens}
        settings = {**row, "data.workers": 0, "train.threads": 1, "train.save_every": given.steps}
        tune = {"projector": {"mode": "frozen"}, "llm": llm}
        whole = {"steps": given.steps, "settings": settings, "resume": "auto"}
        if not mmit.train(given.start, records, dir=folder, tune=tune, **whole).finished:
            raise SystemExit("stopped by a signal; the same command goes on")
    return Path(folder)


def tuned(
    given: argparse.Namespace, layers: dict[str, torch.Tensor], z: torch.Tensor, loss: TaskLoss, task: int
) -> IntrinsicPrompt:
    """A point of the space for a task, from the mean of the seen ones."""
    prompt = IntrinsicPrompt(Back(layers, given.tokens), z.mean(0), b"")
    optimizer = torch.optim.Adam([prompt.z], lr=given.z_lr * float(z.std()))
    for step in range(given.z_steps):
        for group in optimizer.param_groups:  # down to nothing, as soft prompts
            group["lr"] = given.z_lr * float(z.std()) * (1 - step / given.z_steps)
        optimizer.zero_grad()
        loss(prompt, task).backward()
        optimizer.step()
    return prompt


def judge(
    model: Model, prompt: torch.nn.Module | None, pattern: pet.Pattern, rows: Sequence[pet.Example]
) -> dict[str, list[float]]:
    """For each row whether the right label is the likeliest, and its cross-entropy over the labels."""
    llm = base_model(model.vlm.llm)
    if prompt is None:
        llm._modules.pop(PROMPT, None)
    else:
        llm.add_module(PROMPT, prompt)
    labels, answer = list(pattern.verbalizer), TASKS[pattern.id]
    shares = pet.soft_labels([pet.scores(model, pattern, rows)], temperature=1.0)
    wanted = [labels.index(answer(row.fields)) for row in rows]
    entropy = -np.log(shares[np.arange(len(rows)), wanted])
    return {"right": (shares.argmax(1) == wanted).astype(float).tolist(), "entropy": entropy.tolist()}


def table(found: dict[str, dict[str, list[float]]], dims: Sequence[int], measure: str) -> str:
    """Each task's accuracy in percent or cross-entropy, and recovery by d."""
    arms = ["none", "soft", *map(str, dims)]
    lines = [f"\n| {measure} | {' | '.join(arms)} |", "|---|" + "--:|" * len(arms)]
    for name in TASKS:
        told = f"{name} (unseen)" if name in UNSEEN else name
        means = [float(np.mean(found[f"{arm}/{name}"][measure])) for arm in arms]
        cells = [f"{100 * mean:.0f}" if measure == "right" else f"{mean:.2f}" for mean in means]
        lines.append(f"| {told} | {' | '.join(cells)} |")
    for told, names in (("seen", SEEN), ("unseen", UNSEEN)):
        cells = [f"{recovery(found, names, arm, measure):.2f}" for arm in arms]
        lines.append(f"| recovery, {told} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recovery(found: dict[str, dict[str, list[float]]], names: Sequence[str], arm: str, measure: str) -> float:
    """The part of what soft prompts gain that another arm gains."""

    def sums(of: str) -> float:
        return sum(float(np.mean(found[f"{of}/{name}"][measure])) for name in names)

    return (sums(arm) - sums("none")) / (sums("soft") - sums("none"))


def rule(found: dict[str, dict[str, list[float]]], dim: int) -> str:
    """Whether tuning in the space of most dimensions recovers 0.8 of what soft prompts gain on seen tasks."""
    told = []
    for measure in ("right", "entropy"):
        share = recovery(found, SEEN, str(dim), measure)
        told.append(f"{measure} {share:.2f} {'met' if share >= 0.8 else 'failed'}")
    return f"\nrule: recovery of seen tasks >= 0.80 at d = {dim}: {', '.join(told)}"


if __name__ == "__main__":
    main()
