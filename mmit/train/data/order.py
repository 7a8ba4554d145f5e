"""The order of a run's rows, and what a unit of data costs, by which they are dealt to ranks.

Takes what was measured of the data and plain numbers; gives the `RowOrder`. Refuses to go on in another order than
that of the checkpoint.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from mmit.data.mixture import WINDOW, mixing_weights, mixture_order, units_in_epoch
from mmit.data.packing import plan_rows
from mmit.data.prefetch import allowed_cores, in_order
from mmit.data.row_order import Duration, RowOrder, Sharing
from mmit.data.store import Store, code_version, key_of
from mmit.errors import CheckpointError

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.measure import Measurements
    from mmit.models.vlm import VLM


def _weights(module: nn.Module) -> int:
    """Entries of all matrices; ZeRO-3 and 4 bits keep the shape elsewhere, so layers are asked first."""
    sizes = [int(m.in_features) * int(m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(sizes) or sum(p.numel() for p in module.parameters())


def unit_costs(vlm: VLM, scan: Measurements, *, cached: bool) -> np.ndarray:
    """(U,) float64, the cost of each unit in the time of one token.

    Three terms: its tokens through the LLM's weights, the square of its length through attention, its pictures through
    the tower. Forward and backward pass of a frozen LLM are 4 FLOPs a weight and token; only the relation matters.

    Args:
        cached: the tower's features come from a cache.
    """
    # An estimate is enough: ranks are dealt rows by it, and a wrong one costs waiting, never a wrong gradient.
    config: Any = vlm.llm.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)  # a model without attention has no squares
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    llm = max(_weights(vlm.llm), 1)
    lengths = scan.length.astype(np.float64)
    # 4 * width FLOPs a pair and layer forward, causal pairs are half the square, backward is twice that; over 4 * llm.
    square = 6 * config.num_hidden_layers * width / (4 * llm)
    cost = lengths + square * lengths**2
    if vlm.vision is not None and not cached:
        patches = math.prod(vlm.vision.grid)
        trained = 3 if vlm.vision.trainable else 1
        cost += scan.seen * (2 * trained * _weights(vlm.vision) * patches / (4 * llm))
    return cost


@dataclass(frozen=True)
class Ordering:
    """What a config says about the order of its data.

    Args:
        weights: of the sources.
        mixing: `mixing_weights`' scheme, cap and temperature; scheme "weights" for none.
        capacity: tokens a row, or None for one unit a row.
        epochs, steps: how long; one of them is None.
        shuffle, window: of `mixture_order`.
        group: without `capacity`, let units of a step share a micro-batch that have pictures or not and are equally
            long, as LLaVA's group_by_modality_length; a step holds the same units as without.
    """

    weights: Sequence[float]
    mixing: Mapping[str, Any]
    seed: int
    capacity: int | None
    rows_per_step: int
    epochs: float | None
    steps: int | None
    shuffle: str = "auto"
    window: int = WINDOW
    group: bool = True

    def mixed(self, sizes: Sequence[int]) -> list[float]:
        """Weights of sources of these sizes, with what the mixing makes of them."""
        if self.mixing["scheme"] == "weights":
            return list(self.weights)
        return [w * m for w, m in zip(self.weights, mixing_weights(sizes, **self.mixing), strict=True)]

    def facts(self, scan: Measurements, weights: Sequence[float]) -> dict[str, Any]:
        """Everything that decides the order, small enough for a checkpoint."""
        # Not the number of ranks, nor how long the run is: a run may go on with others. What the records say is not
        # in it either: `checks.identity` compares that, and can name the source that changed.
        return {
            "seed": self.seed,
            "units": len(scan.length),
            "lengths": zlib.crc32(np.ascontiguousarray(scan.length).view(np.uint8).data),
            "weights": list(weights),
            "capacity": self.capacity,
            "rows_per_step": self.rows_per_step,
            "shuffle": self.shuffle if self.shuffle == "global" else f"{self.shuffle}, {self.window}",
        }


def make_row_order(
    scan: Measurements,
    asked: Ordering,
    *,
    known: Mapping[str, Any] | None = None,
    costs: np.ndarray | None = None,
    store: Store | None = None,
) -> tuple[RowOrder, dict[str, Any]]:
    """The rows of the run in order, and the facts that decide this order.

    Args:
        known: facts and `RowOrder.state` of the checkpoint that the run goes on from.
        costs: (U,) of the units; ranks get equal work by them.
        store: keeps how many rows the segments of the order take, which all have to be planned to know.

    Raises:
        CheckpointError: the facts differ from the known ones.
    """
    sizes = np.bincount(scan.source, minlength=len(asked.weights)).tolist()
    weights = asked.mixed(sizes)
    facts = asked.facts(scan, weights)
    if known is not None:
        _refuse_another_order(facts, known)

    # One epoch is at work at a time, and its order is a table of all units: more than one would only take memory.
    @lru_cache(maxsize=1)
    def order_of(epoch: int) -> Any:
        return mixture_order(sizes, weights, seed=asked.seed, epoch=epoch, shuffle=asked.shuffle, window=asked.window)

    def rows_of(epoch: int, begin: int, end: int) -> list[list[int]]:
        order = order_of(epoch)[begin:end]
        if asked.capacity is None:
            return [[u] for u in order.tolist()]
        return plan_rows(scan.length, capacity=asked.capacity, order=order, shared=scan.shared)

    def alike(row: list[int]) -> tuple[int, ...]:
        return int(scan.seen[row].any()), int(scan.length[row].sum())

    units = units_in_epoch(sizes, weights)
    counts: Sequence[int] = ()
    # Only a run that counts epochs has to know beforehand how many rows they take; one that goes on knows already.
    if known is None and asked.epochs is not None and asked.capacity is not None:
        counts = _row_counts(rows_of, RowOrder.whole_segments(units, asked.epochs), [facts, sizes, scan.shared], store)
    cost_of = None if costs is None else lambda row: float(costs[row].sum())
    row_order = RowOrder(
        rows_of,
        Duration(asked.rows_per_step, asked.epochs, asked.steps),
        units=units,
        known=known,
        counts=counts,
        sharing=Sharing(cost_of, alike if asked.group and asked.capacity is None else None),
    )
    return row_order, facts


def _refuse_another_order(facts: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    # Going on in another order would repeat some records and never see others, and nothing would show it.
    for key, now in facts.items():
        if known[key] != now:
            raise CheckpointError(
                f"the checkpoint was made with other data, another seed or other rows ({key} differs: {known[key]} "
                f"then, {now} now), so the data order cannot be continued",
                where="run.resume",
                remedy="resume with the config and data it was made with, or start from its weights with run.init_from",
            )


def _row_counts(
    rows_of: Callable[[int, int, int], list[list[int]]],
    segments: Sequence[tuple[int, int, int]],
    order: Any,
    store: Store | None,
) -> list[int]:
    """Rows in each segment of an order, which `order` decides; planned on all cores, or read from the store."""
    # The code's version is part of the key: another way to pack rows would have other counts.
    key = key_of(order, len(segments), code_version())
    # Planning reads every unit of the run, the one thing at its start that grows with epochs as well as with records.
    found = store.find("planned", key) if store is not None else None
    if found is not None:
        return found[1]["rows"].tolist()
    workers = allowed_cores() if len(segments) > 2 else 0
    counts = list(in_order(lambda segment: len(rows_of(*segment)), segments, workers=workers))
    if store is not None and segments:
        store.keep("planned", key, {}, {"rows": np.array(counts, dtype=np.int64)})
    return counts


def row_order_of(
    config: Config,
    scan: Measurements,
    *,
    known: dict[str, Any] | None = None,
    costs: Any = None,
    store: Store | None = None,
) -> tuple[RowOrder, dict[str, Any]]:
    """The rows of a run, forecast or real, and what decides their order; the rest: see `make_row_order`.

    Args:
        config: of the run. scan: what was measured of its records.
        known: what a checkpoint says of the order that its run began in.
        costs: of records, to spread them over ranks; None spreads rows by number. store: where rows are looked up.
    """
    t = config.train
    asked = Ordering(
        weights=[s.weight for s in config.data.train],
        mixing=config.data.mixing.model_dump(),
        seed=config.run.seed,
        capacity=config.data.pack_tokens if config.data.packing else None,
        rows_per_step=t.rows_per_step,
        epochs=t.epochs,
        steps=t.steps,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
        group=config.data.group,
    )
    return make_row_order(scan, asked, known=known, costs=costs, store=store)
