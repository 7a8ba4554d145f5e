"""The train loop: the only one. To follow a step, read `train` here, then `data/batches.py` and the engine.

In: an engine, the data, a schedule, and hooks for what a run does around its steps. Out: a trained model. A step's loss
is the weighted mean over its supervised tokens, those of a weight above 0: the sum of weight times loss divided by the
sum of the weights, both over all ranks and micro-batches, so that splitting the same rows differently changes nothing.
`supervised` counts tokens, whatever their weight. Under a preference method a loss belongs to a comparison of answers,
not to a token, and all else is the same. Refuses to go on after `MAX_BAD_STEPS` steps in a row whose loss or
gradient was not finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from mmit.errors import MmitError, RecordError
from mmit.models.sending import fetch
from mmit.train.engines.base import Engine, weighted

if TYPE_CHECKING:
    from mmit.data.loader import MicroBatch
    from mmit.train.data.batches import TrainData
    from mmit.train.objective import Preference
    from mmit.train.schedule import Schedule

MAX_BAD_STEPS = 8
MAX_BAD_RUN = 100


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


class Hooks:
    """What happens around the steps; this default does nothing. Every rank calls each hook at the same place."""

    def phase(self, name: str, step: int) -> None:
        """Told what this rank begins to do, and in which step."""

    def on_bad(self, error: RecordError) -> None:
        """Receives a record that was left out, on the rank that met it."""

    def on_event(self, step: int, kind: str, message: str, **facts: Any) -> None:
        """A step was "skipped", or its loss is a "spike".

        Args:
            step: that it happened in.
            kind: "skipped" or "spike".
            message: the same in words.
            facts: its numbers, by name.
        """

    def after_step(self, progress: Progress, row: dict[str, Any]) -> None:
        """Called with the step's line of metrics: the place to log, to evaluate and to save."""

    def should_stop(self, progress: Progress) -> bool:
        """Whether to end early; asked after every step but the last, and alike on all ranks."""
        return False


@dataclass
class _Step:
    """Sums of one step over all ranks."""

    targets: float
    tokens: float
    bad_records: int  # different ones, since the run began
    records: float
    unshared: float
    weight: float  # of the targets, summed
    waited: float  # seconds that a rank waited for its micro-batches, the mean
    targets_of: list[float]  # by source
    weight_of: list[float]  # summed, by source
    micro_weights: list[float]  # summed, by micro-batch, rank by rank
    losses_of: list[float] = field(default_factory=list)  # weighted and summed, by source
    micro_losses: list[float] = field(default_factory=list)  # weighted and summed, by micro-batch, rank by rank

    @property
    def loss(self) -> float:
        """Weighted mean over the supervised tokens."""
        return sum(self.losses_of) / (self.weight or 1.0)


def train(
    engine: Engine,
    data: TrainData,
    schedule: Schedule,
    hooks: Hooks,
    *,
    progress: Progress,
    preference: Preference | None = None,
) -> bool:
    """Run from `progress.step` to the end of the schedule; `progress` is kept up to date.

    Args:
        preference: makes losses of comparisons of the model's losses; None for plain tuning.

    Returns:
        True when the schedule was finished, False when a hook stopped it early.

    Raises:
        MmitError: too many bad records, or steps in a row that are not finite; the same on all ranks.
    """
    # Closed with the loop: loader processes ignore signals, so that they would keep this process from ending.
    with closing(data.batches(progress.step)) as source:
        while progress.step < schedule.steps:
            began, number = time.perf_counter(), progress.step + 1
            hooks.phase("data loading", number)
            # All of a step's micro-batches at once: the divisor below needs the weight of every one of them.
            batches = [next(source) for _ in range(data.micros)]
            waited = time.perf_counter() - began
            new = _note_bad(batches, progress, hooks.on_bad)
            step = _count(engine, data, batches, progress, new=new, waited=waited)
            hooks.phase("forward and backward", number)
            sums = _forward_backward(engine, data, batches, step, preference)
            # Reading a loss makes the host wait for the device, so it is read once the norm has been waited for.
            found = fetch(torch.stack(sums))
            hooks.phase("optimizer step", number)
            # From the step alone: a resumed run has no scheduler whose state could be lost or counted twice.
            factor = schedule.lr_factor(progress.step)
            norm = engine.step(factor)
            hooks.phase("sums over ranks", number)
            _sum_losses(engine, step, found().tolist())
            _check_loss(step, norm, progress=progress, data=data, schedule=schedule, hooks=hooks)
            # Counted also where the step was skipped: its rows are spent, and the data order goes by this number.
            progress.step += 1
            progress.tokens += int(step.tokens)
            progress.supervised += int(step.targets)
            seconds = time.perf_counter() - began
            row = _row(step, data, schedule, progress, norm=norm, seconds=seconds)
            hooks.after_step(progress, row | preference.metrics(engine) if preference is not None else row)
            if progress.step < schedule.steps and hooks.should_stop(progress):
                return False
    return True


