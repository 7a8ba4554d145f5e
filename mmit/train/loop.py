"""The train loop: the only one.

In: an engine, a walk through the data, schedule numbers, callables for batches, evaluations and saves. Out: a trained
model, a metrics file. A step's loss is the weighted mean over its supervised tokens, those of a weight above 0: the
sum of weight times loss divided by the sum of the weights, both over all ranks and micro-batches, so that splitting the
same rows differently changes nothing. `supervised` counts tokens, whatever their weight. Refuses to go on after
`MAX_BAD_STEPS` steps in a row whose loss or gradient was not finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from mmit.errors import MmitError, RecordError
from mmit.train.engines.base import Engine, weighted
from mmit.train.monitor.metrics_log import RunLog, memory_gib
from mmit.train.schedule import lr_factor
from mmit.train.spikes import Spikes

if TYPE_CHECKING:
    from mmit.data.loader import MicroBatch
    from mmit.data.walk import Walk

MAX_BAD_STEPS = 8
MAX_BAD_RUN = 100
Places = list[tuple[int, int]]  # (rank, micro-batch) pairs


@dataclass
class Progress:
    """Where a run stands; everything a resumed run needs besides tensors."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0
    supervised: int = 0
    skipped_steps: int = 0
    bad: list[int] = field(default_factory=list)  # numbers of the records that turned out bad, on any rank
    bad_run: int = 0  # bad records on this rank since the last good one
    bad_in_a_row: int = field(default=0)
    spikes: int = 0
    recent: list[float] = field(default_factory=list)  # losses that the next one is compared with
    evaluated: int = 0  # step of the last evaluation
    best: dict[str, Any] | None = None  # of train.keep_best: metric, value, step


@dataclass(frozen=True)
class Plan:
    """Numbers of a run that do not change."""

    schedule: str
    warmup: float
    min_lr_ratio: float
    rates: Mapping[str, float]  # peak learning rate of each trained component, the one that is shown first
    capacity: int
    micro_rows: int
    log_every: int
    save_every: int | None
    max_bad: int  # bad records that are tolerated while running, however often each is met
    sources: Sequence[str] = ()  # their names
    starts: Sequence[int] = ()  # the number of the first record of each
    spikes: Spikes = Spikes(None, 128)
    eval_every: int | None = None


@dataclass
class _Step:
    """Sums of one step over all ranks."""

    targets: float
    tokens: float
    bad_records: int  # different ones, since the run began
    records: float
    unshared: float
    weight: float  # of the targets, summed
    targets_of: list[float]  # by source
    weight_of: list[float]  # summed, by source
    micro_weights: list[float]  # summed, by micro-batch, rank by rank
    losses_of: list[float] = field(default_factory=list)  # weighted and summed, by source
    micro_losses: list[float] = field(default_factory=list)  # weighted and summed, by micro-batch, rank by rank

    @property
    def loss(self) -> float:
        """Weighted mean over the supervised tokens."""
        return sum(self.losses_of) / (self.weight or 1.0)


def train(  # noqa: PLR0913
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
    name_records: Callable[[int, Places], str] = lambda step, places: "unnamed records",
    evaluate: Callable[[Progress], bool] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    save_failed: Callable[[], bool] = lambda: False,
    phase: Callable[[str, int], None] = lambda name, step: None,
) -> bool:
    """Run from `progress.step` to the end of `walk`; `progress` is kept up to date.

    Args:
        batches: this rank's micro-batches from `progress.step` on, in order.
        prepare: a micro-batch -> model arguments on the device (looks cached features up).
        save: writes a checkpoint. on_bad: notes a record that was left out.
        name_records: step, (rank, micro-batch) pairs -> the records in them, for the message of a skipped step.
        evaluate: measures and logs the model; True asks for a checkpoint, since it is the best one.
        should_stop: asked after every step, on every rank; True ends the run early.
        save_failed: whether a save in the background failed on this rank; `save` then raises why.
        phase: told what this rank begins to do, and in which step.

    Returns:
        True when the walk was finished, False when stopped early.
    """
    source = iter(batches)
    micros = walk.micros(world=engine.world, micro_rows=plan.micro_rows)
    better = _evaluate_if_due(evaluate, walk, plan, progress)  # a signal may have cut it short
    if better:
        save(progress)
    while progress.step < walk.steps:
        began, number = time.perf_counter(), progress.step + 1
        phase("data loading", number)
        step_batches = [next(source) for _ in range(micros)]
        new = _note_bad(step_batches, progress, on_bad)
        step = _count(engine, step_batches, plan, progress, new=new)
        phase("forward and backward", number)
        sums = []
        for i, batch in enumerate(step_batches):
            scale, weights = batch.weight / (step.weight or 1.0), batch.uneven_weights
            losses = engine.forward_backward(prepare(batch), scale=scale, last=i == micros - 1, weights=weights)
            sources = sources_of(batch.target_records, plan.starts)
            sums.append(sum_by_source(weighted(losses, weights), sources, count=len(plan.sources)) * batch.weight)
        phase("optimizer step", number)
        factor = lr_factor(
            progress.step,
            steps=walk.steps,
            schedule=plan.schedule,
            warmup=plan.warmup,
            min_ratio=plan.min_lr_ratio,
        )
        norm = engine.step(factor)
        phase("sums over ranks", number)
        _sum_losses(engine, step, torch.stack(sums).tolist())
        _judge(step, norm, progress=progress, plan=plan, micros=micros, name_records=name_records, log=log)
        progress.step += 1
        progress.tokens += int(step.tokens)
        progress.supervised += int(step.targets)
        row = _row(step, walk, plan, progress, factor=factor, norm=norm, seconds=time.perf_counter() - began)
        row["imbalance"] = walk.imbalance(progress.step - 1, world=engine.world, micro_rows=plan.micro_rows)
        row["memory_gib"] = memory_gib(engine.device)
        done = progress.step == walk.steps
        log.step(row, write=progress.step % plan.log_every == 0 or done)
        better = _evaluate_if_due(evaluate, walk, plan, progress)
        due = done or better or (plan.save_every is not None and progress.step % plan.save_every == 0)
        if due:
            save(progress)
        phase("sums over ranks", number)
        # After a save, which may take long. One sum for both, since each costs a wait for all ranks.
        asked, failed = engine.all_sum([float(should_stop()), float(save_failed())])
        if (asked or failed) and not (due or done):
            save(progress)
        if done:
            return True
        if asked:
            return False
    return True


