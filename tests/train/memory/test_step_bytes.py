"""Bytes alive are counted by storage, as tensors come and go."""

from __future__ import annotations

import torch

from mmit.train.memory.step_bytes import Bytes, LiveBytes


def test_a_storage_counts_once_however_many_views_it_has() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(10, 4)
        parts = [whole[0], whole.T, whole.view(-1), whole.detach()]
        assert live.now == live.peak == 160
        live.add([whole, *parts])
        assert live.now == 160
    assert len(parts) == 4


def test_the_peak_stays_when_tensors_go() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(8)
        passing = [kept + 1, kept + 2]
        assert (live.now, live.peak) == (96, 96)
        passing.clear()
        assert (live.now, live.peak) == (32, 96)
        view = (kept * 2)[:1]  # a view keeps the whole of what it looks at
        assert (live.now, live.peak, view.numel()) == (64, 96, 1)
    del view
    assert live.now == 32


def test_what_the_backward_pass_needs_is_alive_until_it_ran() -> None:
    weight = torch.ones(16, requires_grad=True)
    with LiveBytes() as live:
        live.add([weight])
        loss = (weight.exp() * 2).sum()
        held = live.now  # the exponential is kept for its own gradient
        assert held >= 2 * 64
        loss.backward()
        del loss
        assert live.now == 2 * 64  # the weight and its gradient
    assert weight.grad is not None


def test_the_sum_holds_every_kind_once() -> None:
    found = Bytes(llm=1, rest=10, trained=5, masters=100, moments=1000, passing=10_000, single=77)
    assert found.total == 11_111
