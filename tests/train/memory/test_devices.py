"""Devices to plan for: by name, by memory, or this machine."""

from __future__ import annotations

import os

import pytest

from mmit.errors import ConfigError
from mmit.train.memory.devices import CUDA_CONTEXT, GPUS, find_device


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_known_by_its_name_in_any_case(name: str) -> None:
    found = find_device(name.upper(), kind="auto")
    assert found.cuda and found.memory == GPUS[name][0] * 10**9 and found.peak == GPUS[name][1] * 1e12


@pytest.mark.parametrize(
    ("name", "memory"),
    [("80GB", 80 * 10**9), ("80", 80 * 10**9), ("23.5 gb", 23_500_000_000), ("80GiB", 80 * 2**30)],
)
def test_memory_alone_is_a_gpu_of_unknown_speed(name: str, memory: int) -> None:
    found = find_device(name, kind="cpu")
    assert (found.memory, found.peak, found.cuda) == (memory, None, True)


def test_without_a_name_it_is_this_machine() -> None:
    found = find_device(None, kind="cpu")
    assert found.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") and not found.cuda
    assert found.need(1000) == 1000  # no context, no gaps of CUDA's allocator
    assert find_device("a10", kind="auto").need(10**9) == 1_050_000_000 + CUDA_CONTEXT


def test_anything_else_is_refused_with_what_can_be_said() -> None:
    with pytest.raises(ConfigError, match="no GPU that mmit knows") as caught:
        find_device("h10", kind="auto")
    assert "80GB" in (caught.value.remedy or "") and "h100" in (caught.value.remedy or "")
