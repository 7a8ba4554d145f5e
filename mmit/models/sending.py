"""Small tensors between the host and a device, without the host waiting for the copy.

A copy out of pageable memory waits whatever it is asked, and a row or a token needs several: index tensors, ids, masks.
Page-locked memory is reused only after the copy out of it, which its allocator watches over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on `device`; kernels queued from now on may read it."""
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


def fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start a copy to the host; what comes back gives it, and waits only if it has not arrived by then.

    A later wait for the same stream, such as that for a gradient's norm, makes this one free.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    host = tensor.to("cpu", non_blocking=True)  # into page-locked memory
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def read() -> torch.Tensor:
        arrived.synchronize()
        return host

    return read
