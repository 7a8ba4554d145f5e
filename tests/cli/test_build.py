"""`mmit build annotated` and `mmit build templates`: a folder that other commands read, or one message and nothing."""

from __future__ import annotations

import collections
import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.records import read_jsonl
from mmit.yamlio import dump_yaml, parse_yaml


def mmit(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def mine(tmp_path):
    """A table, a bank of one's own and a config."""
    lines = [f"text {i},{['bad', 'good'][i % 2]}\n" for i in range(40)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(lines))
    bank = {
        "task": "mood",
        "licence": "CC0-1.0",
        "fields": ["text", "label"],
        "choices": ["bad", "good"],
        "templates": [{"id": "a", "input": "{{ text }}\nIs it good or bad?", "target": "{{ label }}"}],
    }
    (tmp_path / "bank.yaml").write_text(dump_yaml(bank))
    config = {"rows": {"path": "rows.csv", "licence": "CC-BY-4.0"}, "bank": "bank.yaml"}
    (tmp_path / "build.yaml").write_text(dump_yaml(config))
    return tmp_path


def test_a_bank_of_ones_own_becomes_a_folder_that_other_commands_read(mine):
    out = mine / "out"
    result = mmit("build", "annotated", mine / "build.yaml", "--out", out)
    assert result.exit_code == 0 and "mood: 40 records, 1 templates" in result.output, result.output
    written = sorted(p.name for p in out.iterdir())
    assert written == ["build.json", "card.md", "dropped.jsonl", "mixture.yaml", "records"]
    assert len(list(read_jsonl(out / "records" / "mood.jsonl"))) == 40
    facts = json.loads((out / "build.json").read_text())
    assert facts["in"] == 40 == facts["accepted"]["mood"] and facts["licences"] == {"CC-BY-4.0 AND CC0-1.0": 40}
    mixture, _ = parse_yaml((out / "mixture.yaml").read_text(), where="")
    assert mixture == {"data": {"train": [{"path": str(out / "records" / "mood.jsonl"), "name": "mood"}]}}
    checked = mmit("data", "check", out / "records" / "mood.jsonl")
    assert checked.exit_code == 0, checked.output
    again = mmit("build", "annotated", mine / "build.yaml", "--out", out)
    assert again.exit_code == 2 and "the folder is not empty" in again.output
    assert sorted(p.name for p in mine.iterdir()) == ["bank.yaml", "build.yaml", "out", "rows.csv"]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("build.yaml", "bank: bank", "bnak: bank", r"unknown key 'bnak'(.|\n)*'bank'"),
        ("build.yaml", "path: rows.csv", "path: none.csv", "no such file"),
        ("build.yaml", "path: rows.csv", "package: easy-vqa-attribute", r"no such set(.|\n)*'easy-vqa-attributes'"),
        (
            "bank.yaml",
            "licence: CC0-1.0\n",
            "",
            r"bank.yaml(.|\n)*it states no licence(.|\n)*Write `licence: CC-BY-4.0`",
        ),
        ("build.yaml", "  licence: CC-BY-4.0\n", "", r"rows \((.|\n)*rows.csv\)(.|\n)*it states no licence"),
        ("build.yaml", "licence: CC-BY-4.0", "licence: CC-BY-NC-4.0", r"CC-BY-NC-4.0 \(40 rows\)"),
        ("bank.yaml", "{{ text }}", "{{ txt }}", r"bank.yaml#a: reads the field 'txt'(.|\n)*'text'"),
        ("rows.csv", "text,label", "txt,label", r"the rows have no field 'text'(.|\n)*'txt'"),
        ("bank.yaml", "{{ label }}", "{{ label[9] }}", "no row gave a record"),
    ],
)
def test_mistakes_end_in_one_message_and_write_nothing(mine, file, old, new, said):
    text = (mine / file).read_text()
    assert old in text
    (mine / file).write_text(text.replace(old, new))
    result = mmit("build", "annotated", mine / "build.yaml", "--out", mine / "out")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert re.search(said, result.output), result.output
    assert not (mine / "out").exists() and not list(mine.glob(".*"))


def test_unknown_terms_are_allowed_by_name(mine):
    (mine / "bank.yaml").write_text((mine / "bank.yaml").read_text().replace("licence: CC0-1.0\n", ""))
    allowed = dump_yaml({"allow_licences": ["CC-BY-4.0", "LicenseRef-unknown"]})
    (mine / "build.yaml").write_text((mine / "build.yaml").read_text() + allowed)
    assert mmit("build", "annotated", mine / "build.yaml", "--out", mine / "out").exit_code == 0


def test_banks_are_checked_and_shown(mine):
    checked = mmit("build", "templates", "check", mine / "bank.yaml")
    assert checked.exit_code == 0 and "mood: 1 for training, 0 held out, 0 inverted" in checked.output, checked.output
    shown = mmit("build", "templates", "show", mine / "bank.yaml", "--row", f"{mine / 'rows.csv'}#2")
    assert shown.exit_code == 0 and "text 0\nIs it good or bad?\n=> bad" in shown.output, shown.output


def test_the_shipped_shapes_are_what_the_pixels_and_the_package_say(tmp_path):
    pytest.importorskip("easy_vqa")
    config = Path(__file__).parents[2] / "configs" / "build" / "shapes.yaml"
    out = tmp_path / "shapes"
    result = mmit("build", "annotated", config, "--out", out, "--limit", 200)
    assert result.exit_code == 0, result.output
    trained = {image.source for path in (out / "records").iterdir() for r in read_jsonl(path) for image in r.images}
    kept = {image.source for path in (out / "held_out").iterdir() for r in read_jsonl(path) for image in r.images}
    assert trained and kept and not trained & kept
    config_of_run, _ = parse_yaml((out / "mixture.yaml").read_text(), where="")
    assert os.path.samefile(out / config_of_run["base"], config.parents[1] / "train" / "quickstart.yaml")
    for record in read_jsonl(out / "records" / "match.jsonl"):
        assert record.turns[-1].text in ("yes", "no")
    answers = collections.Counter(r.turns[-1].text for r in read_jsonl(out / "records" / "match.jsonl"))
    assert 0.3 < answers["yes"] / answers.total() < 0.7  # no answer can be had without looking


def test_workers_do_not_show_in_what_is_written(mine):
    config = {"rows": {"path": "rows.csv", "licence": "CC-BY-4.0"}, "bank": "bank.yaml", "shots": {0: 0.5, 2: 0.5}}
    lines = [f"text {i},{'bad' if i % 3 else 'x'}\n" for i in range(450)]
    (mine / "rows.csv").write_text("text,label\n" + "".join(lines))
    (mine / "build.yaml").write_text(dump_yaml(config | {"options": {"share": 0.5}}))
    written = []
    for workers in (0, 2):
        out = mine / f"out{workers}"
        result = mmit("build", "annotated", mine / "build.yaml", "--out", out, "--workers", workers)
        assert result.exit_code == 0, result.output
        facts = json.loads((out / "build.json").read_text())
        assert facts["in"] == 450 == facts["accepted"]["mood"] + sum(facts["dropped"].values())
        assert len((out / "dropped.jsonl").read_text().splitlines()) == sum(facts["dropped"].values()) > 0
        written.append([(out / name).read_text() for name in ("records/mood.jsonl", "dropped.jsonl")])
    assert written[0] == written[1]
