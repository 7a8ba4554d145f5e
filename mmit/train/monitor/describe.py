"""What a run is, said on the screen and written down when it starts: versions, hardware, parameters, data.

`introduce` prints it with an example; `run.json` in the run folder keeps it, with an entry for every start, the resumed
ones too. The report and `mmit run-status` read that.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mmit
from mmit.data.chat_check import difference
from mmit.data.dataset import InstructionData, split_pairs
from mmit.data.viewer import to_rich
from mmit.models.tuning import parameter_table
from mmit.train.data.setup import source_names
from mmit.train.monitor.run_files import RUN, read_json, write_json

if TYPE_CHECKING:
    from mmit.data.chat import ChatFormat
    from mmit.data.measure import Measurements
    from mmit.data.row_order import RowOrder
    from mmit.models.vlm import VLM
    from mmit.train.checkpoint.model import Loaded
    from mmit.train.data.batches import TrainData
    from mmit.train.engines.world import World

LIBRARIES = ("torch", "transformers", "peft", "open_clip_torch", "timm", "deepspeed")
FIRST = 16  # records compared with what the chat template writes


def introduce(
    model: Loaded,
    data: InstructionData,
    scan: Measurements,
    *,
    row_order: RowOrder,
    lr: Mapping[str, float | None],
    say: Callable[[Any], None],
) -> None:
    """Print what is about to happen: counts, trained parameters, one example with its mask.

    Args:
        model: loaded and tuned. data: its records. scan: what was measured of them. row_order: the run's rows.
        lr: the peak learning rate of each component, None where it is frozen.
        say: takes text and tables.
    """
    from rich.table import Table

    tokens = int(scan.length.sum())
    say(
        f"{scan.records - len(scan.bad)} records of {len(data.sources)} sources, {scan.pictures} pictures, "
        f"{tokens} tokens, {scan.supervised} supervised; {row_order.steps} steps of {row_order.rows_per_step} rows of "
        f"{data.capacity} tokens"
    )
    table = Table("component", "parameters", "trained", "share", "dtype", "lr")
    for row in parameter_table(model.vlm):
        rate = lr.get(row["component"])
        table.add_row(
            row["component"],
            f"{row['total']:,}",
            f"{row['trained']:,}",
            f"{100 * row['trained'] / max(row['total'], 1):.2f} %",
            row["dtype"],
            f"{rate:g}" if rate is not None and row["trained"] else "-",
        )
    say(table)
    # The first that is trained on, mask and all: a template that marks the wrong text shows here before hours of
    # training.
    record = data.record(int(scan.record[0]))
    shown = split_pairs(record)[0] if data.split_turns else record
    _compare(data, scan, model.chat, say)
    fixed = data.preparation is not None and not data.preparation.tiled
    factor = data.source_weights[data.source_of(int(scan.record[0]))]
    shown = replace(shown, weight=shown.weight * factor) if factor else shown  # without any loss there is no sample
    say(to_rich(data.encode(shown), model.tokenizer, image_tokens=model.vlm.image_tokens if fixed else None))


def _compare(data: InstructionData, scan: Measurements, chat: ChatFormat, say: Callable[[Any], None]) -> None:
    """Compare the first records with what the chat template itself writes, and name the first difference."""
    # A few are enough: a format that writes otherwise than the model's own template does so in every record of a kind.
    for number in dict.fromkeys(scan.record[:FIRST].tolist()):
        record = data.record(int(number), outline=True)
        for part in split_pairs(record) if data.split_turns else [record]:
            if found := difference(part, chat):
                say(f"{record.where} is not what the chat template writes: {found}")
                return


def describe(
    vlm: VLM,
    data: InstructionData,
    scan: Measurements,
    *,
    row_order: RowOrder,
    held_out: TrainData | None,
    world: World,
) -> dict[str, Any]:
    """Facts of a run as JSON values.

    Args:
        data, scan, row_order: of training. held_out: None without data.eval.
    """
    return {
        "versions": dict(_versions()),
        "hardware": _hardware(world),
        "parameters": parameter_table(vlm),
        "steps": row_order.steps,
        "rows_per_step": row_order.rows_per_step,
        "row_tokens": data.capacity,
        "train": _data(data, scan),
        "eval": _data(held_out.data, held_out.scan) if held_out is not None else None,
    }


def _data(data: InstructionData, scan: Measurements) -> dict[str, Any]:
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
    # Starts that a resume went behind belong to a course that was left, as the rows of metrics after it.
    earlier = read_json(run_dir / RUN, RUN)
    starts = [s for s in earlier.get("starts") or [] if s["step"] <= step] if step else []
    now = {"time": round(time.time(), 1), "step": step, "ranks": facts["hardware"]["ranks"]}
    write_json(run_dir / RUN, {**facts, "starts": [*starts, now]})
