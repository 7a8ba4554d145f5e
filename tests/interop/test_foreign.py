"""Folders of other projects are told apart by what they declare, and read with the options that suit them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmit.errors import ConfigError, ModelError
from mmit.interop import foreign
from mmit.interop.foreign import check_options, is_foreign, read_foreign, settle

LLAVA = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "eye"}


@pytest.mark.parametrize(
    ("told", "foreign"),
    [
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, True),
        ({"model_type": "llava", "architectures": ["Other"]}, False),
        (LLAVA, True),
        ({**LLAVA, "architectures": ["LlamaForCausalLM"]}, False),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, False),
    ],
)
def test_a_layout_is_declared_and_never_guessed_of_a_name(tmp_path: Path, told: Any, foreign: bool) -> None:
    folder = tmp_path / "llava-1.5"
    folder.mkdir()
    assert not is_foreign(folder)
    (folder / "config.json").write_text("{")
    assert not is_foreign(folder)
    (folder / "config.json").write_text(json.dumps(told))
    assert is_foreign(folder) is foreign


def test_what_no_reader_takes_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="declares no layout that mmit reads") as error:
        read_foreign(tmp_path)
    assert all(name in error.value.remedy for name in ("llava-hf", "TinyLLaVA", "prismatic-vlms"))


def test_a_folder_without_a_chat_template_needs_a_format_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    reader = lambda folder, **given: calls.append(given)  # noqa: E731
    monkeypatch.setattr(foreign, "READERS_BY_CONFIG", {lambda folder: {}: reader})
    with pytest.raises(ModelError, match="has no chat template") as error:
        read_foreign(tmp_path, base="llm")
    assert "vicuna_v1" in error.value.remedy and calls == []


@pytest.mark.parametrize("prefix", [0, 1])
def test_what_is_read_says_how_its_encoder_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: int
) -> None:
    calls: list[Any] = []
    vlm = SimpleNamespace(llm="llm", vision=SimpleNamespace(prefix=prefix))

    def reader(folder: Path, **given: Any) -> Any:
        calls.append(given)
        return vlm, "tokens", {"mode": "pad"}

    unheld = ModelError("is of another kind")

    def held(vision: Any) -> Any:
        raise unheld

    monkeypatch.setattr(foreign, "READERS_BY_CONFIG", {lambda folder: {}: reader})
    monkeypatch.setattr(foreign, "read_generation", lambda llm, folder: calls.append((llm, folder)))
    monkeypatch.setattr(foreign, "held_towers", held)
    monkeypatch.setattr(foreign, "chat_format", lambda name, tokenizer: (name, tokenizer))
    found = read_foreign(tmp_path, chat="qa", base="b", tower="t", packed=False)
    assert calls == [{"tower": "t", "dtype": torch.float32, "base": "b", "packed": False}, ("llm", tmp_path)]
    assert found.vision_options["select"] == ("cls_patch" if prefix else "patch")
    assert found.vision_options["fit"] == "pad" and found.towers is unheld  # only an import needs them
    assert found.chat == ("qa", "tokens") and found.dtype == torch.float32


def test_options_that_no_folder_takes_are_named() -> None:
    assert check_options({"chat": "qa", "base": None}) == {"chat": "qa"}
    with pytest.raises(ConfigError, match="unknown option 'towr'") as error:
        check_options({"towr": None})
    assert "did you mean 'tower'" in error.value.remedy


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_parts_go_where_they_compute_and_a_placed_llm_stays(device_map: Any) -> None:
    moved: list[Any] = []

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def to(self, place: torch.device) -> None:
            moved.append((self.name, str(place)))

    whole: Any = nn.Linear(1, 1)
    whole.vision = whole.projector = whole.llm = whole.device = None
    vlm: Any = SimpleNamespace(
        vision=Part("eye"), projector=None, llm=Part("llm"), device="meta", requires_grad_=lambda flag: vlm
    )
    found: Any = SimpleNamespace(vlm=vlm)
    settle(found, device="cpu", device_map=device_map)
    assert moved == ([("eye", "cpu"), ("llm", "cpu")] if device_map is None else [("eye", "meta")])
