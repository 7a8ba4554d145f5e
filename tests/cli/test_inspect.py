"""`mmit inspect`: a record as the model sees it, and what is wrong with one."""

from __future__ import annotations

from tests.cli.commands import assert_one_message, good, mmit
from tests.cli.test_cli import QUESTION, rows_with
from tests.tiny_run import tiny_config, write_records


def test_inspect_shows_the_mask(made, tmp_path):
    page, picture = tmp_path / "pages" / "record.html", tmp_path / "record.svg"
    result = good("inspect", made / "config.yaml", "--row", 2, "--html", page, "--svg", picture)
    assert "pair 1 of 2" in result.stdout and "1.png" in result.stdout
    assert "[image x4]" in result.stdout and "«" in result.stdout and "2 supervised" not in result.stdout.split("«")[0]
    assert 'class="supervised"' in page.read_text() and picture.read_text().startswith("<svg")
    assert "pair 2 of 2" in good("inspect", made / "config.yaml", "--pair", 2).stdout


def test_inspect_takes_overrides_as_a_run_does(made, tmp_path):
    data, config = made / "data" / "train.jsonl", made / "config.yaml"
    assert "chat format vicuna_v1" in good("inspect", config, "model.chat.format=vicuna_v1", "--row", 2).stdout
    other = write_records(tmp_path, count=1, text_only=1)
    shown = good("inspect", config, f"data.train.0.path={other}", "data.split_turns=false", "--row", 2).stdout
    assert "(text-0)" in shown and "pair" not in shown
    short = good("inspect", data, "data.max_length=9", "--config", config).stdout
    assert "training refuses it" in short and "max_length=9" in short
    assert_one_message(mmit("inspect", config, "data.max_lenght=9"), "max_lenght", "max_length")
    assert "overrides need the config" in mmit("inspect", data, "data.max_length=9", "--tokenizer", "a").stderr


def test_inspect_takes_a_data_file(made):
    data = made / "data" / "train.jsonl"
    result = good("inspect", data, "--tokenizer", made / "tokenizer", "--chat", "vicuna_v1", "--image-tokens", 9)
    assert "[image x9]" in " ".join(result.stdout.split()) and "chat format vicuna_v1" in result.stdout
    plain = mmit("inspect", data, "--tokenizer", made / "tokenizer", "--chat", "plain")
    assert_one_message(plain, "picture-0", "exactly one user turn")
    result = good("inspect", data, "--config", made / "config.yaml", "--row", 13)
    assert "pair 1 of 1" in result.stdout and "0 image slots" in result.stdout
    result = mmit("inspect", data)
    assert result.exit_code == 2 and "--tokenizer" in result.stderr
    result = mmit("inspect", data, "--config", made / "config.yaml", "--row", 17)
    assert result.exit_code == 2 and "16 rows" in result.stderr
    result = mmit("inspect", data, "--config", made / "config.yaml", "--pair", 3)
    assert result.exit_code == 2 and "--pair 1 to 2" in result.stderr


def test_inspect_takes_shards(made, tmp_path):
    from mmit.data.shards.writer import build_shards
    from mmit.records import read_jsonl

    build_shards(read_jsonl(made / "data" / "train.jsonl"), tmp_path / "shards")
    text = good("inspect", tmp_path / "shards", "--config", made / "config.yaml", "--row", 2).stdout
    assert "(picture-1)" in text and "image 1: inside the record" in text


def test_inspect_says_when_training_would_refuse(fresh):
    short = tiny_config(fresh, data={"max_length": 10}).to_yaml()
    (fresh / "short.yaml").write_text(short)
    (fresh / "data" / "0.png").unlink()
    text = good("inspect", fresh / "short.yaml").stdout
    assert "more than data.max_length=10" in text and "no such file" in text


def test_a_bad_row_is_what_inspect_shows_of_it(fresh):
    rows_with(fresh, QUESTION, {"role": "assistant", "parts": []})
    assert_one_message(mmit("inspect", fresh / "config.yaml", "--row", 2), "train.jsonl:2", "turn 2")
