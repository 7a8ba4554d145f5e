"""Fake tensors of the CPU: shapes without numbers, and no stand-in for a GPU that this process has not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmit.models.fakes import CpuFakes


@pytest.mark.parametrize("mode", [CpuFakes, FakeTensorMode])
def test_nothing_is_put_in_place_of_a_gpu(mode: type[FakeTensorMode], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: asked.append(1))
    with mode():
        torch.empty(2, 3)
    # torch's own mode does it where no GPU is: if it stops doing so, CpuFakes is not needed any more.
    assert bool(asked) == (mode is FakeTensorMode and not torch.cuda.is_available())


def test_shapes_and_gradients_are_those_of_real_tensors() -> None:
    def shapes() -> list[tuple[torch.Size, torch.device]]:
        model = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2))
        out = model(torch.ones(3, 5, 6)).softmax(-1)
        out.sum().backward()
        found = [out, *(p.grad for p in model.parameters() if p.grad is not None)]
        assert all(isinstance(tensor, FakeTensor) for tensor in found) == (not real)
        return [(tensor.shape, tensor.device) for tensor in found]

    real = True
    expected = shapes()
    real = False
    with CpuFakes():
        assert shapes() == expected and len(expected) == 5
