"""What a run tells: losses by source, evaluations, the best checkpoint, spikes, a report; all survives a resume."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
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
from mmit.train.monitor import trackers
from mmit.train.monitor.describe import note_start
from mmit.train.monitor.metrics_log import RunLog
from mmit.train.monitor.run_files import read_rows
from mmit.train.run import EXIT_STOPPED, run
from mmit.train.schedule import Spikes
from tests.tiny_run import tiny_config

ROOT = Path(__file__).parents[3]
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


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "swanlab"])
def test_a_tracker_that_is_missing_is_told_before_anything_is_loaded(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda found: None)
    config = tiny_config(tmp_path, train={"steps": 1, "report_to": [name]})
    with pytest.raises(ConfigError, match="is not installed") as error:
        run(config)
    assert f"mmit-tune[{name}]" in error.value.remedy and error.value.where == "train.report_to"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="tensorboard"):
        tiny_config(tmp_path, train={"steps": 1, "report_to": ["tensorbord"]})


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    # It reads the folder when it is imported.
    code = """
import sys
from pathlib import Path
from mmit.train.monitor.trackers import open_trackers
for step in (1, 2):
    (tracker,) = open_trackers(["trackio"], Path(sys.argv[1]), {"run.seed": 0})
    tracker.begin(step - 1)
    tracker.log(step, {"loss": 1.0 / step})
    tracker.close()
"""
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept"), "TRACKIO_PROJECT": "tests", "PYTHONPATH": str(ROOT)}
    (tmp_path / "run").mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    identity = json.loads((tmp_path / "run" / "trackio.json").read_text())["id"]
    with sqlite3.connect(tmp_path / "kept" / "tests.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(text)) for name, step, text in rows] == [
        (f"run-{identity}", 1, {"loss": 1.0}),
        (f"run-{identity}", 2, {"loss": 0.5}),
    ]


@pytest.mark.slow
def test_swanlab_keeps_a_run_here_and_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    for step in (1, 2):
        (tracker,) = trackers.open_trackers(["swanlab"], tmp_path, {"run.seed": 0})
        tracker.begin(step - 1)
        tracker.log(step, {"loss": 1.0 / step})
        tracker.close()
    identity = json.loads((tmp_path / "swanlab.json").read_text())["id"]
    kept = sorted((tmp_path / "swanlab").glob(f"run-*-{identity}"))
    assert kept and all((folder / f"run-{identity}.swanlab").stat().st_size for folder in kept)
    monkeypatch.setenv("SWANLAB_MODE", "online")
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    with pytest.raises(ConfigError, match="SwanLab refuses: ") as error:
        trackers.open_trackers(["swanlab"], tmp_path, {})
    assert "swanlab login" in error.value.remedy and error.value.where == "train.report_to"


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


GOOD = {"step": 3, "loss": 1.0, "tokens": 7, "seconds": 0.5, "tokens_per_s": 14.0, "skipped_steps": 0, "bad_records": 0}
WITHOUT = {key: value for key, value in GOOD.items() if key != "loss"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (json.dumps(WITHOUT), "it has no 'loss'"),
        (json.dumps(GOOD | {"tokens": None}), "'tokens' is null"),
        (json.dumps(GOOD | {"seconds": "0.5"}), "'seconds' is no finite number"),
        (json.dumps(GOOD | {"lr": True}), "'lr' is no finite number"),
        (json.dumps(GOOD | {"grad_norm": 10**400}), "'grad_norm' is no finite number"),
        (json.dumps(GOOD | {"fill": float("nan")}), "'fill' is no finite number"),
        (json.dumps(GOOD | {"loss_of": {"a": "b"}}), "'loss_of' is no finite number"),
        (json.dumps(GOOD | {"lr_of": 1.0}), "'lr_of' is no JSON object"),
        (json.dumps(GOOD | {"step": 1.5}), "'step' is no whole number"),
        (json.dumps({"step": 3, "eval": {}}), "it has no 'eval_seconds'"),
        (json.dumps({"step": 3, "eval": 1.0, "eval_seconds": 1.0}), "'eval' is no JSON object"),
        (json.dumps(GOOD)[:20], "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("", "it is no JSON"),
        ("[3]", "it is no JSON object"),
        ("\udcff{}", "it is no JSON"),
    ],
)
def test_a_damaged_line_is_left_out_and_told(tmp_path, line, said):
    lines = [json.dumps(GOOD | {"step": 1, "loss": None}), line, json.dumps(GOOD | {"step": 2}), json.dumps(GOOD)[:9]]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    told = f"metrics.jsonl, line 2 is left out: {said}"
    for command in ("report", "run-status"):
        result = CliRunner().invoke(app, [command, str(tmp_path)])
        assert result.exit_code == 0 and result.stderr == f"warning: {told}\n", result.output
    assert "step 2 of ?, loss 1.0000" in result.stdout  # the row after it, and not the one that is being written
    text = (tmp_path / "report.html").read_text()
    assert "14 in the steps logged" in text and told in text.replace("&#39;", "'")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", b'{"steps": 3', "it is no JSON"),
        ("run.json", b"\xff\xfe", "it is no JSON"),
        ("run.json", b"[1]", "it is no JSON object"),
        ("run.json", b'{"starts": [{"step": 1}]}', "an entry of 'starts' has no 'time'"),
        ("run.json", b'{"parameters": {}}', "'parameters' is no list"),
        ("run.json", b'{"steps": "9"}', "'steps' is no number"),
        ("run.json", b'{"eval": {"records": 1}}', "'eval' has no 'bad'"),
        ("best.json", b'{"checkpoint": "step-1", "metric": "eval_loss"}', "it has no 'value'"),
        ("best.json", b'{"checkpoint": "step-1", "metric": "eval_loss", "value": NaN}', "'value' is no number"),
        ("events.jsonl", b'\xff\n[1]\n{"step": 1, "kind": "spike"}\n', ""),
        ("heartbeats/rank-00000.json", b'{"rank": 0}', ""),
        ("bad_records.jsonl", b'\xff\n3\n{"row": 1}\n', ""),
        ("eval/report.json", b'{"task":', ""),
        ("config.yaml", b"\xff\xfe", ""),
    ],
)
def test_a_damaged_file_is_left_out_and_told(tmp_path, name, content, said):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    told = f"{name} is left out: {said}"
    for command in ("report", "run-status"):
        result = CliRunner().invoke(app, [command, str(tmp_path)])
        assert result.exit_code == 0 and result.stderr == (f"warning: {told}\n" if said else ""), result.output
    assert not said or told in (tmp_path / "report.html").read_text().replace("&#39;", "'")


def test_a_start_after_a_damaged_run_json(tmp_path):
    """It names its own moment alone, rather than fail."""
    (tmp_path / "run.json").write_text("[1]")
    note_start(tmp_path, {"hardware": {"ranks": 1}}, step=4)
    assert [start["step"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [4]


def test_many_damaged_lines_are_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 9)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0 and result.stderr.count("has no 'step'") == 5 and "4 more lines" in result.stderr


def test_a_run_that_goes_on_tells_what_it_drops(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(WITHOUT) + "\n" + json.dumps(GOOD | {"lr": 1e-3}) + "\n")
    log = RunLog(tmp_path, active=True)
    log.begin(total=4, start=3)
    log.step(GOOD | {"step": 4, "lr": 1e-3, "memory_gib": 1.0}, write=True)
    log.close()
    assert "line 1 is left out: it has no 'loss'" in capsys.readouterr().err
    assert (tmp_path / "loss.png").exists()
