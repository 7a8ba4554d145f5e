"""Bytes of tensors that are alive: counted as operations make them, and as their storages go.

In: operations run inside the mode, on real tensors or on fake ones (shapes without memory). Out: bytes alive now and
at the peak. Each storage counts once, views add nothing; what kernels take and give back inside is not seen. Counts
repeat exactly, which times and resident memory do not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
