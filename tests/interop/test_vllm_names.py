"""The names of an export, put through vLLM's documented renaming, are those of the modules of its LLaVA classes.

Needs no vLLM: the renaming is the one its source states for checkpoints of transformers before and after 4.52
(`hf_to_vllm_mapper` of LlavaForConditionalGeneration and LlavaNextForConditionalGeneration).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mmit
from mmit.interop.export import Companions, export_llava_hf
from tests.interop.llava_models import make_llava_hf

RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
MODULES = re.compile(
    r"language_model\.(model\.(embed_tokens|norm|layers\.\d+\..+)|lm_head)\.weight"
    r"|vision_tower\.vision_model\.(embeddings|pre_layrnorm|post_layernorm|encoder\.layers\.\d+)\..+"
    r"|multi_modal_projector\.linear_[12]\.(weight|bias)|image_newline"
)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_every_name_has_its_module(tmp_path: Path, tower: str, tiled: bool) -> None:
    make_llava_hf(tmp_path / "in", tower=tower, tokens="llama", tiled=tiled)
    model = mmit.load(tmp_path / "in", device="cpu")
    out = tmp_path / "out"
    out.mkdir()
    beside = Companions(model.tokenizer, model.chat_format, model.image, model.end_ids)
    export_llava_hf(out, model.vlm, beside)
    names = set()
    for key in load_file(out / "model.safetensors"):
        old = next((prefix for prefix in RENAMED if key.startswith(prefix)), "")
        names.add(RENAMED.get(old, "") + key.removeprefix(old))
    assert not [name for name in names if not MODULES.fullmatch(name)]
    assert ("image_newline" in names) == tiled
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [f"Llava{'Next' if tiled else ''}ForConditionalGeneration"]
    # Its loader cuts the tower by these and asks for one strategy of two.
    assert config["vision_feature_layer"] == -1 and config["vision_feature_select_strategy"] in ("default", "full")
    assert {"text_config", "vision_config", "image_token_index"} <= config.keys()
    assert (out / "processor_config.json").exists() and (out / "tokenizer.json").exists()
