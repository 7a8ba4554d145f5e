"""What a run tells: losses by source, evaluations, the best checkpoint, spikes, a report; all survives a resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mmit.train.engines.torch_engine as engine_module
from mmit.cli import app
from mmit.config import Config
from mmit.data.loader import micro_batches
from mmit.data.preparation import prepare_images
from mmit.errors import ConfigError
from mmit.generate import Model
from mmit.records import Record, write_jsonl
from mmit.train.checkpoint import folders
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint.resume import match_best
from mmit.train.data.setup import Encoding, image_loader, open_data
from mmit.train.loop import Progress, sum_by_source
from mmit.train.monitor.run_files import read_rows
from mmit.train.run import EXIT_STOPPED, run
from mmit.train.schedule import Spikes
from tests.tiny_run import tiny_config

STEPS = 8


def write_more(folder: Path) -> tuple[str, str]:
    """A second source of texts, and a held-out one."""
    tiny_config(folder)
    texts = [Record.triple(f"Count {i}.", f"{i} and {i + 1}.", id=f"more-{i}") for i in range(6)]
    write_jsonl(texts[:4], folder / "more.jsonl")
    write_jsonl(texts[4:], folder / "held.jsonl")
    return str(folder / "more.jsonl"), str(folder / "held.jsonl")


def config_of(folder: Path, name: str, **train: Any) -> Config:
    more, held = write_more(folder)
    first = str(folder / "data" / "train.jsonl")
    whole = {"steps": STEPS, "rows_per_step": 2, "save_every": 3, "precision": "fp32", "eval_every": 2, "threads": 1}
    data = {
        "train": [{"path": first}, {"path": more, "name": "more"}],
        "eval": [{"path": first, "limit": 4, "name": "seen"}, {"path": held, "name": "held"}],
    }
    whole |= {"keep_best": {"metric": "score", "better": "higher"}, "keep_last": 1}
    return tiny_config(folder, run={"dir": str(folder / name), "resume": "auto"}, data=data, train=whole | train)


SCORES = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2}


def evaluate(now: checkpoint.Loaded, step: int) -> dict[str, float]:
    assert not now.vlm.training and not torch.is_grad_enabled()
    if step == 2:
        model = Model(now.vlm, now.tokenizer, now.chat, image=now.image)
        assert isinstance(model.chat(None, "Count 1.", max_new_tokens=2), str)
    torch.rand(3)  # must not disturb the run
    now.vlm.requires_grad_(False)
    return {"score": SCORES.get(step, 0.0)}


def told(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what no two runs share."""
    timing = ("seconds", "data_wait", "tokens_per_s", "supervised_per_s", "memory_gib", "eval_seconds")
    return [{k: v for k, v in row.items() if k not in timing} for row in read_rows(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert run(config_of(folder, "run"), evaluate=evaluate) == 0
    return folder


def test_losses_by_source_times_their_tokens_add_up(straight):
    rows = [r for r in told(straight / "run") if "loss" in r]
    assert len(rows) == STEPS and any(len(r["loss_of"]) == 2 for r in rows)
    for row in rows:
        assert sum(row["supervised_of"].values()) == row["supervised"]
        total = sum(row["loss_of"][name] * row["supervised_of"][name] for name in row["loss_of"])
        assert total == pytest.approx(row["loss"] * row["supervised"], rel=1e-12)
        assert set(row["lr_of"]) == {"llm", "projector"} and row["lr"] == row["lr_of"]["llm"]


def test_a_loss_that_is_not_finite_stays_in_its_source():
    losses = torch.tensor([1.0, float("nan"), 2.0, 4.0])
    sums = sum_by_source(losses, torch.tensor([0, 1, 0, 2]), count=4)
    assert sums[[0, 2, 3]].tolist() == [3.0, 4.0, 0.0] and sums[1].isnan()


def test_the_held_out_loss_is_that_of_the_checkpoint(straight):
    """Measured again from the saved weights, one record a row."""
    last = [r for r in told(straight / "run") if "eval" in r][-1]
    assert last["step"] == STEPS and {"eval_loss", "eval_loss/seen", "eval_loss/held", "score"} == set(last["eval"])
    found = checkpoint.load_model(straight / "run" / "checkpoints" / f"step-{STEPS:06d}", device="cpu")
    options = config_of(straight, "run").data
    preparation = prepare_images(found.image, tokens=found.vlm.image_tokens, grid=found.vlm.image_grid)
    data = open_data(
        [source.model_dump() for source in options.eval],
        Encoding(found.chat, found.tokenizer),
        cache=straight,
        on_bad=None,
        preparation=preparation,
        max_length=options.max_length,
        capacity=options.pack_tokens,
    )
    scan = data.scan()
    units = [[unit] for unit in range(len(scan.length))]
    losses: dict[int, list[float]] = {0: [], 1: []}
    with torch.no_grad():
        for unit, batch in enumerate(micro_batches(data, scan, units, load_image=image_loader(preparation))):
            losses[int(scan.source[unit])] += found.vlm(**batch.tensors).tolist()
    means = [sum(each) / len(each) for each in (losses[0] + losses[1], losses[0], losses[1])]
    named = [last["eval"][name] for name in ("eval_loss", "eval_loss/seen", "eval_loss/held")]
    assert named == pytest.approx(means, abs=1e-5)


def test_the_best_checkpoint_is_kept_and_written_down(straight):
    run_dir = straight / "run"
    best = json.loads((run_dir / "best.json").read_text())
    assert best == {"metric": "score", "value": 0.9, "step": 4, "checkpoint": "checkpoints/step-000004"}
    assert [p.name for p in folders.checkpoints(run_dir)] == ["step-000004", "step-000008"]
    folders.verify(run_dir / best["checkpoint"])


def test_a_best_by_another_metric_is_no_measure(straight, tmp_path):
    """A score of 0.9 is no loss that an evaluation could beat."""
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    for metric, kept in (("score", True), (None, True), ("eval_loss", False)):
        progress, said = Progress(best={"metric": "score", "value": 0.9, "step": 4}), []
        match_best(tmp_path, progress, metric=metric, say=said.append)
        assert (progress.best is not None) == kept == (tmp_path / "best.json").exists() == (not said)
    assert "by score (0.9)" in said[0] and "by eval_loss" in said[0]


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resume_is_exact_with_everything_on(straight, tmp_path, monkeypatch, background):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    config = config_of(tmp_path, "run", save_in_background=background)
    for stop in (5, 7):  # SIGTERM after a save, in the middle between two

        def stopping(now, step, stop=stop):
            if step == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(now, step)

        assert run(config, evaluate=stopping) == EXIT_STOPPED
    assert run(config, evaluate=evaluate) == 0
    rename = str(straight) + "/"
    ours, theirs = told(tmp_path / "run"), told(straight / "run")
    assert json.dumps(ours).replace(str(tmp_path) + "/", rename) == json.dumps(theirs)
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 4
    files = ["projector.safetensors", "adapter/adapter_model.safetensors", "trainer/optimizer-00001.safetensors"]
    for name in files:
        a, b = (f / "run" / "checkpoints" / f"step-{STEPS:06d}" / name for f in (tmp_path, straight))
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.slow
def test_a_signal_inside_the_held_out_loss_saves_and_leaves(straight, tmp_path, monkeypatch):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    config = config_of(tmp_path, "run", keep_best=None)
    real = engine_module.TorchEngine.losses

    def losses(self, tensors):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, tensors)

    monkeypatch.setattr(engine_module.TorchEngine, "losses", losses)
    assert run(config) == EXIT_STOPPED
    monkeypatch.undo()
    assert [folders.step_of(f) for f in folders.checkpoints(tmp_path / "run")] == [2]
    assert [r["step"] for r in told(tmp_path / "run") if "eval" in r] == []
    assert run(config) == 0
    rows = [[r for r in told(f / "run")] for f in (tmp_path, straight)]
    evals = [{r["step"]: r["eval"]["eval_loss"] for r in each if "eval" in r} for each in rows]
    assert evals[0] == evals[1] and list(evals[0]) == [2, 4, 6, 8]


def test_a_signal_before_the_first_step_changes_nothing(straight, tmp_path, monkeypatch):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    from mmit.data.dataset import InstructionData

    def scan(self, **rest):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr(InstructionData, "scan", scan)
    assert run(config_of(tmp_path, "run", keep_best=None)) == EXIT_STOPPED
    assert not folders.checkpoints(tmp_path / "run")


def test_what_asks_for_an_evaluation_needs_one(tmp_path):
    with pytest.raises(ConfigError, match=r"train.eval_every: there is nothing"):
        run(tiny_config(tmp_path, train={"steps": 1, "eval_every": 1}))
    with pytest.raises(ConfigError, match="better: higher"):
        tiny_config(tmp_path, train={"steps": 1, "keep_best": {"metric": "accuracy"}})
    with pytest.raises(ConfigError, match="keep_best.metric.*data.eval"):
        run(tiny_config(tmp_path, train={"steps": 1, "keep_best": {}}), evaluate=evaluate)
    with pytest.raises(ConfigError, match="no evaluation gives 'accuracy'; there is score") as error:
        keep = {"metric": "accuracy", "better": "higher"}
        run(tiny_config(tmp_path, train={"steps": 1, "keep_best": keep}), evaluate=lambda now, step: {"score": 1.0})
    assert error.value.where == "train.keep_best.metric"


def test_spikes_are_told_against_the_losses_before():
    spikes, recent = Spikes(6.0, 32), []
    for i in range(40):
        assert not 2.0 + 0.1 * (i % 2) > spikes.bound(recent)
        spikes.remember(recent, 2.0 + 0.1 * (i % 2))
    assert len(recent) == 32 and 2.3 < spikes.bound(recent) < 2.4
    assert Spikes(None, 32).bound(recent) == float("inf")


def test_a_spike_names_its_records(straight, tmp_path, monkeypatch, capsys):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    real, calls = engine_module.TorchEngine.forward_backward, []

    def leap(self, tensors, *, scale, last, weights=None):
        calls.append(1)
        losses = real(self, tensors, scale=scale, last=last, weights=weights)
        return losses * 50 if len(calls) == 2 * 6 else losses

    monkeypatch.setattr(engine_module.TorchEngine, "forward_backward", leap)
    train = {"steps": 6, "rows_per_step": 2, "precision": "fp32", "spike_window": 4}
    assert run(tiny_config(tmp_path, train=train)) == 0
    (event,) = read_rows(tmp_path / "run" / "events.jsonl")
    assert event["kind"] == "spike" and event["step"] == 6 and event["loss"] > event["bound"]
    assert "train.jsonl" in event["records"]
    assert "loss spike in step 6" in capsys.readouterr().err
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["spikes"] == 1


def test_the_report_holds_what_the_run_did(straight):
    result = CliRunner().invoke(app, ["report", str(straight / "run")])
    assert result.exit_code == 0 and "report.html" in result.output
    text = (straight / "run" / "report.html").read_text()
    assert text.count("<svg") >= 8 and "<script" not in text and "://" not in text.split("<h2>Config")[0]
    best = "checkpoints/step-000004: score 0.9"
    for part in ("finished, step 8", best, "eval_loss/held", "more", "Hardware", "torch"):
        assert part in text, part
    status = CliRunner().invoke(app, ["run-status", str(straight / "run")], env={"COLUMNS": "120"})
    assert status.exit_code == 0 and "step 8 of 8" in status.output and "finished" in status.output


def test_the_report_of_a_run_that_never_stepped(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"steps": 5, "hardware": {"host": "<b>"}, "starts": []}))
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    text = (tmp_path / "report.html").read_text()
    assert "No step has been logged yet" in text and "&lt;b&gt;" in text
    missing = CliRunner().invoke(app, ["run-status", str(tmp_path / "nothing")])
    assert missing.exit_code == 2
