"""Every tuning method of the LLM at equal steps: the quickstart's model and data, one Markdown table.

    python scripts/bench_methods.py --data data/easy-vqa --out runs/methods     # about an hour on one core
    python scripts/bench_methods.py --data data/easy-vqa --out runs/methods --time-only   # about five minutes
    python scripts/bench_methods.py --out runs/methods --table                  # the table of what is there

`--time-only` trains every method for a few steps more, LoRA at the beginning and again at the end, and puts these times
and peaks into the table: run it where nothing else runs.

The projector is aligned once and every method starts from it, sees the same rows in the same order, and answers the
same seeded sample of test questions. A method whose results are there is not run again. Each method has the learning
rate of its paper or of common practice (see METHODS), tried once and not searched: the table compares methods as one
would first set them up, not at their best.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "train" / "quickstart.yaml"


@dataclass(frozen=True)
class Method:
    """One row of the table: `tune.llm`, and where the learning rate comes from."""

    mode: str
    lr: float | None
    why: str
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> dict[str, Any]:
        """The section `tune.llm`."""
        return {"mode": self.mode, "lr": self.lr, "options": self.options}


METHODS: dict[str, Method] = {
    "lora": Method("lora", 1e-3, "the quickstart's", {"r": 16, "alpha": 32}),
    "frozen": Method("frozen", None, "only the projector is trained, as in every row"),
    "full": Method("full", 2e-4, "below SmolLM2's own 1e-3, whose batches are 500 times larger"),
    # alpha / sqrt(r) is four times alpha / r here: half of both keeps the first steps of LoRA's size
    "rslora": Method("lora", 5e-4, "LoRA's, halved for the larger scale", {"r": 16, "alpha": 16, "rslora": True}),
    "dora": Method("lora", 1e-3, "LoRA's", {"r": 16, "alpha": 32, "dora": True}),
    # A and B start at the size of the weights, so a step moves both of them
    "pissa": Method("lora", 5e-4, "LoRA's, halved: both factors move at once", {"r": 16, "alpha": 16, "init": "pissa"}),
    "lora+": Method("lora", 2e-4, "B at 16 times that of A (arXiv:2402.12354)", {"r": 16, "alpha": 32, "lr_ratio": 16}),
    "ia3": Method("ia3", 8e-3, "PEFT's example (the paper: 3e-3)"),
    "houlsby": Method("houlsby", 1e-3, "of the paper's 3e-5, 3e-4, 3e-3 (arXiv:1902.00751)", {"size": 64}),
    "soft_prompt": Method("soft_prompt", 1e-2, "below PEFT's example, 3e-2", {"tokens": 16}),
    "prefix": Method("prefix", 1e-2, "PEFT's example; zero gate of arXiv:2303.16199", {"tokens": 16}),
    "bitfit": Method("bitfit", 1e-3, "the upper end of arXiv:2106.10199; biases inserted", {"insert_biases": True}),
    "layernorm": Method("layernorm", 2e-3, "norms are as small as biases (arXiv:2312.11420)"),
}
TIMED_STEPS = 10
REFUSED = {"qlora": "needs a CUDA device (4-bit weights by bitsandbytes)"}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/easy-vqa"), help="folder of scripts/quickstart.sh")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=600, help="the first of the training set, all their questions")
    parser.add_argument("--questions", type=int, default=500, help="of the test set, the same for all")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--time-only", action="store_true", help="only measure time and memory of a step, anew")
    args = parser.parse_args(argv)
    start = args.out / "start"
    if not args.table and not (start / "finished.json").exists():
        aligned_start(args, start)
    if args.time_only:
        measure_times(args, start)
    elif not args.table:
        for name in args.only:
            if not (args.out / name / "finished.json").exists():
                train_method(args, name, start, run=args.out / name, steps=args.steps)
            if not (args.out / name / "eval" / "report.json").exists():
                mmit("eval", args.out / name, "--task", "easy_vqa", "--limit", args.questions, "--no-baselines",
                     "--probe", "none")  # fmt: skip
    print(table(args.out))


def mmit(*arguments: Any) -> None:
    """Run a command of mmit in a process of its own; its output goes to stderr."""
    command = [sys.executable, "-m", "mmit", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def common(args: argparse.Namespace) -> list[str]:
    """Overrides of the quickstart's config that all runs share."""
    return [
        f"data.train.0.path={args.data / 'train.jsonl'}",
        f"data.train.0.limit={args.pictures}",
        f"data.pack_tokens={args.row_tokens}",
        "data.workers=0",
        "model.vision.cache=memory",
        "train.epochs=null",
        "train.save_every=null",
    ]


