"""A forecast as tables for a terminal: data, model, FLOPs, memory with verdicts, time and price."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mmit.forecast.rates import PARTS
from mmit.train.memory.estimate import ALONE, ROOM

if TYPE_CHECKING:
    from mmit.forecast.forecast import Forecast
    from mmit.train.memory.devices import Device


def show(
    found: Forecast,
    device: Device,
    *,
    share: float,
    peak: float | None,
    price: float | None,
    say: Callable[[Any], None],
) -> None:
    """Print a forecast.

    Args:
        share: of the peak that the devices reach. peak: FLOP/s of one, None for the device's own.
        price: of one device for an hour.
    """
    for note in found.notes:
        say(note)
    how = "all" if found.measured == found.records else f"told from {found.measured:,} of them"
    say(
        f"{found.records:,} records ({how}), {found.pictures:,.0f} pictures; an epoch: {_count(found.tokens)} tokens, "
        f"{_count(found.supervised)} supervised"
    )
    say(
        f"{found.steps:,} steps, {found.epochs:.2f} epochs; a step: {found.rows_per_step} rows on {found.ranks} "
        f"rank{'s' * (found.ranks > 1)}, {found.micro_batches} micro-batch{'es' * (found.micro_batches > 1)} each of "
        f"{found.row.tokens:,.0f} tokens, {found.row.supervised:,.0f} supervised, {found.row.crops:.1f} pictures (or "
        f"crops of them); rows {100 * found.fill:.1f} % full"
    )
    say(_parameters(found))
    say(_flops(found))
    if found.once:
        say(f"before the first step, for the feature cache: {_count(found.once)}FLOP")
    if found.reference:
        say(f"before the first step, for the reference of {found.records:,} records: {_count(found.reference)}FLOP")
    say(_memory(found, device))
    kept, row = found.memory, found.stages[ALONE]
    say(
        f"one device: {_gib(row)} = LLM {_gib(kept.llm)}, tower and projector {_gib(kept.rest)}, float32 masters "
        f"{_gib(kept.masters)}, moments {_gib(kept.moments)}, activations, gradients and logits {_gib(kept.passing)}"
    )
    _time(found, device, share=share, peak=peak, price=price, say=say)


def _parameters(found: Forecast) -> Table:
    table = Table("component", "parameters", "trained", "share", "dtype")
    for row in found.parameters:
        share = f"{100 * row['trained'] / max(row['total'], 1):.2f} %"
        table.add_row(row["component"], f"{row['total']:,}", f"{row['trained']:,}", share, row["dtype"])
    return table


def _flops(found: Forecast) -> Table:
    table = Table("FLOPs of a step", "forward", "backward", "recomputed", "share")
    for part in PARTS:
        kinds = found.flops[part]
        if total := sum(kinds.values()):
            cells = (_count(kinds[k]) if kinds[k] else "-" for k in ("forward", "backward", "recompute"))
            table.add_row(part, *cells, f"{100 * total / found.step_flops:.1f} %")
    sums = [sum(found.flops[p][k] for p in PARTS) for k in ("forward", "backward", "recompute")]
    table.add_row("all", *(_count(s) if s else "-" for s in sums), "100 %")
    return table


def _memory(found: Forecast, device: Device) -> Table:
    table = Table("memory per rank", "forecast", f"on {device.name}, {device.memory / 1e9:.0f} GB")
    for name, size in found.stages.items():
        if found.ranks > 1 and name == ALONE and found.memory.masters:
            continue  # ZeRO-0 is for fp32 alone
        need = device.need(size)
        verdict = "fits" if need <= ROOM * device.memory else "tight" if need <= device.memory else "too much"
        table.add_row(name, _gib(size), f"{verdict} ({100 * need / device.memory:.0f} %)")
    return table


def _time(
    found: Forecast,
    device: Device,
    *,
    share: float,
    peak: float | None,
    price: float | None,
    say: Callable[[Any], None],
) -> None:
    total = found.step_flops * found.steps + found.once + found.reference
    peak = peak or device.peak
    if peak is None:
        say(f"the run: {_count(total)}FLOP. For its time give --gpu NAME, or --tflops with the device's peak")
        return
    hours = total / (peak * share * found.ranks) / 3600
    money = f", {hours * found.ranks * price:,.2f} at {price:g} a device and hour" if price is not None else ""
    length = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    say(
        f"the run: {_count(total)}FLOP, {length} on {found.ranks} x {device.name} at {100 * share:.0f} % of "
        f"{peak / 1e12:g} TFLOP/s{money}"
    )


def _count(number: float) -> str:
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f} "


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
