"""What a run says before its first step: counts, trained parameters, one example with its mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmit.data.chat_check import difference
from mmit.data.dataset import InstructionData, split_pairs
from mmit.data.viewer import to_rich
from mmit.models.tuning import parameter_table

if TYPE_CHECKING:
    from mmit.data.chat import ChatFormat
    from mmit.data.measure import Scan
    from mmit.data.walk import Walk
    from mmit.models.vlm import VLM

FIRST = 16  # records compared with what the chat template writes


def echo(
    vlm: VLM,
    data: InstructionData,
    scan: Scan,
    *,
    walk: Walk,
    tokenizer: Any,
    lr: Mapping[str, float | None],
    say: Callable[[Any], None],
    chat: ChatFormat,
) -> None:
    """Print what is about to happen; `lr` is the peak learning rate of each component."""
    from rich.table import Table

    tokens = int(scan.length.sum())
    say(
        f"{scan.records - len(scan.bad)} records of {len(data.sources)} sources, {scan.pictures} pictures, "
        f"{tokens} tokens, {scan.supervised} supervised; {walk.steps} steps of {walk.rows_per_step} rows of "
        f"{data.capacity} tokens"
    )
    table = Table("component", "parameters", "trained", "share", "dtype", "lr")
    for row in parameter_table(vlm):
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
    record = data.record(int(scan.record[0]))
    shown = split_pairs(record)[0] if data.split_turns else record
    _compare(data, scan, chat, say)
    fixed = data.preparation is not None and not data.preparation.tiled
    factor = data.source_weights[data.source_of(int(scan.record[0]))]
    shown = replace(shown, weight=shown.weight * factor) if factor else shown  # without any loss there is no sample
    say(to_rich(data.encode(shown), tokenizer, image_tokens=vlm.image_tokens if fixed else None))


def _compare(data: InstructionData, scan: Scan, chat: ChatFormat, say: Callable[[Any], None]) -> None:
    """Compare the first records with what the chat template itself writes, and name the first difference."""
    for number in dict.fromkeys(scan.record[:FIRST].tolist()):
        record = data.record(int(number), outline=True)
        for part in split_pairs(record) if data.split_turns else [record]:
            if found := difference(part, chat):
                say(f"{record.where} is not what the chat template writes: {found}")
                return
