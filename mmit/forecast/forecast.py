"""The dry run: what a run would take, from its config and its data, without weights.

In: a config. Out: a `Forecast` with steps, tokens, pictures, FLOPs by part, and memory per rank for each ZeRO stage.
The model is assembled empty; of large sources that no run has measured, an even sample of records stands for all.
Refuses what a run would refuse, in the same words.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.data.store import Store, borrowed
from mmit.forecast.rates import Rates, RowFacts, count_pairs, measure_rates
from mmit.models.rules import read_rules
from mmit.models.tuning import check_options, parameter_table
from mmit.train.data.order import row_order_of
from mmit.train.data.setup import cache_folder
from mmit.train.memory.estimate import crops_of, empty_model, sample_data, sample_micro_batches, stages, step_memory
from mmit.train.resolve import objective_of, planned, resolved

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.loader import MicroBatch
    from mmit.train.memory.step_bytes import Bytes


@dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    records: int
    measured: int  # of these records
    pictures: float  # distinct ones in the data
    tokens: float  # in an epoch's rows, shared beginnings once
    supervised: float
    steps: int
    epochs: float
    fill: float  # of the rows' capacity
    rows_per_step: int
    micro_batches: int  # per step and rank
    row: RowFacts  # mean micro-batch
    flops: dict[str, dict[str, float]]  # of a step over all ranks, by part
    once: float  # FLOPs of filling the feature cache
    reference: float  # FLOPs of measuring a preference method's reference on training's records
    parameters: list[dict[str, Any]]
    memory: Bytes
    ranks: int
    stages: dict[str, int]  # bytes per rank
    notes: tuple[str, ...] = ()  # what the model decides about the run

    @property
    def step_flops(self) -> float:
        """All of a step's FLOPs, recomputation too."""
        return sum(sum(kinds.values()) for kinds in self.flops.values())


def forecast(config: Config, *, ranks: int = 1, flash: bool = False, recompute: str | None = None) -> Forecast:
    """Forecast a run on `ranks` devices.

    Args:
        flash: the devices have fused attention (CUDA); False for CPUs.
        recompute: train.checkpointing where it is not the config's own.

    Raises:
        MmitError: whatever the run would be refused for; a configuration or tokenizer that cannot be reached.
    """
    check_options(config.tune.model_dump())
    method = objective_of(config)
    config = planned(config, cuda=flash)
    notes: list[str] = []
    vlm, groups, tokenizer = empty_model(config, say=notes.append)
    config = resolved(config, vlm, tokenizer, measure=False, say=notes.append)
    if read_rules(vlm.llm).experts:
        notes.append(
            "the memory of experts is forecast from above: as if each token had a copy of its experts' weights"
        )
    with borrowed(cache_folder(config.data.cache_dir, run_dir=Path(config.run.dir))) as cache:
        data, scan, share = sample_data(config, vlm, tokenizer, cache=cache, say=notes.append)
        row_order = row_order_of(config, scan, store=Store(cache))[0]
        built = list(sample_micro_batches(config, data, scan, row_order, ranks=ranks))
    mode = recompute or config.train.checkpointing
    mode = "none" if mode == "auto" else mode
    cached = config.model.vision is not None and config.model.vision.cache != "off"
    facts = [_facts(batch) for batch in built]
    mean = RowFacts(*np.mean([dataclasses.astuple(f) for f in facts], axis=0).tolist())
    table = parameter_table(vlm)
    rates = measure_rates(vlm)
    micros = -(-config.train.rows_per_step // (ranks * config.train.micro_rows))
    per_micro = _micro_flops(rates, mean, recompute=mode, cached=cached, twice=method.kind == "kto")
    step = min(config.train.rows_per_step, row_order.total_rows) / config.train.micro_rows
    pictures = scan.pictures * share
    rows = row_order.total_rows / max(row_order.epoch_at(row_order.total_rows), 1e-9)  # in an epoch
    forward = sum(kinds["forward"] for kinds in per_micro.values()) / config.train.micro_rows  # of a row
    memory = step_memory(config, vlm, groups, built, micros=micros, flash=flash, recompute=mode)
    return Forecast(
        records=len(data),
        measured=scan.records,
        pictures=pictures,
        tokens=rows * mean.tokens / config.train.micro_rows,
        supervised=scan.supervised * share,
        steps=row_order.steps,
        epochs=row_order.epoch_at(row_order.total_rows),
        fill=mean.tokens / (config.train.micro_rows * config.data.pack_tokens),
        rows_per_step=config.train.rows_per_step,
        micro_batches=micros,
        row=mean,
        flops={part: {k: step * v for k, v in kinds.items()} for part, kinds in per_micro.items()},
        once=scan.crops * share * rates.tower.forward if cached else 0.0,
        reference=rows * forward if method.referenced else 0.0,
        parameters=table,
        memory=memory,
        ranks=ranks,
        stages=stages(memory, ranks=ranks, precision=config.train.precision),
        notes=tuple(notes),
    )


def _micro_flops(
    rates: Rates, mean: RowFacts, *, recompute: str, cached: bool, twice: bool
) -> dict[str, dict[str, float]]:
    """FLOPs of the mean micro-batch, by part; `twice`: KTO reads mismatched answers as well, without gradients."""
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[recompute]
    found = rates.flops(mean, recompute=again, cached=cached)
    if not twice:
        return found
    return {part: {**kinds, "forward": 2 * kinds["forward"]} for part, kinds in found.items()}


def _facts(batch: MicroBatch) -> RowFacts:
    return RowFacts(batch.tokens, batch.targets, crops_of(batch), count_pairs(batch.tensors["nodes"]))
