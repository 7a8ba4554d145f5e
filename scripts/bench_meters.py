"""Meters of steps: executed FLOPs, split at the LM head, the peak of live bytes, the rate of products; statistics.

FLOPs and live bytes repeat exactly.

FLOPs are those of torch's FlopCounterMode (attention counted densely). Live bytes are of every tensor storage that an
operator returns while the meter is on, from its birth to its end; what was alive before (weights, optimizer) is added.
"""

from __future__ import annotations

import random
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.mm.out, aten.addmm.default, aten.bmm.default)


class LiveBytes(TorchDispatchMode):
    """Peak bytes of storages alive at once, those of `held` included."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in held:
            self._count(tensor)
        self.held = self.now

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returned."""
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return out


class HeadFlops(TorchDispatchMode):
    """FLOPs of matrix products with the LM head's weight or a piece of it, transposed or not."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.weight: Any = head.weight
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; count it if it is a product of the head."""
        if function in PRODUCTS:
            a, b = args[-2], args[-1]
            mine = self.weight.untyped_storage().data_ptr()
            if mine in (a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()):
                self.flops += 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
        return function(*args, **(kwargs or {}))


def flops_of(step: Callable[[], object], head: torch.nn.Module) -> dict[str, int]:
    """Executed FLOPs of one step: in all, and of the LM head."""
    with FlopCounterMode(display=False) as counter, HeadFlops(head) as of_head:
        step()
    return {"flops": counter.get_total_flops(), "head_flops": of_head.flops}


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What lives between steps: weights, buffers, masters and moments."""
    found = [*model.parameters(), *model.buffers()]
    for group in optimizer.param_groups:
        found += group["params"]
    return found + [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


class Products:
    """The rate of matrix products of a model's own shapes, alone: what its steps are measured against.

    Args:
        model: its linear layers, each as often as it is there.
        tokens: rows of the other factor.
    """

    def __init__(self, model: torch.nn.Module, *, tokens: int) -> None:
        layers = [m.weight for m in model.modules() if type(m) is torch.nn.Linear]
        self._shapes = Counter((w.shape, w.dtype) for w in layers)
        make = {case: torch.randn(case[0], dtype=torch.float32).to(case[1]) for case in self._shapes}
        rows = {case: torch.randn(tokens, case[0][1]).to(case[1]) for case in self._shapes}
        self._factors = [(count, rows[case], make[case]) for case, count in self._shapes.items()]

    def rate(self, repeats: int = 3) -> float:
        """FLOPs for each second of processor time, over all of them, each shape so many times."""
        flops = seconds = 0.0
        for count, rows, weight in self._factors:
            rows @ weight.T  # the first call of a shape lays its weights out
            start = time.process_time()
            for _ in range(repeats):
                rows @ weight.T
            flops += count * 2.0 * len(rows) * weight.numel()
            seconds += count * (time.process_time() - start) / repeats
        return flops / seconds


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Median of paired ratios, with a 95 % bootstrap interval of that median."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]