def _forward_backward(
    engine: Engine, data: TrainData, batches: Sequence[MicroBatch], step: _Step, preference: Preference | None
) -> list[torch.Tensor]:
    """Collect the gradient of the step; returns the weighted losses of each micro-batch, summed by source."""
    if preference is not None:
        preference.begin(engine, data, batches)
    sums = []
    for i, batch in enumerate(batches):
        # Why: the divisor is known before the first forward pass, so each micro-batch adds its share of the step's one
        # mean. A mean of micro-batch means would weigh short answers more than long ones.
        # A rank without rows runs its micro-batch with weight 0: under ZeRO-3 all must run the same layers.
        scale, weights = batch.weight / (step.weight or 1.0), batch.uneven_weights
        given: dict[str, Any] = {"scale": scale, "last": i == len(batches) - 1, "weights": weights}
        if preference is not None:
            given["reduce"] = partial(preference.losses, batch=batch)
        losses = engine.forward_backward(data.prepare(batch), **given)
        sources = data.sources_of(batch.loss_records)
        sums.append(sum_by_source(weighted(losses, weights), sources, count=len(data.names)) * batch.weight)
    return sums


def _note_bad(batches: Sequence[MicroBatch], progress: Progress, on_bad: Callable[[RecordError], None]) -> list[int]:
    """Hand over and return the records that turn out bad for the first time, here at least; each epoch meets them."""
    met: dict[int, RecordError] = {}
    for batch in batches:
        met |= batch.bad
        # Counted on this rank, over steps: a disk that went away gives bad records alone, and a run of them says so
        # long before they are more than the share of all that `max_bad` tolerates.
        progress.bad_run = len(batch.bad) + (0 if batch.records else progress.bad_run)
    known = set(progress.bad) if met else set()  # almost every step meets none, and the list may be long
    new = [number for number in met if number not in known]
    for number in new:
        on_bad(met[number])
    return new


def _agree_on_bad(engine: Engine, progress: Progress, new: Sequence[int], counts: Sequence[float]) -> None:
    """Let every rank know the records that any of them found bad; `counts` says how many are new on each rank."""
    # Numbers travel as a sum, the one collective an engine has: each rank fills its own places of a table of zeros.
    # Known limit: float64 holds integers up to 2^53, more records than there will be.
    places = [0, *accumulate(map(int, counts))]
    table = [0.0] * places[-1]
    table[places[engine.rank] : places[engine.rank + 1]] = map(float, new)
    if table:  # the same on all ranks
        found = map(int, engine.all_sum(table))
        progress.bad = list(dict.fromkeys([*progress.bad, *found]))


def _count(
    engine: Engine,
    data: TrainData,
    batches: Sequence[MicroBatch],
    progress: Progress,
    *,
    new: Sequence[int],
    waited: float,
) -> _Step:
    """Count tokens, targets and records of the step over all ranks. Raises MmitError for too many bad records.

    `new` are the numbers of bad records that this rank met for the first time, `waited` the seconds it waited for its
    batches.
    """
    # Why one list: a sum over ranks costs a wait for the slowest of them however little it carries, so everything that
    # is known before the forward pass goes into one. Contract: every rank lists the same things in the same order.
    count = len(data.names)
    too_many = float(progress.bad_run >= MAX_BAD_RUN)
    local = [float(sum(b.targets for b in batches)), float(sum(b.tokens for b in batches))]
    local += [float(sum(len(b.records) for b in batches)), float(sum(b.unshared_tokens for b in batches))]
    local += [sum(b.loss_weight for b in batches), waited, too_many]
    bad = [0.0] * engine.world
    bad[engine.rank] = float(len(new))
    by_source = torch.zeros(count, dtype=torch.int64)
    weights = torch.zeros(count, dtype=torch.float64)
    micro = [0.0] * (engine.world * len(batches))
    for i, batch in enumerate(batches):
        micro[engine.rank * len(batches) + i] = batch.loss_weight
        if batch.targets:
            by_source += torch.bincount(data.sources_of(batch.target_records), minlength=count)
            sources = data.sources_of(batch.loss_records)
            weights += torch.bincount(sources, batch.loss_weights.double(), minlength=count)
    found = iter(engine.all_sum([*local, *bad, *by_source.tolist(), *weights.tolist(), *micro]))
    targets, tokens, records, unshared, weight, waits, lost = (next(found) for _ in local)
    _agree_on_bad(engine, progress, new, [next(found) for _ in bad])
    # Raised from sums, so on every rank: one that went on alone would wait for the others for ever.
    if lost:
        raise MmitError(
            f"{MAX_BAD_RUN} bad records came without a good one between them",
            remedy="see bad_records.jsonl in the run folder; the disk or the data set itself is likely at fault",
        )
    if len(progress.bad) > data.max_bad:
        raise MmitError(
            f"{len(progress.bad)} bad records were met while training, more than the {data.max_bad} that are tolerated",
            remedy="see bad_records.jsonl in the run folder; fix the data or raise run.max_bad_fraction",
        )
    targets_of, weight_of = [next(found) for _ in range(count)], [next(found) for _ in range(count)]
    return _Step(
        targets=targets,
        tokens=tokens,
        bad_records=len(progress.bad),
        records=records,
        unshared=unshared,
        weight=weight,
        waited=waits / engine.world,
        targets_of=targets_of,
        weight_of=weight_of,
        micro_weights=list(found),
    )


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
    # After the backward pass, where ranks have met anyway; by micro-batch too, so that each rank can name the records
    # of any other's spike or NaN: the data order is a function, and no names have to be sent.
    count = len(table[0])
    micro = [0.0] * (engine.world * len(table))
    micro[engine.rank * len(table) : (engine.rank + 1) * len(table)] = [sum(row) for row in table]
    sums = engine.all_sum([*(sum(row[k] for row in table) for k in range(count)), *micro])
    step.losses_of, step.micro_losses = sums[:count], sums[count:]


