"""Models spread over devices, offloaded, and in fewer bits: the same answers as in one piece."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import mmit
from mmit.config import Config
from mmit.errors import ConfigError, ModelError
from mmit.generate import Model
from mmit.interop.export import source_logits
from mmit.train.checkpoint.model import read_config
from mmit.train.run import run
from tests.interop.llava_models import make_llava_hf
from tests.interop.test_portable import command
from tests.tiny_run import two_layers as tiny_config
from tests.tiny_run import write_records, write_tokenizer

PICTURE = PIL.Image.new("RGB", (30, 20), (200, 60, 40))
SPLIT = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu"}
REST = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
MAPS: dict[str, Any] = {"auto": "auto", "one place": {"": "cpu"}, "partly on disk": {**SPLIT, **REST}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """A llava-hf folder, and a run with an adapter on a saved base."""
    from tests.interop.test_llava_hf_write import composite

    folder = tmp_path_factory.mktemp("models")
    make_llava_hf(folder / "llava-hf")
    tokenizer = write_tokenizer(folder / "tokenizer")
    composite(tokenizer).llm.save_pretrained(folder / "base")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "base")
    eye = tiny_config(folder).model.vision
    assert eye is not None
    model = {"vision": eye.model_dump(), "llm": {"name": str(folder / "base")}}
    assert run(tiny_config(folder, model=model, train={"steps": 2})) == 0
    return {"llava-hf": folder / "llava-hf", "run": folder / "run"}


def logits(model: Model) -> list[torch.Tensor]:
    return source_logits(model.vlm, model.tokenizer, model.chat_format, model.image)


def said(model: Model) -> tuple[list[torch.Tensor], str]:
    return logits(model), model.chat(PICTURE, "What is it?", max_new_tokens=8)


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> dict[str, tuple[list[torch.Tensor], str]]:
    """What the models give in one place."""
    return {kind: said(mmit.load(folder, device="cpu")) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["llava-hf", "run"])
@pytest.mark.parametrize("placement", MAPS)
def test_a_device_map_changes_nothing(
    folders: dict[str, Path],
    whole: dict[str, tuple[list[torch.Tensor], str]],
    kind: str,
    placement: str,
    tmp_path: Path,
) -> None:
    placed = mmit.load(folders[kind], device="cpu", device_map=MAPS[placement], offload_folder=str(tmp_path))
    if placement == "partly on disk":
        assert any(p.is_meta for p in placed.vlm.llm.parameters())
    (theirs, answer), (ours, again) = whole[kind], said(placed)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert again == answer


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_fewer_bits(folders: dict[str, Path], bits: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        for folder in folders.values():
            with pytest.raises(ModelError, match=r"(?s)need bitsandbytes.*pip install"):
                mmit.load(folder, device="cpu", **{bits: True})  # type: ignore[arg-type]
        return
    make_llava_hf(tmp_path / "in", width=128)  # bitsandbytes wants multiples of 64
    command("import-model", tmp_path / "in", tmp_path / "start")
    config = read_config(tmp_path / "start").model_dump()
    config["run"]["dir"], config["device"] = str(tmp_path / "run"), "cpu"
    config["tune"]["llm"] = {"mode": "lora", "lr": 0.01, "options": {"r": 4}}
    config["data"].update(train=[{"path": str(write_records(tmp_path / "data"))}], max_length=128, workers=0)
    config["train"].update(epochs=None, steps=2, rows_per_step=2)
    assert run(Config.from_dict(config)) == 0
    for folder in ("in", "run"):
        whole = mmit.load(tmp_path / folder, device="cpu")
        placed = mmit.load(tmp_path / folder, device="cpu", **{bits: True})  # type: ignore[arg-type]
        assert any(type(m).__name__ in ("Linear8bitLt", "Linear4bit") for m in placed.vlm.llm.modules())
        if bits == "load_in_4bit":
            _round_to_4bit(whole)
        for a, b in zip(logits(whole), logits(placed), strict=True):
            assert torch.cosine_similarity(a, b, dim=-1).mean() > 0.99
        assert isinstance(placed.chat(PICTURE, "What is it?", max_new_tokens=4), str)


def _round_to_4bit(model: Model) -> None:
    """Give a whole model the weights that NF4 keeps of its own."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.vlm.llm.named_modules():
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in ("lora_", "lm_head")):
            kept = quantize_4bit(module.weight.data.contiguous(), quant_type="nf4")
            module.weight.data = dequantize_4bit(*kept).to(module.weight.dtype)


def test_both_widths_or_an_unknown_option_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="both set"):
        mmit.load(folders["run"], load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(ConfigError, match="unknown option 'chatt'.*\n.*did you mean 'chat'"):
        mmit.load(folders["llava-hf"], chatt="vicuna_v1")
    with pytest.raises(ConfigError, match="chat is for folders of other projects"):
        mmit.load(folders["run"], chat="vicuna_v1")
    with pytest.raises(ConfigError, match="torch cannot compute on 'gpu'"):
        mmit.load(folders["llava-hf"], device="gpu")
