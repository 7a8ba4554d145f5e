"""Files of a run that are damaged: each line or file is left out, told, and keeps nothing else from being read."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.train.monitor.describe import note_start

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
