"""What a process is among ranks, and which choices contradict each other."""

from __future__ import annotations

import pytest
import torch

from mmit.errors import ConfigError
from mmit.train.engines.world import join_ranks


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


def test_a_process_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    world = join_ranks(kind="auto", device="cpu")
    assert (world.rank, world.size, world.deepspeed, world.device.type) == (0, 1, False, "cpu")
