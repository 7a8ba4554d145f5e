"""What a process is among ranks, and which choices contradict each other."""

from __future__ import annotations

import os

import pytest
import torch

from mmit.errors import ConfigError
from mmit.train.engines.world import ALLOCATOR, join_ranks


def test_ranks_on_the_cpu_of_a_machine_with_gpus_need_deepspeed_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed looks for GPUs by itself, and would put its buffers there."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=cpu") as error:
        join_ranks(kind="deepspeed", device="cpu")
    assert error.value.where == "device"


@pytest.mark.parametrize(
    ("kind", "environment", "told"),
    [
        ("torch", {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "one device"),
        ("deepspeed", {}, "no launcher"),
    ],
)
def test_a_launcher_and_an_engine_that_contradict_each_other(monkeypatch, kind, environment, told) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        join_ranks(kind=kind, device="cpu")


@pytest.mark.parametrize("given", [None, *ALLOCATOR])
def test_segments_grow_on_cuda_unless_the_environment_says_otherwise(monkeypatch, given) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in (*ALLOCATOR, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(dict(os.environ)))
    world = join_ranks(kind="torch", device="cuda")
    found = {name: seen[0][name] for name in ALLOCATOR if name in seen[0]}
    monkeypatch.delenv(ALLOCATOR[0], raising=False)
    expected = {ALLOCATOR[0]: "expandable_segments:True"} if given is None else {given: "max_split_size_mb:64"}
    assert world.device.type == "cuda" and found == expected


def test_a_process_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    world = join_ranks(kind="auto", device="cpu")
    assert (world.rank, world.size, world.deepspeed, world.device.type) == (0, 1, False, "cpu")