def aligned_start(args: argparse.Namespace, start: Path) -> None:
    """Align the projector and keep it: one step so slow that nothing moves."""
    mmit("train", "--config", QUICKSTART, f"run.dir={start}", *common(args), "train.steps=1",
         f"align.captions={args.data / 'captions.jsonl'}", "tune.llm={mode: frozen}",
         "tune.projector.lr=1e-12")  # fmt: skip


def train_method(args: argparse.Namespace, name: str, start: Path, *, run: Path, steps: int) -> None:
    """Train one method from the shared start."""
    mmit("train", "--config", QUICKSTART, f"run.dir={run}", "run.resume=auto", *common(args), "align=null",
         f"run.init_from={start}", f"train.steps={steps}",
         f"tune.llm={json.dumps(METHODS[name].plan())}")  # fmt: skip


def measure_times(args: argparse.Namespace, start: Path) -> None:
    """A few steps of every method, one after the other; LoRA first and last shows whether the machine kept its pace."""
    folder = args.out / "times"
    shutil.rmtree(folder, ignore_errors=True)
    for name, run in [*((n, n) for n in args.only), ("lora", "lora-again")]:
        train_method(args, name, start, run=folder / run, steps=TIMED_STEPS)
    first, last = (median_seconds(folder / run) for run in ("lora", "lora-again"))
    print(f"LoRA at the beginning {first:.2f} s a step, at the end {last:.2f}", file=sys.stderr)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [row for line in lines if "loss" in (row := json.loads(line)) and "seconds" in row]


def median_seconds(run: Path) -> float:
    """Median time of a step, without the first two."""
    return statistics.median([r["seconds"] for r in rows_of(run)][2:] or [float("nan")])


def trained_parameters(run: Path) -> int:
    """Numbers a checkpoint holds: what was trained and nothing else."""
    from safetensors import safe_open

    checkpoint = run / json.loads((run / "finished.json").read_text())["checkpoint"]
    total = 0
    for path in checkpoint.rglob("*.safetensors"):
        if "trainer" not in path.relative_to(checkpoint).parts:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - safetensors' file is no iterator
                    total += math.prod(file.get_slice(name).get_shape())
    return total


def table(out: Path) -> str:
    """The Markdown table of every method that is done."""
    head = ["method", "learning rate", "trained parameters", "accuracy", "95 % interval", "loss, last 10 steps"]
    head += ["s/step", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, method in METHODS.items():
        report = out / name / "eval" / "report.json"
        if not report.exists():
            continue
        found = json.loads(report.read_text())
        low, high = found["ci95"]
        rows = rows_of(out / name)
        timed = out / "times" / name if rows_of(out / "times" / name) else out / name
        cells = [
            name,
            f"{method.lr:g}" if method.lr else "-",
            f"{trained_parameters(out / name):,}",
            f"{100 * found['accuracy']:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{statistics.fmean(r['loss'] for r in rows[-10:]):.3f}",
            f"{median_seconds(timed):.2f}",
            f"{rows_of(timed)[-1]['memory_gib']:.2f} GiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | - | - | - | - | - | - | {why} |" for name, why in REFUSED.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
