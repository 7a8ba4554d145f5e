"""`mmit data check | show | stats` as a user meets them: files, configs, exit codes, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmit.records import Record, write_jsonl
from mmit.yamlio import dump_yaml
from tests.cli.commands import assert_one_message, good, mmit
from tests.tiny_run import tiny_config


def test_check_of_sound_data(untrained, tmp_path):
    result = good("data", "check", untrained / "config.yaml", "--images", "--json", tmp_path / "out" / "report.json")
    assert "0 errors, 0 warnings" in result.stdout and "in 16 records" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["records"] == 16 and set(report["not_checked"]) == {"overlap with test data"}
    assert "no tokenizer was given" in good("data", "check", untrained / "data" / "train.jsonl").stdout


def test_check_finds_test_data_and_says_so_in_the_exit_code(untrained):
    result = mmit("data", "check", untrained / "data" / "train.jsonl", "--test", untrained / "data" / "test.jsonl")
    assert result.exit_code == 1 and "test-record" in result.stdout and "picture-1" in result.stdout
    assert "4 errors" in result.stdout  # two records, two images


def test_check_takes_the_evaluation_data_of_a_config(untrained, tmp_path):
    test = {"path": str(untrained / "data" / "test.jsonl")}
    train = {"path": str(untrained / "data" / "train.jsonl")}
    config = tiny_config(untrained, data={"train": [train], "eval": [test]})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert "test-image" in mmit("data", "check", tmp_path / "c.yaml").stdout


def test_warnings_count_only_when_strict(tmp_path):
    write_jsonl([Record.triple("What is <image>?", "A marker.")], tmp_path / "rows.jsonl")
    assert mmit("data", "check", tmp_path / "rows.jsonl").exit_code == 0
    result = mmit("data", "check", tmp_path / "rows.jsonl", "--strict")
    assert result.exit_code == 1 and "image-marker" in result.stdout


def test_check_measures_tokens_as_training_does(untrained):
    data = untrained / "data" / "train.jsonl"
    options = ["--tokenizer", untrained / "tokenizer", "--chat", "vicuna_v1"]
    found = [mmit("data", "check", data, *options, "--image-tokens", m, "--max-length", 200) for m in (1, 190)]
    assert [result.exit_code for result in found] == [0, 1] and "200 fit" in found[1].stdout
    assert "an image counts as one" in " ".join(good("data", "check", data, *options).stdout.split())
    # The chat format wants one user turn: every two-question record is refused, and told once.
    refused = mmit("data", "check", data, "--tokenizer", untrained / "tokenizer", "--chat", "plain")
    assert refused.exit_code == 1 and "not-encodable" in refused.stdout


def test_a_model_that_cannot_see(untrained, tmp_path):
    blind = tiny_config(untrained).model_dump()
    blind["model"]["vision"] = None
    (tmp_path / "c.yaml").write_text(dump_yaml(blind))
    result = mmit("data", "check", tmp_path / "c.yaml")
    assert result.exit_code == 1 and "the model has no vision tower" in result.stdout and "12 errors" in result.stdout


def test_check_tells_the_format_it_found(tmp_path):
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}], "image": []}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    result = mmit("data", "check", tmp_path / "rows.json")
    assert result.exit_code == 1 and "format: llava" in result.stderr and "empty-turn" in result.stdout
    assert "format:" not in mmit("data", "check", tmp_path / "rows.json", "--format", "llava").stderr


# Mistakes


@pytest.mark.parametrize("command", ["check", "show", "stats"])
def test_mistakes(untrained, tmp_path, command):
    data = untrained / "data" / "train.jsonl"
    assert_one_message(mmit("data", command, tmp_path / "gone.jsonl"), "gone.jsonl", "no such file")
    assert_one_message(mmit("data", command, data, "--format", "lava"), "did you mean 'llava'?")
    assert_one_message(mmit("data", command, data, "--tokenizer", "./nowhere"), "--tokenizer", "nowhere")
    for option in (["--chat", "plain"], ["--image-tokens", 4]):
        result = mmit("data", command, data, *option)
        assert result.exit_code == 2 and option[0] in result.stderr and "--tokenizer" in result.stderr
    config = untrained / "config.yaml"
    for option in (["--config", config], ["--format", "mmit"], ["--image-root", tmp_path]):
        result = mmit("data", command, config, *option)
        assert result.exit_code == 2 and option[0] in result.stderr
    (tmp_path / "empty.jsonl").write_text("\n")
    assert mmit("data", command, tmp_path / "empty.jsonl", "--format", "mmit").exit_code == 2


def test_mistakes_of_one_command(untrained, tmp_path):
    data = untrained / "data" / "train.jsonl"
    result = mmit("data", "show", data, "--text", "--out", tmp_path / "x.html")
    assert result.exit_code == 2 and "--out" in result.stderr
    (tmp_path / "file").write_text("")
    assert_one_message(mmit("data", "show", data, "--out", tmp_path / "file" / "x.html"), "cannot write")
    assert_one_message(mmit("data", "check", data, "--json", tmp_path / "file" / "x.json"), "cannot write")
    assert_one_message(mmit("data", "stats", data, "--out", tmp_path / "file" / "x"), "cannot write")
    assert mmit("data", "stats", untrained / "config.yaml", data).exit_code == 2


def test_import_and_check_say_what_was_read_and_what_was_not(tmp_path: Path) -> None:
    """No key of a row may change its meaning, or lose it, without a line that says so."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    good = {"messages": messages, "system": "Be brief.", "context": "c", "tools": [{"name": "f"}]}
    rows = [good, {"messages": messages, "videos": ["a.mp4"]}, {"messages": messages, "label": False, "kto_tag": True}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    imported = mmit("data", "import", "auto", str(path), "--skip-bad", "--out", str(tmp_path / "o.jsonl"))
    checked = mmit("data", "check", str(path))
    for output in (imported.stdout, checked.stdout):
        assert "kept in meta only: context (1 row)" in output
        assert "read: 1 system turn, 1 user turn, 1 assistant turn, 1 record with tools" in output
        assert "loss weights: 0.5 on 1 assistant turn" in output
        output = " ".join(output.split())
        assert (
            "'videos' is a video" in output
            and "label (false) and kto_tag (true), which contradict each other" in output
        )
    assert (imported.exit_code, checked.exit_code) == (0, 1)


def test_a_mixture_without_a_model_is_read_as_data(untrained, tmp_path):
    """What `mmit build` writes where its config names no `base`."""
    paths = {name: str(untrained / "data" / f"{name}.jsonl") for name in ("train", "test")}
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(dump_yaml({"data": {"train": [{"path": paths["train"]}], "eval": [{"path": paths["test"]}]}}))
    assert "test-image" in mmit("data", "check", mixture).stdout
    assert "train" in good("data", "show", mixture, "--text").stdout
    assert "12 different images" in good("data", "stats", mixture, "--out", tmp_path / "stats").stdout
    with_model = mmit("data", "check", mixture, "--config", untrained / "config.yaml")
    assert "no tokenizer was given" not in with_model.stdout and "test-image" in with_model.stdout
    mixture.write_text(dump_yaml({"data": {"train": [{"paths": paths["train"]}]}}))
    assert_one_message(mmit("data", "check", mixture), "mixture.yaml:3", "paths: unknown key", "path")
