"""`mmit init` writes a config that the dry run takes, says what it found, and overwrites nothing unasked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.cli.init import config_text
from mmit.config import load_config
from mmit.yamlio import parse_yaml
from tests.tiny_run import tiny_config

CONFIG = {"model_type": "llama", "vocab_size": 600, "hidden_size": 16, "intermediate_size": 24}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
HF = {"kind": "hf", "name": "a/b", "weights": True}


def mmit(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """A LLaVA JSON, an LLM's folder without weights, and a vision model's."""
    tiny_config(tmp_path)
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["LlamaForCausalLM"]}))
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    rows = [{"id": str(i), "image": f"{i}.png", "conversations": talk} for i in range(4)]
    (tmp_path / "data" / "mine.json").write_text(json.dumps(rows))
    return {"data": tmp_path / "data" / "mine.json", "llm": tmp_path / "tokenizer", "encoder": tmp_path / "vision"}


def words(parts: dict[str, Any], out: Path, *more: str) -> list[object]:
    return ["init", *(word for name, value in parts.items() for word in (f"--{name}", value)), "--out", out, *more]


def test_the_dry_run_takes_what_it_writes(parts, tmp_path):
    out = tmp_path / "mine.yaml"
    made = mmit(*words(parts, out))
    assert made.exit_code == 0, made.output
    assert "format: llava (" in made.stderr and f"mmit train --dry-run --config {out}" in made.stdout
    text = out.read_text()
    config = load_config(out)
    assert config.data.train[0].format == "llava" and config.data.train[0].path == str(parts["data"])
    assert config.run.dir == "runs/mine" and config.model.vision is not None and config.model.vision.kind == "hf"
    assert sum("#" in line for line in text.splitlines()) >= 15  # each choice has its reason beside it
    planned = mmit("train", "--dry-run", "--config", out)
    assert planned.exit_code == 0, planned.output
    assert "4 records" in planned.output


def test_a_config_is_overwritten_only_when_asked(parts, tmp_path):
    out = tmp_path / "mine.yaml"
    out.write_text("kept")
    refused = mmit(*words(parts, out))
    assert refused.exit_code == 2 and "exists already" in refused.stderr and "--force" in refused.stderr
    assert out.read_text() == "kept"
    assert mmit(*words(parts, out, "--force")).exit_code == 0 and out.read_text() != "kept"


def test_without_a_terminal_what_is_missing_is_named(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = mmit("init", "--data", parts["data"])
    assert done.exit_code == 2 and done.stderr.count("error") == 1
    assert "--llm, --encoder are not given" in done.stderr and "give --data PATH --llm NAME" in done.stderr
    assert "--llm is not given" in mmit("init", "--data", parts["data"], "--encoder", "timm:x").stderr
    del parts["data"]
    done = mmit("init", "--data", parts.get("data", "data/mine.json"), "--llm", "a/b", "--encoder", "a/b")
    assert done.exit_code == 0 and (tmp_path / "train.yaml").exists()  # --out has a default


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("data", "nowhere.json", "nowhere.json: no such file"),
        ("llm", "", "--llm: no name"),
        ("encoder", "vit_base", "timm:NAME"),
        ("encoder", "tmim:vit_base", "names no library"),
        ("encoder", "open_clip:ViT-B-16", "open_clip's tags"),
        ("out", "mine.json", "a config is a .yaml file"),
    ],
)
def test_a_wrong_answer_is_one_error(parts, tmp_path, name, value, told):
    given = {**parts, "out": tmp_path / "mine.yaml", name: value}
    done = mmit("init", *(word for key, one in given.items() for word in (f"--{key}", one)))
    assert done.exit_code == 2 and told in done.stderr and done.stderr.count("error") == 1, done.stderr
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("timm:vit_base_patch16_siglip_224", ("timm", "vit_base_patch16_siglip_224", True)),
        ("open_clip:ViT-B-16@openai", ("open_clip", "ViT-B-16", "openai")),
        ("open_clip:hf-hub:a/b", ("open_clip", "hf-hub:a/b", None)),
        ("openai/clip-vit-base-patch16", ("hf", "openai/clip-vit-base-patch16", True)),
        ("hf:google/siglip2-base-patch16-224", ("hf", "google/siglip2-base-patch16-224", True)),
    ],
)
def test_encoders(parts, tmp_path, given, found):
    out = tmp_path / "mine.yaml"
    assert mmit(*words({**parts, "encoder": given}, out)).exit_code == 0
    vision = load_config(out).model.vision
    assert vision is not None and (vision.kind, vision.name, vision.weights) == found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_four_questions_are_asked_again_until_answered(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = ["nowhere.json", str(parts["data"]), "", str(parts["encoder"]), "mine.yaml"]
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{answer}\n" for answer in answers)))
    with pytest.raises(SystemExit) as ended:
        app(["init"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said
    assert said.out.count("your data: ") == 2 and "nowhere.json: no such file" in said.err
    assert load_config(tmp_path / "mine.yaml").model.llm.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr("sys.stdin", Terminal(""))  # Ctrl-D
    with pytest.raises(SystemExit) as ended:
        app(["init"])
    assert ended.value.code == 130


@pytest.mark.parametrize("path", ["a b: c#d.json", "x\ny.json", "'q' \"r\".json", "{a}.json", "%s.json", "ü.json"])
def test_any_path_is_written_so_that_it_is_read_back(path):
    raw, _ = parse_yaml(config_text(path, "llava", llm="a/b", vision=HF, out=Path("x\ny.yaml")), where="x")
    assert raw["data"]["train"][0]["path"] == path
