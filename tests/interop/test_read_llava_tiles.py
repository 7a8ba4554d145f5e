"""LLaVA-1.6's own layout: its tiles and the vector that ends a line are those of transformers' LLaVA-NEXT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import mmit
from mmit.data.chat import encode
from mmit.data.preparation import prepare_images
from mmit.errors import ModelError
from mmit.interop.export import Talk, logits_of
from mmit.records import Image, Text, Turn
from tests.interop.llava_models import CANVASES, make_llava_hf
from tests.interop.test_llava import FIELDS, THEIRS

GRID = [[48, 16], [16, 32]]  # (width, height)
SIZES = ((45, 13), (14, 50), (30, 30))


def names(key: str) -> str:
    """A key of llava-hf in LLaVA's own layout."""
    key = key.removeprefix("model.") if not key.startswith("model.layers") else key
    if key.startswith("multi_modal_projector."):
        _, layer, leaf = key.split(".")
        return f"model.mm_projector.{THEIRS[layer]}.{leaf}"
    if key.startswith("vision_tower."):
        return "model.vision_tower.vision_tower.vision_model." + key.split("vision_tower.")[1].removeprefix(
            "vision_model."
        )
    if key == "image_newline":
        return "model.image_newline"
    return (
        key.removeprefix("language_model.")
        if "lm_head" in key or "model.model" in key
        else ("model." + key.removeprefix("language_model."))
    )


def make(folder: Path, **changes: Any) -> tuple[Any, Any, Path, dict[str, torch.Tensor]]:
    """Transformers' model and processor, and the same weights as a folder of LLaVA's own."""
    theirs = make_llava_hf(folder / "hf", tokens="llama_legacy", tiled=True)
    processor = AutoProcessor.from_pretrained(folder / "hf", backend="pil")
    out = folder / "llava"
    out.mkdir()
    text = theirs.config.text_config.to_dict()
    anyres = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    pinpoints = {"image_grid_pinpoints": [[w, h] for h, w in CANVASES]}
    told = {**text, **FIELDS, **anyres, **pinpoints, "mm_vision_tower": str(folder / "tower"), **changes}
    (out / "config.json").write_text(json.dumps(told))
    processor.tokenizer.save_pretrained(out)
    state = {names(k): v for k, v in load_file(folder / "hf" / "model.safetensors").items()}
    (folder / "tower").mkdir()
    theirs.config.vision_config.save_pretrained(folder / "tower")
    mark = "model.vision_tower.vision_tower."
    tower = {k.removeprefix(mark): v.clone() for k, v in state.items() if k.startswith(mark)}
    save_file(tower, folder / "tower" / "model.safetensors", {"format": "pt"})
    torch.save(state, out / "pytorch_model.bin")
    return theirs, processor, out, state


def ours(model: Any, asked: Talk) -> tuple[torch.Tensor, list[int]]:
    preparation = prepare_images(model.image, tokens=model.vlm.image_tokens, grid=model.vlm.image_grid)
    ids = encode(asked, model.chat_format, model.tokenizer, generate=True).ids
    return logits_of(model.vlm, ids, asked, preparation=preparation), list(ids)


def test_logits_are_those_of_the_same_weights_in_llava_next(tmp_path: Path) -> None:
    _, _, folder, _ = make(tmp_path)
    model = mmit.load(folder, device="cpu", chat="vicuna_v1")
    same = mmit.load(tmp_path / "hf", device="cpu", chat="vicuna_v1")  # shown equal to transformers elsewhere
    for size in SIZES:
        shown = PIL.Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).convert("RGB")
        asked: Talk = (Turn("user", (Image(shown), Text("What is it?"))),)
        found, ids = ours(model, asked)
        expected, other = ours(same, asked)
        assert ids == other
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("written", [GRID, "[(48, 16), (16, 32)]"])
def test_canvases_are_width_and_height(tmp_path: Path, written: Any) -> None:
    _, _, folder, _ = make(tmp_path, image_grid_pinpoints=written)
    image = mmit.load(folder, device="cpu", chat="vicuna_v1").image
    preparation = prepare_images(image, tokens=4, grid=(2, 2))
    assert preparation is not None and preparation.tiling((48, 16)).grid == (1, 3)


def test_the_end_of_a_line_is_needed_where_it_is_used(tmp_path: Path) -> None:
    _, _, folder, state = make(tmp_path)
    newline = state.pop("model.image_newline")
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="1 missing: line_end"):
        mmit.load(folder, device="cpu", chat="vicuna_v1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_patch_merge_type": "spatial"}))
    projector = mmit.load(folder, device="cpu", chat="vicuna_v1").vlm.projector
    assert projector is not None and projector.line_end is None
    torch.save({**state, "model.image_newline": newline}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="left over: model.image_newline"):
        mmit.load(folder, device="cpu", chat="vicuna_v1")


def test_beside_an_adapter_it_is_among_the_trainables(tmp_path: Path) -> None:
    _, _, folder, state = make(tmp_path)
    whole = mmit.load(folder, device="cpu", chat="vicuna_v1").vlm
    base = tmp_path / "base"
    whole.llm.save_pretrained(base)  # type: ignore[operator, arg-type]
    mmit.load(folder, device="cpu", chat="vicuna_v1").tokenizer.save_pretrained(base)
    (folder / "pytorch_model.bin").unlink()
    kept = {f"base_model.model.{k}": v for k, v in state.items() if "mm_projector" in k or "newline" in k}
    torch.save(kept, folder / "non_lora_trainables.bin")
    found = mmit.load(folder, device="cpu", chat="vicuna_v1", base=str(base)).vlm
    assert found.projector is not None and whole.projector is not None
    assert torch.equal(found.projector.line_end, whole.projector.line_end)  # type: ignore[arg-type]