def _evaluate_if_due(evaluate: Callable[[Progress], bool] | None, walk: Walk, plan: Plan, progress: Progress) -> bool:
    """Evaluate after every `eval_every` steps and after the last; True when this is the best model so far."""
    if evaluate is None or progress.evaluated == progress.step or progress.step == 0:
        return False
    due = progress.step == walk.steps or (plan.eval_every is not None and progress.step % plan.eval_every == 0)
    return due and evaluate(progress)


def _note_bad(batches: Sequence[MicroBatch], progress: Progress, on_bad: Callable[[RecordError], None]) -> list[int]:
    """Hand over and return the records that turn out bad for the first time, here at least; each epoch meets them."""
    met: dict[int, RecordError] = {}
    for batch in batches:
        met |= batch.bad
        progress.bad_run = len(batch.bad) + (0 if batch.records else progress.bad_run)
    known = set(progress.bad) if met else set()
    new = [number for number in met if number not in known]
    for number in new:
        on_bad(met[number])
    return new


def _agree_on_bad(engine: Engine, progress: Progress, new: Sequence[int], counts: Sequence[float]) -> None:
    """Let every rank know the records that any of them found bad; `counts` says how many are new on each rank."""
    places = [0, *accumulate(map(int, counts))]
    table = [0.0] * places[-1]
    table[places[engine.rank] : places[engine.rank + 1]] = map(float, new)
    if table:  # the same on all ranks
        found = map(int, engine.all_sum(table))
        progress.bad = list(dict.fromkeys([*progress.bad, *found]))


def _count(
    engine: Engine, batches: Sequence[MicroBatch], plan: Plan, progress: Progress, *, new: Sequence[int]
) -> _Step:
    """Count tokens, targets and records of the step over all ranks. Raises MmitError for too many bad records.

    `new` are the numbers of bad records that this rank met for the first time.
    """
    hopeless = float(progress.bad_run >= MAX_BAD_RUN)
    local = [float(sum(b.targets for b in batches)), float(sum(b.tokens for b in batches))]
    local += [float(sum(len(b.records) for b in batches)), float(sum(b.unshared_tokens for b in batches))]
    local += [sum(b.loss_weight for b in batches), hopeless]
    bad = [0.0] * engine.world
    bad[engine.rank] = float(len(new))
    by_source = torch.zeros(len(plan.sources), dtype=torch.int64)
    weights = torch.zeros(len(plan.sources), dtype=torch.float64)
    micro = [0.0] * (engine.world * len(batches))
    for i, batch in enumerate(batches):
        micro[engine.rank * len(batches) + i] = batch.loss_weight
        if batch.targets:
            sources = sources_of(batch.target_records, plan.starts)
            by_source += torch.bincount(sources, minlength=len(plan.sources))
            weights += torch.bincount(sources, batch.target_weights.double(), minlength=len(plan.sources))
    found = engine.all_sum([*local, *bad, *by_source.tolist(), *weights.tolist(), *micro])
    targets, tokens, records, unshared, weight, lost, *rest = found
    bad, rest = rest[: engine.world], rest[engine.world :]
    _agree_on_bad(engine, progress, new, bad)
    if lost:
        raise MmitError(
            f"{MAX_BAD_RUN} bad records came without a good one between them",
            remedy="see bad_records.jsonl in the run folder; the disk or the data set itself is likely at fault",
        )
    if len(progress.bad) > plan.max_bad:
        raise MmitError(
            f"{len(progress.bad)} bad records were met while training, more than the {plan.max_bad} that are tolerated",
            remedy="see bad_records.jsonl in the run folder; fix the data or raise run.max_bad_fraction",
        )
    count = len(plan.sources)
    by = rest[:count], rest[count : 2 * count], rest[2 * count :]
    return _Step(targets, tokens, len(progress.bad), records, unshared, weight, *by)


