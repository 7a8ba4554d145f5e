"""Small tensors from the host to a device, without the host waiting for the copy.

A copy out of pageable memory waits whatever it is asked, and a row or a token needs several: index tensors, ids, masks.
Page-locked memory is reused only after the copy out of it, which its allocator watches over.
"""

from __future__ import annotations

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on `device`; kernels queued from now on may read it."""
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)
