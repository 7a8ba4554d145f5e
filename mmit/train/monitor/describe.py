"""What a run is, written down when it starts: versions, hardware, parameters, data. `run.json` in the run folder.

The report and `mmit run-status` read it. Every start of a run, the resumed ones too, has an entry.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mmit
from mmit.models.tuning import parameter_table
from mmit.train.data.setup import source_names
from mmit.train.monitor.run_files import RUN, read_json, write_json

if TYPE_CHECKING:
    from mmit.data.dataset import InstructionData
    from mmit.data.measure import Scan
    from mmit.data.walk import Walk
    from mmit.models.vlm import VLM
    from mmit.train.data.batches import TrainData
    from mmit.train.engines.world import World

LIBRARIES = ("torch", "transformers", "peft", "open_clip_torch", "timm", "deepspeed")


def describe(
    vlm: VLM,
    data: InstructionData,
    scan: Scan,
    *,
    walk: Walk,
    held_out: TrainData | None,
    world: World,
) -> dict[str, Any]:
    """Facts of a run as JSON values."""
    return {
        "versions": dict(_versions()),
        "hardware": _hardware(world),
        "parameters": parameter_table(vlm),
        "steps": walk.steps,
        "rows_per_step": walk.rows_per_step,
        "row_tokens": data.capacity,
        "train": _data(data, scan),
        "eval": _data(held_out.data, held_out.scan) if held_out is not None else None,
    }


def _data(data: InstructionData, scan: Scan) -> dict[str, Any]:
    sources = []
    for i, (name, source) in enumerate(zip(source_names(data), data.sources, strict=True)):
        mine = scan.source == i
        units, tokens = int(mine.sum()), int(scan.length[mine].sum())
        sources.append(
            {"name": name, "path": str(source.origin), "records": len(source), "units": units, "tokens": tokens}
        )
    totals = {"records": scan.records, "bad": len(scan.bad), "supervised": scan.supervised, "pictures": scan.pictures}
    return {"sources": sources, **totals}


@functools.cache  # reads and parses a file for each library
def _versions() -> dict[str, str]:
    found = {"mmit": mmit.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hardware(world: World) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "host": platform.node(),
        "system": platform.platform(),
        "ranks": world.size,
        "engine": "deepspeed" if world.deepspeed else "torch",
        "device": str(world.device.type),
        "cpu_cores": os.cpu_count(),
        "cpu_threads_per_rank": torch.get_num_threads(),
    }
    if world.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(world.device)
        facts |= {"gpu": gpu.name, "gpu_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


def note_start(run_dir: Path, facts: dict[str, Any], *, step: int) -> None:
    """Write run.json: the facts of this start, and the moments of all."""
    earlier = read_json(run_dir / RUN, RUN)
    starts = [s for s in earlier.get("starts") or [] if s["step"] <= step] if step else []
    now = {"time": round(time.time(), 1), "step": step, "ranks": facts["hardware"]["ranks"]}
    write_json(run_dir / RUN, {**facts, "starts": [*starts, now]})
