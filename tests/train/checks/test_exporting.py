"""Formats that a run is written in after it: what is asked of a config, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmit.config import Config
from mmit.errors import ModelError
from mmit.train.checks import exporting
from mmit.train.checks.exporting import check_exports, check_format, exports_of, text_facts_of

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def config(folder: Path, *, export: list[str], fit: str = "pad", **llm: Any) -> Config:
    raw = {
        "model": {"vision": {"kind": "hf", "name": "tower", "fit": fit}, "llm": {"name": str(folder / "llm"), **llm}},
        "tune": {"llm": {"mode": "lora", "lr": 1e-3}},
        "data": {"train": [{"path": "a.jsonl"}]},
        "run": {"dir": str(folder / "run")},
        "train": {"steps": 1},
        "export": export,
    }
    return Config.from_dict(raw, where="a test")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formats whose parts were assembled to be asked."""
    calls: list[str] = []
    monkeypatch.setattr(exporting, "_check_parts", lambda config, format, llm_only: calls.append(format))
    return calls


def test_formats_go_into_folders_of_their_names(tmp_path: Path) -> None:
    found = exports_of(config(tmp_path, export=["mmit", "peft"]))
    assert found == [("mmit", tmp_path / "run/export/mmit"), ("peft", tmp_path / "run/export/peft")]
    assert exports_of(config(tmp_path, export=[])) == []


def test_a_base_that_is_not_there_is_asked_nothing(tmp_path: Path, asked: list[str]) -> None:
    gone = config(tmp_path, export=["llava-hf", "gguf", "peft"])
    assert text_facts_of(gone, "llava-hf") is None
    check_exports(gone)
    assert asked == []


def test_parts_are_asked_of_the_formats_that_hang_on_them(tmp_path: Path, asked: list[str]) -> None:
    there = config(tmp_path, export=["gguf", "peft", "mmit"], random_init=LLAMA)
    check_exports(there)
    assert asked == ["gguf"]
    facts = text_facts_of(there, "llava-hf")
    assert facts is not None and facts.kind == "llama" and text_facts_of(there, "peft") is None


def test_the_config_alone_is_refused_before_any_part_is_asked(tmp_path: Path, asked: list[str]) -> None:
    with pytest.raises(ModelError, match="unknown export format 'ggml'"):
        check_format(config(tmp_path, export=[], random_init=LLAMA), "ggml")
    crop = config(tmp_path, export=["gguf"], fit="crop", random_init=LLAMA)
    with pytest.raises(ModelError):
        check_exports(crop)
    check_format(crop, "gguf", llm_only=True)
    assert asked == ["gguf"]
