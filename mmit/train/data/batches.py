"""The data of a run as the loop sees them: this rank's micro-batches in order, and what a step's data are.

In: what `setup.py` opened and `order.py` ordered. Out: micro-batches, their tensors on the device, and words for the
records in them. Keeps no state: every answer follows from the step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mmit.data.loader import LoadImage, MicroBatch, PlanRow, micro_batches
from mmit.data.prefetch import Ahead
from mmit.train.data.setup import source_names

if TYPE_CHECKING:
    from mmit.data.dataset import InstructionData
    from mmit.data.measure import Measurements
    from mmit.data.row_order import RowOrder
    from mmit.train.features import FeatureCache

STAY = ("nodes", "records")  # on the CPU, where they are read


@dataclass(frozen=True, eq=False)
class TrainData:
    """One rank's view of the records of a run; a step takes `micros` micro-batches of every rank."""

    data: InstructionData
    scan: Measurements
    row_order: RowOrder
    rank: int
    world: int
    device: torch.device
    micro_rows: int  # rows a micro-batch
    row_tokens: int  # that a row has room for
    load_image: LoadImage | None
    features: FeatureCache | None = None  # of a frozen vision encoder: images are then not loaded
    plan_row: PlanRow | None = None  # plans the attention of a row, see `models.planning`
    skip_bad: bool = False  # leave bad records out, else raise
    max_bad: int = 0  # of them are tolerated while running, however often each is met
    workers: int = 0  # processes that load
    prefetch: int = 0  # bytes of micro-batches that may wait

    @cached_property
    def names(self) -> list[str]:
        """Of the sources, for metrics."""
        return source_names(self.data)

    @cached_property
    def micros(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.row_order.micros(world=self.world, micro_rows=self.micro_rows)

    @property
    def step_capacity(self) -> int:
        """Tokens that the rows of a step have room for, over all ranks."""
        return self.row_order.rows_per_step * self.row_tokens

    @cached_property
    def _upload(self) -> Upload:
        return Upload(self.device)

    def batches(self, start: int = 0) -> Generator[MicroBatch]:
        """This rank's micro-batches from step `start` on, in order; close the generator to end its processes."""
        # Why units and not records: a long record is cut into units, and the row order is one of these.
        # Contract: rank r of W reads rows r, r + W, ... of a step, all counted from (seed, epoch, step), so resuming
        # costs the same anywhere in an epoch and another number of ranks sees the same steps.
        return micro_batches(
            self.data,
            self.scan,
            self._units(start),
            load_image=None if self.features else self.load_image,
            skip_bad=self.skip_bad,
            plan_row=self.plan_row,
            ahead=Ahead(self.workers, self.prefetch),
        )

    def _units(self, start: int) -> Iterator[list[int]]:
        for step in range(start, self.row_order.steps):
            for positions in self._positions(step, self.rank):
                rows = [self.row_order.row(p) for p in positions]
                yield [u for row in rows if row for u in row]

    def _positions(self, step: int, rank: int) -> list[list[int]]:
        return self.row_order.micro_positions(step, rank=rank, world=self.world, micro_rows=self.micro_rows)

    def prepare(self, batch: MicroBatch) -> dict[str, Any]:
        """The arguments of the model's forward pass, on the device; cached features in place of pixels."""
        tensors = {**batch.tensors, "records": batch.target_records}
        if self.features is not None and batch.image_keys:
            tensors["features"] = self.features.get(batch.image_keys)
        return self._upload(tensors)

    def sources_of(self, records: torch.Tensor) -> torch.Tensor:
        """Which source each record number is of: (S,) -> (S,), on the CPU."""
        starts = self.data.starts  # the number of the first record of each
        return torch.bucketize(records, torch.tensor(starts[1:], dtype=torch.int64), right=True)

    def record_names(self, step: int, places: Sequence[tuple[int, int]], *, most: int = 5) -> str:
        """Say which records are in micro-batches of a step, given as (rank, micro-batch); any rank can tell for all."""
        positions = [self._positions(step, rank)[i] for rank, i in places]
        units = [u for place in positions for p in place for u in self.row_order.row(p) or ()]
        numbers = list(dict.fromkeys(int(self.scan.record[u]) for u in units))
        names = ", ".join(self.data.record(n).where for n in numbers[:most])
        return f"{names} and {len(numbers) - most} more" if len(numbers) > most else names or "no record"

    def epoch_after(self, step: int) -> float:
        """Epochs that the first `step` steps make."""
        return self.row_order.epoch_at(step * self.row_order.rows_per_step)

    def imbalance(self, step: int) -> float:
        """How much more the busiest rank computes in a step than the mean, see `RowOrder.imbalance`."""
        return self.row_order.imbalance(step, world=self.world, micro_rows=self.micro_rows)

    def order_after(self, step: int) -> dict[str, Any]:
        """The place in the order after `step` steps, which a checkpoint keeps."""
        return self.row_order.state(step * self.row_order.rows_per_step)


class Upload:
    """Moves the arguments of a forward pass to one device, overlapped with what it computes.

    On CUDA the tensors go through page-locked memory on a stream of their own, so neither the host nor the kernels
    already queued wait for a copy: while the device works on one micro-batch, the host sends the next. This is the
    pattern that PyTorch documents (CUDA semantics: pinned memory buffers, side streams with `wait_stream` and
    `record_stream`). Elsewhere tensors are just moved. Values never change. Known limit: nobody has run it on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors on the device, whatever else as it is; kernels queued from now on may read them."""
        moving = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor) and k not in STAY}
        if self._stream is None:
            return {**tensors, **{k: v.to(self.device) for k, v in moving.items()}}
        reader = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            # Page-locked memory is reused only after the copy out of it: its allocator waits for the stream.
            moved = {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in moving.items()}
        reader.wait_stream(self._stream)
        for tensor in moved.values():
            tensor.record_stream(reader)  # its memory is the side stream's, which must not reuse it too early
        return {**tensors, **moved}
