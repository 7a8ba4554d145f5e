"""What a block of code asks of a CUDA device, seen on fake tensors: kernels, waits of the host, copies, mismatches.

Fake tensors have a device and a shape and no numbers, so no GPU is needed. They refuse operands on two devices by
themselves, except for indexes, which are looked at here. Known limits: `_foreach_*` counts once a tensor, a copy out of
a fake tensor of the CPU counts as blocking although a run pins it (`Upload`), streams are not modelled.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They change how a tensor is seen, or reserve memory, and launch nothing.
FREE = frozenset(
    "_reshape_alias _unsafe_view alias as_strided chunk detach device diagonal empty empty_like empty_strided expand "
    "is_pinned is_same_size lift lift_fresh narrow new_empty new_empty_strided permute reshape select set_ slice split "
    "split_with_sizes squeeze sym_size t transpose unbind unfold unsqueeze view view_as".split()
)
# What they return depends on numbers: the host waits for the device to know its shape.
SHAPED_BY_NUMBERS = frozenset("bincount masked_select nonzero unique_consecutive unique_dim _unique2".split())
OURS = ("/mmit/", "/tests/", "/transformers/", "/peft/", "/torch/optim/", "/torch/nn/utils/")


def cuda(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of them lies on a CUDA device."""
    return any(tensor.device.type == "cuda" for tensor in tensors)


def place() -> str:
    """The innermost lines of a model, an optimizer or mmit that the call came from."""
    frames = [f for f in traceback.extract_stack() if any(name in f.filename for name in OURS)]
    frames = [f for f in frames if not f.filename.endswith("traffic.py")]
    return " < ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in reversed(frames[-2:]))


class Traffic(TorchDispatchMode):
    """Counts while it is active; to be entered inside a FakeTensorMode.

    Attributes: kernels; syncs, place -> times the host waited for a number of the device; copies, (kind, place) ->
    times; mismatches, indexes on another CUDA device than the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.mismatches: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            if cuda(given):
                self.syncs[place()] += 1
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 0
        if name == "equal" and any(isinstance(x, FakeTensor) for x in given):
            self.syncs[place()] += cuda(given)
            return True
        if name in ("index", "index_put", "index_put_"):
            self._look_at_indexes(args)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if name in SHAPED_BY_NUMBERS and cuda(given):
            self.syncs[place()] += 1
        if name in ("_to_copy", "copy_"):
            self._copied(name, args, kwargs, made)
        if (cuda(given) or cuda(made)) and name not in FREE:
            self.kernels += 1
        return out

    def _look_at_indexes(self, args: Any) -> None:
        for index in args[1]:
            if not isinstance(index, torch.Tensor):
                continue
            if index.device.type == "cuda" and index.device != args[0].device:
                self.mismatches.append(f"{args[0].device} indexed by {index.device} at {place()}")
            if index.dtype in (torch.bool, torch.uint8) and index.device.type == "cuda":
                self.syncs[place()] += 1

    def _copied(self, name: str, args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
        if source.device.type == target.device.type:
            return
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        way = "to the device" if target.device.type == "cuda" else "to the host"
        self.copies[f"{way}{', blocking' if waits else ''}", place()] += 1

    def blocking(self) -> Counter[str]:
        """Copies that the host waits for, by kind and place."""
        return Counter({f"{kind} @ {where}": n for (kind, where), n in self.copies.items() if "blocking" in kind})


_tolist = torch.Tensor.tolist


def tolist(self: torch.Tensor) -> Any:
    """`Tensor.tolist` that also takes fake tensors, as zeros; from a CUDA device it is one wait."""
    if not isinstance(self, FakeTensor):
        return _tolist(self)
    if self.device.type == "cuda":
        for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            if isinstance(mode, Traffic):
                mode.syncs[place()] += 1

    def zeros(shape: tuple[int, ...]) -> Any:
        return [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0 if self.is_floating_point() else 0

    return zeros(tuple(self.shape))


def to_fake_cuda(module: nn.Module, mode: FakeTensorMode, device: str = "cuda") -> dict[int, torch.Tensor]:
    """Put fake tensors of that device in the place of a module's own; returns them by the id of what was there."""
    made: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []  # an id may be used again once its tensor is gone
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    kept.append(tensor)
                    with mode:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    wanted = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(new, wanted) if isinstance(tensor, nn.Parameter) else new
                table[name] = made[id(tensor)]
    made[0] = kept  # type: ignore[assignment]  # alive as long as the ids are used
    return made
