"""Tensors that have a shape and a device but no numbers, for counting without computing."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensorMode


class CpuFakes(FakeTensorMode):
    """Fake tensors of the CPU alone.

    Without a GPU, torch's own mode puts a stand-in for CUDA in place for good, which counts as a device: autograd then
    starts a thread for it at the first backward pass, and a process with that thread cannot train in a fork.
    """

    avoid_device_init = False
