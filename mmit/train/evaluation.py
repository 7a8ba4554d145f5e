"""Evaluation while training: the loss on records that are held out, and whatever a callable of the user measures.

Owns when an evaluation may be broken off, what it must leave untouched (random state, modes, gradients), and the
choice of the best checkpoint (`train.keep_best`). The held-out loss is that of training: the weighted mean over the
supervised tokens of all ranks, with the same weights (`data.loss`). Knows no benchmark.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmit.errors import ConfigError, RecordError
from mmit.models.modes import evaluation_mode
from mmit.train.engines.base import Engine, weighted
from mmit.train.loop import Progress, sum_by_source
from mmit.train.signals import StopNow

if TYPE_CHECKING:
    from mmit.data.loader import MicroBatch
    from mmit.train.data.batches import TrainData
    from mmit.train.monitor.metrics_log import RunLog
    from mmit.train.objective import Preference

LOSS = "eval_loss"
Metrics = Mapping[str, float]
Measure = Callable[[int], Metrics]  # step -> numbers


@dataclass(frozen=True)
class Best:
    """Which checkpoint is the best: that with the lowest or highest value of a metric."""

    metric: str
    higher: bool

    def better(self, value: float, best: Mapping[str, Any] | None) -> bool:
        """Whether `value` beats the best so far; the earlier of two equals stays."""
        if not math.isfinite(value):  # no comparison with NaN is true, so one kept as the best would stay it for ever
            return False
        return best is None or (value > best["value"] if self.higher else value < best["value"])


class HeldOut:
    """Mean loss on held-out rows, exact over ranks.

    Args:
        data: its rows; every rank gets equally many micro-batches.
        on_bad: receives each record that has to be left out, once.
        should_stop: asked before each micro-batch; on several ranks they leave together.
        preference: of a run that compares answers; the loss is then its own, and metrics of the answers go with it.
    """

    def __init__(
        self,
        engine: Engine,
        data: TrainData,
        *,
        on_bad: Callable[[RecordError], None],
        should_stop: Callable[[], bool],
        preference: Preference | None = None,
    ) -> None:
        self.engine, self.data, self.on_bad, self.should_stop = engine, data, on_bad, should_stop
        self.preference = preference
        self._noted: set[int] = set()

    def __call__(self, step: int) -> dict[str, float]:
        """{"eval_loss": weighted mean over targets, and "eval_loss/NAME" of each source where there are several}."""
        if self.preference is not None:
            with closing(self.data.batches()) as batches:
                found = self.preference.evaluate(self.engine, self.data, self._watched(batches))
            return {f"eval_{name}": value for name, value in found.items()}
        names = self.data.names
        count = len(names)
        # Sums and weights, divided once at the end: a mean of means would weigh short rows more than long ones.
        sums = torch.zeros(count, dtype=torch.float64, device=self.engine.device)
        weights = torch.zeros(count, dtype=torch.float64)
        with closing(self.data.batches()) as batches:
            for batch in self._watched(batches):
                losses = self.engine.losses(self.data.prepare(batch))
                if batch.weight:
                    sources = self.data.sources_of(batch.target_records)
                    weights += torch.bincount(sources, batch.target_weights.double(), minlength=count)
                    sums += sum_by_source(weighted(losses, batch.uneven_weights), sources, count=count)
        both = self.engine.all_sum([*sums.tolist(), *weights.tolist()])
        total, whole = both[:count], both[count:]
        results = {LOSS: sum(total) / (sum(whole) or 1.0)}
        if count > 1:
            results |= {f"{LOSS}/{k}": s / n for k, s, n in zip(names, total, whole, strict=True) if n}
        return results

    def _watched(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Notes bad records on the way; raises StopNow where a rank has to stop."""
        for batch in batches:
            # Asked of all ranks before each micro-batch: one that left alone would be waited for in the next sum.
            if self.engine.all_sum([float(self.should_stop())])[0]:
                raise StopNow
            for record, error in batch.bad.items():
                if record not in self._noted:
                    self._noted.add(record)
                    self.on_bad(error)
            yield batch


class Evaluations:
    """Runs the evaluations of a step and judges whether the model is the best so far.

    Args:
        model: whose modes and random state an evaluation must not change.
        measures: each gives numbers on every rank; those of rank 0 are kept. The first may be `HeldOut`.
        interruptible: a context in which a signal breaks off at once; used around the user's own code on one rank.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        measures: list[Measure],
        *,
        best: Best | None,
        log: RunLog,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
        phase: Callable[[str, int], None] = lambda name, step: None,
    ) -> None:
        self.engine, self.model, self.measures = engine, model, measures
        self.best, self.log, self.interruptible, self.phase = best, log, interruptible, phase

    def __call__(self, progress: Progress) -> bool:
        """Evaluate after `progress.step`; True when this is the best model so far.

        A signal leaves the evaluation unfinished; the resumed run then begins with it.

        Raises:
            ConfigError: the metric of train.keep_best is not among the results.
        """
        began = time.perf_counter()
        self.phase("evaluation", progress.step)
        results: dict[str, float] = {}
        try:
            with untouched(self.model, self.engine.device):
                for measure in self.measures:
                    # Code of the user's own cannot ask `should_stop`: on one rank a signal breaks it off wherever it
                    # is, on several the others would wait for the one that left.
                    alone = self.engine.world == 1 and not isinstance(measure, HeldOut)
                    with self.interruptible() if alone else nullcontext():
                        results |= {str(k): float(v) for k, v in measure(progress.step).items()}
        except StopNow:
            self.log.say(f"the evaluation at step {progress.step} is broken off and comes again on resume")
            return False
        progress.evaluated = progress.step  # only now: one that was broken off is due again after the resume
        self.log.evaluation(progress.step, results, seconds=time.perf_counter() - began)
        return self.best is not None and self._is_best(self.best, results, progress)

    def _is_best(self, best: Best, results: Metrics, progress: Progress) -> bool:
        main = self.engine.rank == 0
        if not self.engine.all_true(not main or best.metric in results):
            given = ", ".join(sorted(results)) or "none"
            raise ConfigError(
                f"no evaluation gives '{best.metric}'; there is {given}",
                where="train.keep_best.metric",
                remedy="name one of these",
            )
        # Ranks may measure differently; all must come to one verdict, since all take part in a save.
        value = results[best.metric] if main else 0.0
        finite = math.isfinite(value)
        verdict = [float(main and best.better(value, progress.best)), value if finite else 0.0]
        chosen, value = self.engine.all_sum(verdict)
        if chosen:
            progress.best = {"metric": best.metric, "value": value, "step": progress.step}
        return bool(chosen)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards modes and random states are as before."""
    # An evaluation may freeze the model (a `generate.Model` does), draw random numbers and switch dropout off: training
    # must go on with the bits that it would have had without.
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluation_mode(model):
        try:
            yield
        finally:
            for parameter, wanted in frozen:
                parameter.requires_grad_(wanted)
