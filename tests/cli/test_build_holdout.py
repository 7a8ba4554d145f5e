"""`mmit build holdout`: a build, or the leaks by name."""

from __future__ import annotations

import json
from dataclasses import replace

from typer.testing import CliRunner

from mmit.cli import app
from mmit.records import read_jsonl, write_jsonl
from mmit.yamlio import dump_yaml
from tests.build.test_holdout import records  # noqa: F401  the fixture


def test_the_command_writes_a_build_or_names_the_leaks(records, tmp_path):  # noqa: F811
    (tmp_path / "in" / "records").mkdir(parents=True)
    write_jsonl(records, tmp_path / "in" / "records" / "all.jsonl")
    allow = {"records": ["in"], "holdout": {"clusters": ["place"]}, "allow_licences": ["MIT", "LicenseRef-unknown"]}
    (tmp_path / "holdout.yaml").write_text(dump_yaml(allow))
    out = tmp_path / "out"
    command = ["build", "holdout", str(tmp_path / "holdout.yaml"), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "held out" in result.output, result.output
    facts = json.loads((out / "build.json").read_text())
    assert facts["in"] == len(records) and facts["held_out"] == ["side"]
    assert len(list(read_jsonl(out / "held_out" / "side.jsonl"))) == facts["accepted"]["side"]
    leaking = replace(records[0], id="again", meta=records[0].meta | {"task": "again", "cluster": "place"})
    write_jsonl([*records, leaking], tmp_path / "in" / "records" / "all.jsonl")
    result = CliRunner().invoke(app, [*command, "--dry-run"])
    assert result.exit_code == 1 and "leak (image)" in result.output
