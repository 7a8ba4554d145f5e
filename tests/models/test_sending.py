"""Small tensors to a device and back: the same numbers, and no copy where there is nothing to copy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mmit.models import sending
from mmit.models.sending import fetch, send


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    assert send(tensor, "cpu") is tensor and fetch(tensor)() is tensor
    assert send(tensor, "meta").is_meta


def test_a_copy_to_cuda_goes_through_page_locked_memory_without_waiting(monkeypatch: Any) -> None:
    """The host would wait for a copy out of pageable memory, whatever it is asked."""
    calls: list[Any] = []

    class Host:
        device = torch.device("cpu")

        def pin_memory(self) -> Any:
            calls.append("pinned")
            return self

        def to(self, target: torch.device, **options: Any) -> str:
            calls.append((target.type, options))
            return "there"

    host: Any = Host()
    assert send(host, "cuda:0") == "there"
    assert calls == ["pinned", ("cuda", {"non_blocking": True})]


def test_a_copy_to_the_host_is_read_only_once_it_has_arrived(monkeypatch: Any) -> None:
    order: list[str] = []
    event = SimpleNamespace(record=lambda stream: order.append("queued"), synchronize=lambda: order.append("arrived"))
    monkeypatch.setattr(sending.torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(sending.torch.cuda, "current_stream", lambda device: "stream")
    tensor: Any = SimpleNamespace(device=torch.device("cuda"), to=lambda *_, **__: order.append("copying") or "host")
    read = fetch(tensor)
    assert order == ["copying", "queued"] and read() == "host" and order[-1] == "arrived"
