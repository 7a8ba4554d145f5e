"""A run and what follows it on a machine without bf16 units; argument: a folder. Prints what came of it as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import mmit
from mmit import cores, precision
from mmit.train.checkpoint import model as checkpoint
from mmit.train.run import run
from tests.tiny_run import tiny_config


def trained_in(folder: Path, asked: str, *, resume: str | None = None) -> dict[str, Any]:
    """Train two steps, or go on from them; the formats of the config on disk, the tower, the LLM and the features."""
    model = tiny_config(folder).model.model_dump()
    model["vision"]["cache"] = "disk"
    place = {"dir": str(folder / asked), "resume": resume}
    train = {"steps": 3 if resume else 2, "rows_per_step": 2, "precision": asked}
    assert run(tiny_config(folder, run=place, model=model, train=train)) == 0
    return formats(folder / asked)


def formats(run_dir: Path) -> dict[str, Any]:
    """What is written about a run's number format."""
    (features,) = {path.parent.name for path in (run_dir / "cache").rglob("features-*.bin")}
    return {
        "config": checkpoint.read_config(checkpoint.find(run_dir)).train.precision,
        "run": checkpoint.read_config(run_dir).train.precision,
        "features": features,
    }


def main(folder: Path) -> None:
    """Train with auto and with bf16, load both."""
    found: dict[str, Any] = {"choice": precision.choose(torch.device("cpu")).name}
    found["units"] = torch.backends.cpu.get_cpu_capability()
    found["waiting"] = [os.environ.get(name) for name in cores.WAITING]
    found["auto"], found["bf16"] = trained_in(folder, "auto"), trained_in(folder, "bf16")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = {"auto": mmit.load(folder / "auto"), "bf16": mmit.load(folder / "bf16")}
        assert not [w for w in told if "bf16" in str(w.message)]
        asked = mmit.load(folder / "bf16", dtype="bf16")
    found["warned"] = [str(w.message) for w in told if "bf16" in str(w.message)]
    for name, model in {**loaded, "asked": asked}.items():
        dtypes = sorted({str(p.dtype) for p in model.vlm.parameters()})
        found[f"loaded {name}"] = {"dtypes": dtypes, "notes": model.notes}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