def sources_of(records: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    """Which source each record number is of: (S,) -> (S,), on the CPU."""
    return torch.bucketize(records, torch.tensor(starts[1:], dtype=torch.int64), right=True)


def sum_by_source(losses: torch.Tensor, sources: torch.Tensor, *, count: int) -> torch.Tensor:
    """Sum losses (S,) by source, on their device and without waiting for it: (count,) float64.

    A selection and not a product: a loss that is not finite must stay in its own source. Not `index_add_`, whose sum
    depends on the order of its threads on CUDA.
    """
    own = sources.to(losses.device, non_blocking=True)
    chosen = own == torch.arange(count, device=losses.device)[:, None]  # (count, S)
    return torch.where(chosen, losses, 0).sum(1).double()


def _sum_losses(engine: Engine, step: _Step, table: Sequence[Sequence[float]]) -> None:
    """Sum the losses of this rank's micro-batches, given by (micro-batch, source), over ranks."""
    count = len(table[0])
    micro = [0.0] * (engine.world * len(table))
    micro[engine.rank * len(table) : (engine.rank + 1) * len(table)] = [sum(row) for row in table]
    sums = engine.all_sum([*(sum(row[k] for row in table) for k in range(count)), *micro])
    step.losses_of, step.micro_losses = sums[:count], sums[count:]


def _row(
    step: _Step, walk: Walk, plan: Plan, progress: Progress, *, factor: float, norm: float, seconds: float
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    named = list(zip(plan.sources, step.losses_of, step.targets_of, step.weight_of, strict=True))
    return {
        "step": progress.step,
        "epoch": round(walk.epoch_at(progress.step * walk.rows_per_step), 4),
        "loss": step.loss,
        "loss_of": {name: total / weight for name, total, count, weight in named if count},
        "supervised_of": {name: int(count) for name, _, count, _ in named if count},
        "weight_of": {name: weight for name, _, count, weight in named if count},
        "lr": next(iter(plan.rates.values())) * factor,
        "lr_of": {name: peak * factor for name, peak in plan.rates.items()},
        "grad_norm": norm,
        "tokens": int(step.tokens),
        "supervised": int(step.targets),
        "weight": step.weight,
        "records": int(step.records),
        "tokens_per_s": step.tokens / seconds,
        "supervised_per_s": step.targets / seconds,
        "fill": step.tokens / (walk.rows_per_step * plan.capacity),
        "shared": 1 - step.tokens / max(step.unshared, 1.0),
        "skipped_steps": progress.skipped_steps,
        "spikes": progress.spikes,
        "bad_records": step.bad_records,
        "seconds": seconds,
    }


def _judge(
    step: _Step,
    norm: float,
    *,
    progress: Progress,
    plan: Plan,
    micros: int,
    name_records: Callable[[int, Places], str],
    log: RunLog,
) -> None:
    """Count and tell a step that was skipped, or whose loss leaps.

    Every rank sees the same loss and norm, so all of them stop together. Raises MmitError after MAX_BAD_STEPS.
    """
    loss, number = step.loss, progress.step + 1
    if math.isfinite(loss) and math.isfinite(norm):
        progress.bad_in_a_row = 0
        bound = plan.spikes.bound(progress.recent)
        if loss > bound:
            progress.spikes += 1
            means = [s / n if n else 0.0 for s, n in zip(step.micro_losses, step.micro_weights, strict=True)]
            leaping = [divmod(i, micros) for i, mean in enumerate(means) if mean > bound]
            # By rows alone none may leap: a step's loss weighs them by their weights.
            records = name_records(progress.step, leaping or [divmod(means.index(max(means)), micros)])
            log.say(f"loss spike in step {number}: {loss:.4f}, expected at most {bound:.4f}, with {records}")
            log.event(number, "spike", loss=loss, bound=bound, grad_norm=norm, records=records)
        plan.spikes.remember(progress.recent, loss)
        return
    spoilt = [not math.isfinite(s) for s in step.micro_losses]
    places = [divmod(i, micros) for i, bad in enumerate(spoilt) if bad or not any(spoilt)]
    records = name_records(progress.step, places)
    progress.skipped_steps += 1
    progress.bad_in_a_row += 1
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    log.say(f"step {number} skipped, nothing was changed: {what} with {records}")
    log.event(number, "skipped", loss=loss, grad_norm=norm, records=records)
    if progress.bad_in_a_row >= MAX_BAD_STEPS:
        raise MmitError(
            f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row "
            f"(step {number}, loss {loss}, gradient norm {norm}, {records})",
            remedy="lower the learning rates, lengthen train.warmup, or look at these records with mmit inspect",
        )
