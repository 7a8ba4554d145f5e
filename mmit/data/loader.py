"""Micro-batches: rows built and pictures decoded ahead of time, in worker processes.

Owns the hand-over from numbers (which units share a row) to tensors. Order comes in, batches come out in the same
order whatever the number of workers. A record that turns out bad here follows the same policy as in the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmit.data.packing import Row, Sample, build_row
from mmit.data.preference import IDLE, Compared, Compares, compared, mates, mismatch
from mmit.data.prefetch import Ahead, prefetched
from mmit.data.preparation import Spread, grids_of, splice_index
from mmit.errors import RecordError
from mmit.records import Image

if TYPE_CHECKING:
    from mmit.data.dataset import Choosing, InstructionData
    from mmit.data.measure import Measurements

LoadImage = Callable[[Image, str], torch.Tensor]  # picture, place -> its crops (C, 3, H, W) uint8
# (K, 3) nodes of a row -> how a model runs them, or None where they need no plan; it may have `nbytes`
PlanRow = Callable[[torch.Tensor], Any]


@dataclass
class MicroBatch:
    """One row ready for the model, and what it is made of."""

    tensors: dict[str, Any]  # keyword arguments of VLM.forward
    image_keys: list[Hashable]  # of the distinct pictures, in the order of `pixels`
    records: list[int]
    target_records: torch.Tensor  # (S,), of losses over choices one for each record
    target_weights: torch.Tensor  # (S,) float32, of these losses
    weight: float  # 0 for a row that only keeps ranks in step
    unshared_tokens: int = 0
    bad: dict[int, RecordError] = field(default_factory=dict)  # numbers of records that were left out
    compared: Compared | None = None  # under a preference method: what its losses are compared by

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.tensors["input_ids"]) if self.weight else 0

    @property
    def targets(self) -> int:
        """Supervised tokens."""
        return len(self.tensors["targets"]) if self.weight else 0

    @property
    def loss_records(self) -> torch.Tensor:
        """(S,) record of each loss; under a preference method (B,)."""
        return self.target_records if self.compared is None else torch.tensor(self.compared.records)

    @property
    def loss_weights(self) -> torch.Tensor:
        """(S,) float32, weight of each loss; under a preference method (B,)."""
        return self.target_weights if self.compared is None else torch.tensor(self.compared.weights)

    @property
    def loss_weight(self) -> float:
        """Sum of the weights of its losses."""
        return float(self.loss_weights.double().sum()) if self.weight else 0.0

    @property
    def uneven_weights(self) -> torch.Tensor | None:
        """The weights of its losses, None where all are 1."""
        weights = self.loss_weights
        return None if bool((weights == 1).all()) else weights

    @property
    def bytes(self) -> int:
        """Of its tensors, its plan, and the row that it is compared with."""
        other = self.compared.mismatched if self.compared is not None else None
        own = sum(getattr(value, "nbytes", 0) for value in self.tensors.values())
        return own + (other.bytes if other is not None else 0)

    def __getstate__(self) -> dict[str, Any]:
        # Between processes as plain bytes: torch would take shared memory, of which containers have 64 MB, and an open
        # file for every tensor.
        tensors = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in self.tensors.items()}
        plain = {key: getattr(self, key).numpy() for key in ("target_records", "target_weights")}
        return {**self.__dict__, "tensors": tensors, **plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in self.tensors.items()}
        self.target_records = torch.from_numpy(state["target_records"])
        self.target_weights = torch.from_numpy(state["target_weights"])


def to_micro_batch(row: Row, *, spreads: Mapping[Hashable, Spread], tokens: int) -> MicroBatch:
    """Wrap a row; equal pictures are encoded once.

    Args:
        spreads: of the row's pictures. tokens: M, image tokens per crop.
    """
    tensors = {
        "input_ids": row.input_ids,
        "positions": row.positions,
        "nodes": row.nodes,
        "predict_at": row.predict_at,
        "targets": row.targets,
        "image_positions": row.image_positions,
        "image_index": splice_index(row.images, spreads, tokens),
        "image_tokens": tokens,
    }
    # Distinct pictures in the order of first appearance: `splice_index` counts crops in the same order.
    keys = list(dict.fromkeys(row.images))
    return MicroBatch(tensors, keys, row.records, row.target_records, row.weights, 1.0, row.unshared_tokens)


def _choose(batch: MicroBatch, samples: Sequence[Sample], groups: Sequence[int], choosing: Choosing) -> None:
    """Have the model join the losses of choices: one loss for each of the units that `groups` counts the samples of.

    A record that is there twice is two units, and has two losses.
    """
    # As `build_row` counts targets: the first token has none.
    counts = torch.tensor([sum(weight > 0 for weight in sample.weights[1:]) for sample in samples])
    most = max(sum(s.share is not None for s in part) for part in _parts(samples, groups))
    choices, questions = torch.full((len(groups), most), -1), torch.full((len(groups),), -1)
    shares = torch.zeros(len(groups), most)
    records, weights, first = [], [], 0
    for group, part in enumerate(_parts(samples, groups)):
        chosen = [sample for sample in part if sample.share is not None]
        choices[group, : len(chosen)] = torch.arange(first, first + len(chosen))
        shares[group, : len(chosen)] = torch.tensor([sample.share for sample in chosen])
        if len(chosen) < len(part):
            questions[group] = first + len(chosen)
        records.append(part[0].record)
        weights.append(max(part[0].weights))
        first += len(part)
    batch.tensors["samples"] = torch.repeat_interleave(torch.arange(len(samples)), counts)
    batch.tensors |= {"choices": choices, "shares": shares, "questions": questions}
    batch.tensors |= {"lm": choosing.lm, "temperature": choosing.temperature}
    batch.target_records, batch.target_weights = torch.tensor(records), torch.tensor(weights, dtype=torch.float32)


def _parts(samples: Sequence[Sample], groups: Sequence[int]) -> list[Sequence[Sample]]:
    ends = [*accumulate(groups)]
    return [samples[end - count : end] for end, count in zip(ends, groups, strict=True)]


def idle_batch(compares: Compares = "") -> MicroBatch:
    """A row of one token and no weight, for a rank that has none left in the last step."""
    zero = torch.zeros(1, dtype=torch.int64)
    # One token with a target, so that the forward and backward run as they do elsewhere; its weight of 0 keeps it out
    # of the loss.
    row = Row(zero, zero, zero[:0], torch.tensor([[0, 1, -1]]), zero, zero, torch.ones(1), zero)
    batch = to_micro_batch(row, spreads={}, tokens=0)
    batch.weight = 0.0
    if compares:
        batch.compared = replace(IDLE, mismatched=idle_batch("pairs") if compares == "labels" else None)
    return batch


@dataclass(frozen=True)
class _Maker:
    """Units of a micro-batch -> the micro-batch; no unit gives an idle one."""

    data: InstructionData
    scan: Measurements
    load_image: LoadImage | None
    skip_bad: bool
    plan_row: PlanRow | None = None
    mates: np.ndarray | None = None  # under KTO, whose answer goes with the prompt of each unit

    def __call__(self, units: Sequence[int]) -> MicroBatch:
        samples: list[list[Sample]] = []
        others: list[Sample] = []
        taken: list[int] = []
        pixels: dict[Hashable, torch.Tensor] = {}
        spreads: dict[Hashable, Spread] = {}
        bad: dict[int, RecordError] = {}
        for unit in units:
            try:
                new, images, where = self.data.unit_samples(self.scan, unit)
                if self.load_image is not None:
                    for key, shown in images.items():
                        if key not in pixels:
                            pixels[key] = self.load_image(shown.image, where)
                other = self._mismatched(unit, new)
                spreads |= {key: shown.spread for key, shown in images.items()}
            except RecordError as error:
                # Measuring has looked at headers only. A picture that is damaged behind its header shows here for the
                # first time.
                if not self.skip_bad:
                    raise
                bad[int(self.scan.record[unit])] = error
                continue
            samples.append(new)
            others += other
            taken.append(int(unit))
        if not samples:
            # A rank must have as many micro-batches as the others, even if all of its records turned out bad.
            batch = idle_batch(self.data.compares)
        else:
            batch = self._batch([sample for new in samples for sample in new], spreads, pixels)
            if self.data.choosing is not None:
                groups = [len(new) for new in samples]
                _choose(batch, [sample for new in samples for sample in new], groups, self.data.choosing)
            if self.data.compares:
                batch.compared = compared(samples, taken, self._verdicts(samples))
                batch.records = batch.compared.records  # not one for each answer
            if batch.compared is not None and others:
                batch.compared.mismatched = self._batch(others, spreads, pixels)
                lengths = compared([[other] for other in others], taken, batch.compared.good)
                batch.compared.mismatched.compared = lengths
        batch.bad = bad
        return batch

    def _batch(
        self, samples: Sequence[Sample], spreads: Mapping[Hashable, Spread], pixels: Mapping[Hashable, torch.Tensor]
    ) -> MicroBatch:
        row = build_row(samples, share=self.data.share_prefix)
        tokens = 0 if self.data.preparation is None else self.data.preparation.tokens
        batch = to_micro_batch(row, spreads=spreads, tokens=tokens)
        if pixels:
            batch.tensors["pixels"] = torch.cat([pixels[k] for k in batch.image_keys])
            grids = grids_of(spreads[k] for k in batch.image_keys)
            if grids is not None:
                batch.tensors["grids"] = grids
        if self.plan_row is not None and (plan := self.plan_row(row.nodes)) is not None:
            batch.tensors["plan"] = plan
        return batch

    def _verdicts(self, samples: Sequence[Sequence[Sample]]) -> list[bool]:
        labelled = self.data.compares == "labels"
        return [not labelled or self.data.record(answers[0].record).label is True for answers in samples]

    def _mismatched(self, unit: int, samples: Sequence[Sample]) -> list[Sample]:
        """The prompt of a unit with the answer of another, under KTO."""
        if self.mates is None:
            return []
        (other,), _, _ = self.data.unit_samples(self.scan, int(self.mates[unit]))
        return [mismatch(samples[0], other, max_length=self.data.max_length)]

    def most_bytes(self, units: Sequence[int]) -> int:
        """About the most that a micro-batch of these units takes, by its tokens alone: each crop takes tokens too."""
        tokens = int(self.scan.length[list(units)].sum()) if len(units) else 1
        size = self._row_bytes(tokens)
        if self.mates is not None and len(units):
            # One more row: the prompts of the units, with answers that are no longer than their records.
            size += self._row_bytes(tokens + int(self.scan.length[self.mates[list(units)]].sum()))
        return size

    def _row_bytes(self, tokens: int) -> int:
        # Eight numbers of 8 bytes a token are more than the index tensors of a row take, and as many more than its plan
        # takes, whose nodes are padded to at most twice their keys; pictures are counted on top.
        size = (8 + (8 if self.plan_row is not None else 0)) * 8 * tokens
        shown = self.data.preparation
        if shown is not None and self.load_image is not None:
            size += -(-tokens // max(shown.tokens, 1)) * 3 * shown.size[0] * shown.size[1]
        return size


def micro_batches(
    data: InstructionData,
    scan: Measurements,
    units: Iterable[Sequence[int]],
    *,
    load_image: LoadImage | None,
    skip_bad: bool = False,
    plan_row: PlanRow | None = None,
    ahead: Ahead = Ahead(),  # noqa: B008 - a tuple
) -> Generator[MicroBatch]:
    """Yield the micro-batch of each entry of `units`, in order, prepared ahead by processes of its own.

    Closing the generator ends the workers; a caller that stops early must, or its process cannot end.

    Args:
        units: for each micro-batch the units it holds; an empty list gives an idle batch.
        load_image: picture, place -> (C, 3, H, W) uint8; None where features are cached.
        skip_bad: leave bad records out and hand them over in `MicroBatch.bad`; else raise the first.
        plan_row: plans a row's attention where the row is made, for the model that will run it.
        ahead: how many processes prepare, and how many bytes of micro-batches may wait.

    Raises:
        RecordError: a bad record, unless `skip_bad`. MmitError: a process that prepares was killed.
    """
    paired = mates(len(scan.length)) if data.compares == "labels" else None
    make = _Maker(data, scan, load_image, skip_bad, plan_row, paired)
    if ahead.workers == 0:
        return (make(entry) for entry in units)
    return prefetched(make, units, **ahead._asdict(), expected=make.most_bytes, size=lambda batch: batch.bytes)
