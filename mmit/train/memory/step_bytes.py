"""Bytes alive at the peak of a training step, from shapes alone.

In: a composite that was assembled `empty`, with its tuning applied, and its largest micro-batches. Out: bytes by kind.
`LiveBytes` counts them as operations make tensors and as their storages go. Each storage counts once, views add
nothing; what kernels take and give back inside is not seen. Counts repeat exactly, which times and resident memory do
not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmit.models.fakes import CpuFakes
from mmit.models.llm_layers import set_recompute
from mmit.models.shapes import make_fake, planned_attention
from mmit.models.tuning import Group
from mmit.train.engines.torch_engine import TorchEngine

if TYPE_CHECKING:
    from mmit.models.vlm import VLM


class LiveBytes(TorchDispatchMode):
    """A context that counts; `now` and `peak` are bytes. Tensors made before count once they are `add`ed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, int] = {}  # address of a storage -> bytes

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count these storages from now on, unless they are counted already."""
        for tensor in tensors:
            # By storage, not by tensor: views of one memory are many tensors.
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = size
                self.now += size
                # Called when the last tensor over it goes, at whatever moment autograd lets go of it.
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank by kind, unpartitioned; `passing` is what a forward and backward pass adds at its peak."""

    llm: int  # weights of the LLM, adapters included
    rest: int  # weights of tower and projector, buffers
    trained: int  # number of trained parameters
    masters: int  # float32 copies of trained weights that are not float32 themselves
    moments: int
    passing: int  # activations, gradients, logits
    single: int  # the same for a step of one micro-batch, where no gradients wait in float32

    @property
    def total(self) -> int:
        """At the peak, with nothing partitioned."""
        return self.llm + self.rest + self.masters + self.moments + self.passing


def measure_bytes(
    vlm: VLM,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Any]],
    *,
    precision: str,
    accumulate: bool,
    flash: bool,
    recompute: str = "none",
) -> Bytes:
    """Run forward and backward on fake tensors and count what is alive. The composite is of no use afterwards.

    Args:
        groups: what is trained. batches: model arguments of the largest micro-batches, with pixels or features.
        accumulate: whether a step has more than one micro-batch.
        flash: whether attention keeps what a fused CUDA kernel keeps, or what mmit's CPU attention does.
        recompute: activation checkpointing, see `models.llm_layers`.
    """
    mode = CpuFakes(allow_non_fake_inputs=True)
    new = make_fake(vlm, mode)
    groups = [Group(g.name, g.lr, [(n, new[id(p)]) for n, p in g.parameters]) for g in groups]
    vlm.train()
    set_recompute(vlm, recompute)
    passing = single = 0
    trained = [p for g in groups for _, p in g.parameters]
    with mode:
        vlm.split()  # takes a forward of its own, which is not to be counted
        engine = TorchEngine(_Placed(vlm), groups, device=torch.device("cpu"), precision=precision)
    for batch in batches:
        nodes = batch["nodes"]
        tensors = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with planned_attention(vlm, nodes, mode=mode, flash=flash), mode, LiveBytes() as live:
            live.add([*vlm.parameters(), *vlm.buffers(), *engine.masters])
            held = live.now
            # The second micro-batch runs while the gradients of the first wait: that is the peak of a step of several.
            for again in range(2 if accumulate else 1):
                single = max(single, live.peak - held) if again else single
                # One record over the whole row: the plan of attention that counts was made above, of the real one.
                row = {**tensors, "nodes": torch.tensor([[0, len(tensors["input_ids"]), -1]])}
                engine.forward_backward(row, scale=1.0, last=not accumulate or again == 1)
            passing = max(passing, live.peak - held)
            single = max(single, 0 if accumulate else passing)
        for p in (*trained, *engine.masters):
            p.grad = None
    llm = _bytes(vlm.llm)
    masters = [m for m, p in zip(engine.masters, trained, strict=True) if m is not p]
    return Bytes(
        llm=llm,
        rest=_bytes(vlm) - llm,
        trained=sum(p.numel() for p in trained),
        masters=4 * sum(m.numel() for m in masters),
        moments=8 * sum(p.numel() for p in trained),
        passing=passing,
        single=single,
    )


class _Placed(nn.Module):
    """A fake model that is where it shall be: torch cannot swap fake parameters for moved ones."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def forward(self, **tensors: Any) -> torch.Tensor:
        return self.vlm(**tensors)


def _bytes(module: nn.Module) -> int:
    tensors: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
