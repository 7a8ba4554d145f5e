"""The loop: numbers that go wrong, and steps that are split differently."""

from __future__ import annotations

import copy
import json
import math
import os
import time

import pytest
import torch

import mmit.train.engines.torch_engine as engine_module
from mmit.data import loader
from mmit.errors import MmitError
from mmit.models import sending
from mmit.train import loop
from mmit.train.checkpoint import folders
from mmit.train.run import run
from tests.tiny_run import tiny_config
from tests.train.engines.zero_cases import CASES, Bench, accumulate, gradients, same, snapshot, write_data


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    from mmit.train.engines.world import World

    folder = tmp_path_factory.mktemp("loop")
    write_data(folder)
    return Bench(folder, World(0, 1, torch.device("cpu"), deepspeed=False))


@pytest.mark.parametrize(
    "splits", [[[0], [4], [6], [5], [1]], [[0, 4], [6], [5, 1], []], [[1], [5, 6, 4], [0]]], ids=["5", "3 + idle", "3"]
)
def test_any_split_of_the_same_records_gives_the_same_gradient(bench, splits):
    results = []
    for units in ([[0, 4, 6, 5, 1]], splits):
        engine = bench.reference()
        batches = bench.batches(units)
        loss = accumulate(engine, batches, float(sum(b.targets for b in batches)))
        results.append((loss, gradients(engine)))
    (loss, mine), (expected, theirs) = results
    assert loss == pytest.approx(expected, abs=1e-6)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "fault",
    [
        lambda losses, scale: engine_poisoned(losses * math.nan, scale),
        lambda losses, scale: engine_poisoned(losses + math.inf, scale),
        lambda losses, scale: losses.sum() * math.inf,
    ],
)
def test_a_number_that_is_not_finite_changes_nothing(bench, monkeypatch, fault):
    engine = bench.reference()
    batches = bench.batches(CASES["mixed rows"][0])
    accumulate(engine, batches, 20.0)
    engine.step(1.0)
    before = copy.deepcopy(snapshot(engine, engine.model))
    monkeypatch.setattr(engine_module, "poisoned", fault)
    accumulate(engine, batches, 20.0)
    assert not math.isfinite(engine.step(1.0))
    monkeypatch.undo()
    assert same(before, snapshot(engine, engine.model))
    accumulate(engine, batches, 20.0)
    assert math.isfinite(engine.step(1.0)) and not same(before, snapshot(engine, engine.model))


engine_poisoned = engine_module.poisoned


def spoil(monkeypatch, bad: set[int]) -> None:
    """Make the micro-batches with these numbers give NaN."""
    calls = []

    def poisoned(losses, scale):
        calls.append(1)
        if len(calls) - 1 in bad:
            losses.data.fill_(math.nan)
        return engine_poisoned(losses, scale)

    monkeypatch.setattr(engine_module, "poisoned", poisoned)


def test_a_skipped_step_is_told_with_its_records_and_counted(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {3})
    assert run(tiny_config(tmp_path, train={"steps": 4, "rows_per_step": 2, "precision": "fp32"})) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped_steps"] for r in rows] == [0, 1, 1, 1] and rows[1]["loss"] is None and rows[2]["loss"] > 0
    told = " ".join(capsys.readouterr().err.split())
    assert "step 2 skipped" in told and "train.jsonl" in told and ("picture-" in told or "text-" in told)


def test_the_share_of_a_step_that_waits_for_data_is_in_its_row(tmp_path, monkeypatch):
    build = loader.build_row

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return build(*args, **kwargs)

    monkeypatch.setattr(loader, "build_row", slow)
    assert run(tiny_config(tmp_path, train={"steps": 2, "rows_per_step": 2, "precision": "fp32"})) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 0.1 <= row["data_wait"] * row["seconds"] < row["seconds"]  # two rows, each of 0.05 s


def test_losses_are_on_their_way_before_the_norm_is_waited_for(tmp_path, monkeypatch):
    """So that the host waits once a step for a device, for the norm; the losses have arrived by then."""
    seen = []
    real_step, real_fetch = engine_module.TorchEngine.step, loop.fetch

    def step(engine, factor):
        seen.append("step")
        return real_step(engine, factor)

    def fetch(tensor):
        seen.append("sent")
        read = real_fetch(tensor)
        return lambda: (seen.append("read"), read())[1]

    monkeypatch.setattr(engine_module.TorchEngine, "step", step)
    monkeypatch.setattr(loop, "fetch", fetch)
    assert run(tiny_config(tmp_path, train={"steps": 2})) == 0
    assert seen == ["sent", "step", "read"] * 2


def test_a_copy_to_the_host_is_waited_for_when_it_is_read(monkeypatch):
    seen, host = [], torch.ones(2)

    class OnCuda:
        device = torch.device("cuda", 0)

        def to(self, target, non_blocking):
            seen.append(("copy", target, non_blocking))
            return host

    class Event:
        def record(self, stream):
            seen.append(("recorded on", stream))

        def synchronize(self):
            seen.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    read = sending.fetch(OnCuda())
    assert seen == [("copy", "cpu", True), ("recorded on", "stream of cuda:0")]
    assert read() is host and seen[2:] == ["waited"]


def test_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(2, 100)))
    config = tiny_config(tmp_path, train={"steps": 30, "rows_per_step": 2, "precision": "fp32", "save_every": 1})
    with pytest.raises(MmitError, match="8 steps in a row") as error:
        run(config)
    assert "train.jsonl" in str(error.value) and "learning rates" in error.value.remedy
    found = folders.newest(tmp_path / "run")
    assert found is not None and folders.step_of(found) == 8 and os.path.isdir(found)
