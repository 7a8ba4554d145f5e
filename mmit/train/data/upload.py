"""Micro-batches on their way to the device, overlapped with what it computes.

On CUDA the tensors go through page-locked memory on a stream of their own, so neither the host nor the kernels already
queued wait for a copy: while the device works on one micro-batch, the host sends the next. This is the pattern that
PyTorch documents (CUDA semantics: pinned memory buffers, side streams with `wait_stream` and `record_stream`); nobody
has run it on a GPU yet. Elsewhere tensors are just moved. Values never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

STAY = ("nodes", "records")  # on the CPU, where the attention plan is made


class Upload:
    """Moves the arguments of a forward pass to one device."""

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