def _row(
    step: _Step, data: TrainData, schedule: Schedule, progress: Progress, *, norm: float, seconds: float
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    named = list(zip(data.names, step.losses_of, step.targets_of, step.weight_of, strict=True))
    factor = schedule.lr_factor(progress.step - 1)  # `progress.step` is counted up already
    return {
        "step": progress.step,
        "epoch": round(data.epoch_after(progress.step), 4),
        "loss": step.loss,
        "loss_of": {name: total / weight for name, total, count, weight in named if count},
        "supervised_of": {name: int(count) for name, _, count, _ in named if count},
        "weight_of": {name: weight for name, _, count, weight in named if count},
        "lr": next(iter(schedule.rates.values())) * factor,
        "lr_of": {name: peak * factor for name, peak in schedule.rates.items()},
        "grad_norm": norm,
        "tokens": int(step.tokens),
        "supervised": int(step.targets),
        "weight": step.weight,
        "records": int(step.records),
        "tokens_per_s": step.tokens / seconds,
        "supervised_per_s": step.targets / seconds,
        "fill": step.tokens / data.step_capacity,
        "shared": 1 - step.tokens / max(step.unshared, 1.0),
        "skipped_steps": progress.skipped_steps,
        "spikes": progress.spikes,
        "bad_records": step.bad_records,
        "seconds": seconds,
        "data_wait": step.waited / seconds,
        "imbalance": data.imbalance(progress.step - 1),
    }


def _check_loss(
    step: _Step, norm: float, *, progress: Progress, data: TrainData, schedule: Schedule, hooks: Hooks
) -> None:
    """Count and report a step that was skipped, or whose loss spikes. Raises MmitError after MAX_BAD_STEPS."""
    # Every rank sees the same loss and norm, so all of them skip, report and stop together.
    loss, number, micros = step.loss, progress.step + 1, data.micros
    if math.isfinite(loss) and math.isfinite(norm):
        progress.bad_in_a_row = 0
        bound = schedule.spikes.bound(progress.recent)
        if loss > bound:
            progress.spikes += 1
            means = [s / n if n else 0.0 for s, n in zip(step.micro_losses, step.micro_weights, strict=True)]
            spiking = [divmod(i, micros) for i, mean in enumerate(means) if mean > bound]
            # None may be above the bound alone: a step's loss weighs micro-batches by their weights.
            records = data.record_names(progress.step, spiking or [divmod(means.index(max(means)), micros)])
            text = f"loss spike in step {number}: {loss:.4f}, expected at most {bound:.4f}, with {records}"
            hooks.on_event(number, "spike", text, loss=loss, bound=bound, grad_norm=norm, records=records)
        schedule.spikes.remember(progress.recent, loss)
        return
    # An infinite gradient of finite losses names every micro-batch: whose it was, the norm does not say.
    nonfinite = [not math.isfinite(s) for s in step.micro_losses]
    places = [divmod(i, micros) for i, bad in enumerate(nonfinite) if bad or not any(nonfinite)]
    records = data.record_names(progress.step, places)
    progress.skipped_steps += 1
    progress.bad_in_a_row += 1
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    text = f"step {number} skipped, nothing was changed: {what} with {records}"
    hooks.on_event(number, "skipped", text, loss=loss, grad_norm=norm, records=records)
    if progress.bad_in_a_row >= MAX_BAD_STEPS:
        raise MmitError(
            f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row "
            f"(step {number}, loss {loss}, gradient norm {norm}, {records})",
            remedy="lower the learning rates, lengthen train.warmup, or look at these records with mmit inspect",
        )
