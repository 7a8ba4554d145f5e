"""No code of a model's folder runs, whatever stands on stdin and whichever door it comes in by."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest

from mmit.errors import ModelError
from mmit.models.interop.hf_parts import write_tower_config
from mmit.models.interop.llava_hf import read_llava_hf
from mmit.models.interop.tinyllava import _select
from mmit.models.llm import load_llm, load_tokenizer
from mmit.models.vision import build_vision
from tests.tiny_run import write_tokenizer

AUTO = {"AutoConfig": "other.OtherConfig"} | {
    name: "other.OtherModel" for name in ("AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
}
CODE = """open({mark!r}, 'w').write('x')
from transformers import PretrainedConfig
class OtherConfig(PretrainedConfig):
    model_type = 'other'
class OtherModel: pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with code of its own, which writes a mark, and a stdin that says yes to everything."""
    model = tmp_path / "model"
    write_tokenizer(model)
    told = json.loads((model / "tokenizer_config.json").read_text())
    told |= {"auto_map": {"AutoTokenizer": ["other.OtherModel", None]}, "tokenizer_class": "OtherModel"}
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    (model / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": AUTO}))
    (model / "preprocessor_config.json").write_text(json.dumps({"processor_class": "Other", "auto_map": AUTO}))
    (model / "other.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    return model


def _open_clip(folder: Path) -> None:
    clip = folder / "clip"
    clip.mkdir()
    config = open_clip.get_model_config("tiny-clip")
    assert config is not None
    config["text_cfg"] = {"hf_model_name": str(folder), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    build_vision("open_clip", f"local-dir:{clip}", weights=False)


DOORS: dict[str, Callable[[Path], Any]] = {
    "tokenizer": lambda folder: load_tokenizer(str(folder)),
    "llm": lambda folder: load_llm(str(folder)),
    "shapes": lambda folder: load_llm(str(folder), empty=True),
    "vision": lambda folder: build_vision("hf", str(folder)),
    "llava_hf": lambda folder: read_llava_hf(folder),
    "tower config": lambda folder: write_tower_config(folder / "new", str(folder), None),  # type: ignore[arg-type]
    "tinyllava": lambda folder: _select({}, str(folder), "here"),
    "open_clip": _open_clip,
}


@pytest.mark.parametrize("door", DOORS)
def test_no_code_of_a_folder_runs(door: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        DOORS[door](folder)
    assert not (tmp_path / "mark").exists()


def test_a_known_architecture_with_code_of_its_own_is_read_without_it(folder: Path, tmp_path: Path) -> None:
    described = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    described |= {"num_attention_heads": 2, "vocab_size": 16, "auto_map": AUTO}
    (folder / "config.json").write_text(json.dumps(described))
    assert load_llm(str(folder), empty=True).config.model_type == "llama"
    told = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    assert len(load_tokenizer(str(folder))) > 10
    assert not (tmp_path / "mark").exists()
