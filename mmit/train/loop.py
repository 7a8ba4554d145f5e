"""The train loop: the only one.

In: an engine, a walk through the data, schedule numbers, callables for batches and saves. Out: a trained model, a
metrics file. A step's loss is summed over its supervised tokens and divided by their number over all ranks and
micro-batches, so that splitting the same rows differently changes nothing. Refuses to go on after
`MAX_BAD_STEPS` steps in a row whose loss or gradient was not finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from mmit.data.loader import MicroBatch
from mmit.data.walk import Walk
from mmit.errors import MmitError, RecordError
from mmit.train.engine import Engine
from mmit.train.metrics_log import RunLog, memory_gib
from mmit.train.schedule import lr_factor

MAX_BAD_STEPS = 8
MAX_BAD_RUN = 100


@dataclass
class Progress:
    """Where a run stands; everything a resumed run needs besides tensors."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0
    supervised: int = 0
    skipped_steps: int = 0
    bad_records: int = 0
    bad_run: int = 0  # bad records on this rank since the last good one
    bad_in_a_row: int = field(default=0)


@dataclass(frozen=True)
class Plan:
    """Numbers of a run that do not change."""

    schedule: str
    warmup: float
    min_lr_ratio: float
    peak_lr: float
    capacity: int
    micro_rows: int
    log_every: int
    save_every: int | None
    max_bad: int  # bad records that are tolerated while running


def train(
    engine: Engine,
    walk: Walk,
    batches: Iterable[MicroBatch],
    *,
    plan: Plan,
    progress: Progress,
    log: RunLog,
    prepare: Callable[[MicroBatch], dict[str, torch.Tensor]],
    save: Callable[[Progress], None],
    on_bad: Callable[[RecordError], None],
    name_records: Callable[[int, list[tuple[int, int]]], str] = lambda step, places: "unnamed records",
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run from `progress.step` to the end of `walk`; `progress` is kept up to date.

    Args:
        batches: this rank's micro-batches from `progress.step` on, in order.
        prepare: a micro-batch -> model arguments on the device (looks cached features up).
        save: writes a checkpoint. on_bad: notes a record that was left out.
        name_records: step, (rank, micro-batch) pairs -> the records in them, for the message of a skipped step.
        should_stop: asked after every step, on every rank; True ends the run early.

    Returns:
        True when the walk was finished, False when stopped early.
    """
    source = iter(batches)
    micros = len(walk.micro_positions(0, rank=engine.rank, world=engine.world, micro_rows=plan.micro_rows))
    while progress.step < walk.steps:
        began = time.perf_counter()
        step_batches = [next(source) for _ in range(micros)]
        for batch in step_batches:
            for error in batch.bad:
                progress.bad_records += 1
                on_bad(error)
            progress.bad_run = len(batch.bad) + (0 if batch.records else progress.bad_run)
        tokens = sum(b.tokens for b in step_batches)
        hopeless = float(progress.bad_run >= MAX_BAD_RUN)
        local = [float(sum(b.targets for b in step_batches)), float(tokens), float(progress.bad_records), hopeless]
        targets, all_tokens, all_bad, all_hopeless = engine.all_sum(local)
        if all_hopeless:
            raise MmitError(
                f"{MAX_BAD_RUN} bad records came without a good one between them",
                remedy="see bad_records.jsonl in the run folder; the disk or the data set itself is likely at fault",
            )
        if all_bad > plan.max_bad:
            raise MmitError(
                f"{all_bad:.0f} bad records were met while training, more than the {plan.max_bad} that are tolerated",
                remedy="see bad_records.jsonl in the run folder; mend the data or raise run.max_bad_fraction",
            )
        total = 0.0
        spoilt = [0.0] * (engine.world * micros)  # micro-batches whose loss is not finite, rank by rank
        for i, batch in enumerate(step_batches):
            scale = batch.weight / max(targets, 1.0)
            losses = engine.forward_backward(prepare(batch), scale=scale, last=i == micros - 1)
            share = float(losses.sum()) * batch.weight
            spoilt[engine.rank * micros + i] = float(not math.isfinite(share))
            total += share
        factor = lr_factor(
            progress.step,
            steps=walk.steps,
            schedule=plan.schedule,
            warmup=plan.warmup,
            min_ratio=plan.min_lr_ratio,
        )
        norm = engine.step(factor)
        total, *spoilt = engine.all_sum([total, *spoilt])
        loss = total / max(targets, 1.0)
        if math.isfinite(loss) and math.isfinite(norm):
            progress.bad_in_a_row = 0
        else:
            places = [divmod(i, micros) for i, bad in enumerate(spoilt) if bad or not any(spoilt)]
            _skipped(progress, loss, norm, records=name_records(progress.step, places), say=log.say)
        progress.step += 1
        progress.tokens += int(all_tokens)
        progress.supervised += int(targets)
        seconds = time.perf_counter() - began
        row = {
            "step": progress.step,
            "epoch": round(walk.epoch_at(progress.step * walk.rows_per_step), 4),
            "loss": loss,
            "lr": plan.peak_lr * factor,
            "grad_norm": norm,
            "tokens": int(all_tokens),
            "supervised": int(targets),
            "records": sum(len(b.records) for b in step_batches),
            "tokens_per_s": all_tokens / seconds,
            "supervised_per_s": targets / seconds,
            "fill": all_tokens / (walk.rows_per_step * plan.capacity),
            "imbalance": walk.imbalance(progress.step - 1, world=engine.world),
            "shared": 1 - tokens / max(sum(b.unshared_tokens for b in step_batches), 1),
            "memory_gib": memory_gib(engine.device),
            "skipped_steps": progress.skipped_steps,
            "bad_records": int(all_bad),
            "seconds": seconds,
        }
        log.step(row, write=progress.step % plan.log_every == 0 or progress.step == walk.steps)
        done = progress.step == walk.steps
        due = done or (plan.save_every is not None and progress.step % plan.save_every == 0)
        if due:
            save(progress)
        if done:
            return True
        if engine.all_sum([float(should_stop())])[0] > 0:  # asked after a save, which may take long
            if not due:
                save(progress)
            return False
    return True


def _skipped(progress: Progress, loss: float, norm: float, *, records: str, say: Callable[[str], None]) -> None:
    """Count and tell a step that was skipped; every rank sees the same loss and norm, so all of them stop together."""
    progress.skipped_steps += 1
    progress.bad_in_a_row += 1
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    say(f"step {progress.step + 1} skipped, nothing was changed: {what} with {records}")
    if progress.bad_in_a_row >= MAX_BAD_STEPS:
        raise MmitError(
            f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row "
            f"(step {progress.step + 1}, loss {loss}, gradient norm {norm}, {records})",
            remedy="lower the learning rates, lengthen train.warmup, or look at these records with mmit inspect",
        )
