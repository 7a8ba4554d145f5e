"""`mmit data show`: records as a page and in the terminal, and what training would refuse."""

from __future__ import annotations

from tests.cli.commands import good
from tests.tiny_run import tiny_config


def test_show_writes_a_page(untrained, tmp_path):
    result = good("data", "show", untrained / "config.yaml", "--n", 3, "--out", tmp_path / "pages" / "show.html")
    page = (tmp_path / "pages" / "show.html").read_text()
    assert "written to" in result.stdout and page.count("<article") == 3
    assert "3 of 16 records, drawn with seed 0" in page and "4 tokens per image" in page
    again = good("data", "show", untrained / "config.yaml", "--n", 3, "--out", tmp_path / "again.html")
    assert again and (tmp_path / "again.html").read_text() == page
    good("data", "show", untrained / "config.yaml", "--n", 3, "--seed", 5, "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() != page


def test_show_in_the_terminal(untrained):
    result = good("data", "show", untrained / "data" / "train.jsonl", "--text", "-n", 20)
    assert "user: [image]What color is it?" in result.stdout and result.stdout.count("licence not stated") == 16
    result = good(
        "data", "show", untrained / "data" / "train.jsonl", "--text", "--config", untrained / "config.yaml", "-n", 20
    )
    assert "[image x4]" in result.stdout and "«" in result.stdout


def test_show_says_what_training_would_refuse(untrained, tmp_path):
    (tmp_path / "c.yaml").write_text(tiny_config(untrained, data={"max_length": 10}).to_yaml())
    assert "training refuses it" in good("data", "show", tmp_path / "c.yaml", "--text").stdout
    data = untrained / "data" / "train.jsonl"
    result = good("data", "show", data, "--tokenizer", untrained / "tokenizer", "--chat", "plain", "--text")
    assert "exactly one user turn" in result.stdout


# stats
