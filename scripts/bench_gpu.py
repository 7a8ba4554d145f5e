"""One GPU: is mmit right on it, and how fast? One table of results; random weights, no network, minutes on an H100.

    python scripts/bench_gpu.py --out gpu.json           # the whole plan
    python scripts/bench_gpu.py --only kernel resume     # some sections
    python scripts/bench_gpu.py --dry-run                # the same code with tiny sizes on a CPU, as CI runs it

A line is OK or FAIL where a bound is known, INFO where a number is measured, SKIP with the reason. The exit code is 1
after a FAIL. A section that breaks is a FAIL, and the next one runs. Parity is against float64 or float32 on the CPU.
The timed step is LLaVA-1.5-7B's shape: CLIP-L/14-336, LoRA r128, rows of five records with a picture each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import bench_gpu_checks as checks
import torch
from bench_gpu_models import DRY, FULL, Bench, Finding
from bench_gpu_speed import clear, measure_step

from mmit.train.determinism import SIZES, WORKSPACE
from mmit.train.engines.world import grow_segments

SECTIONS: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "kernel": checks.check_kernel,
    "isolation": checks.check_isolation,
    "parity": checks.check_parity,
    "upload": checks.check_upload,
    "determinism": checks.check_determinism,
    "resume": checks.check_resume,
    "qlora": checks.check_qlora,
    "generation": checks.check_generation,
    "step": measure_step,
    "zero": checks.check_zero,  # last: it joins a process group
}


def run_sections(bench: Bench, names: Sequence[str], *, seconds: float) -> Iterator[tuple[str, Finding]]:
    """The findings of each section as they come; an error ends a section and is a finding."""
    begin = time.perf_counter()
    for name in names:
        if time.perf_counter() - begin > seconds:
            yield name, Finding("all", "SKIP", f"the {seconds:.0f} s of --seconds are over")
            continue
        try:
            for finding in SECTIONS[name](bench):
                yield name, finding
        except Exception as error:  # noqa: BLE001 - whatever breaks is what this script looks for
            at = traceback.extract_tb(error.__traceback__)[-3:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(at))
            first = next(iter(str(error).splitlines()), "")
            yield name, Finding("all", "FAIL", f"{type(error).__name__}: {first[:200]}", where)
        clear(bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--device", default=None, choices=["cpu", "cuda"], help="by default cuda, cpu for --dry-run")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=540, help="no section begins after these")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of the GPU in bf16, for MFU")
    parser.add_argument("--out", type=Path, help="the findings as JSON")
    args = parser.parse_args(argv)
    os.environ.setdefault(WORKSPACE, SIZES[0])  # before CUDA starts
    grow_segments()
    kind = args.device or ("cpu" if args.dry_run else "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run runs the same code with tiny sizes on a CPU")
    bench = Bench(torch.device(kind), DRY if args.dry_run or kind == "cpu" else FULL, 1e12 * args.peak)
    name = torch.cuda.get_device_name() if bench.cuda else "CPU, tiny sizes"
    print(
        f"torch {torch.__version__}, {name}\n\n| section | check | verdict | found | expected |\n|---|---|---|---|---|"
    )
    findings = []
    for section, found in run_sections(bench, args.only, seconds=args.seconds):
        findings.append({"section": section, **asdict(found)})
        cells = (section, found.check, found.verdict, found.numbers, found.expected)
        print("| " + " | ".join(c.replace("|", "/") for c in cells) + " |", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "device": name, "findings": findings}, indent=1))
    return int(any(f["verdict"] == "FAIL" for f in findings))


if __name__ == "__main__":
    sys.exit(main())
