"""LLaVA's own layouts, made here under their documented key names, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import ModelError
from mmit.interop.export import fixed_talks, source_logits
from mmit.interop.foreign import is_foreign, read_foreign
from mmit.models.interop.llava_hf import read_llava_hf
from mmit.models.vlm import VLM
from mmit.train.checkpoint.model import load_model
from tests.interop.llava_models import make_llava_hf
from tests.tiny_run import write_records

FIELDS = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}
THEIRS = {"linear_1": "0", "linear_2": "2"}


def parts(folder: Path, **options: Any) -> tuple[VLM, Any, dict[str, torch.Tensor]]:
    """A model of transformers as the reference: composite, tokenizer, its projector under LLaVA's names."""
    make_llava_hf(folder / "hf", tokens="llama_legacy", **options)
    found = read_llava_hf(folder / "hf")
    weights = load_file(folder / "hf" / "model.safetensors")
    projector = {}
    for key, value in weights.items():
        if key.startswith("multi_modal_projector."):
            _, layer, leaf = key.split(".")
            projector[f"mm_projector.{THEIRS[layer]}.{leaf}"] = value
    tower = {k.removeprefix("vision_tower."): v for k, v in weights.items() if k.startswith("vision_tower.")}
    (folder / "tower").mkdir()
    found.vision_config.save_pretrained(folder / "tower")
    save_file(
        {f"vision_model.{k}": v for k, v in tower.items()}, folder / "tower" / "model.safetensors", {"format": "pt"}
    )
    CLIPImageProcessor().save_pretrained(folder / "tower")  # the constants of both kinds of tower here
    found.vlm.llm.save_pretrained(folder / "base")  # type: ignore[operator, arg-type]
    found.tokenizer.save_pretrained(folder / "base")
    return found.vlm, found.tokenizer, projector


def write_config(folder: Path, source: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    text = json.loads((source / "base" / "config.json").read_text())
    told = {**text, **FIELDS, "mm_vision_tower": str(source / "tower"), **changes}
    (folder / "config.json").write_text(json.dumps(told))


def compare(found: Any, vlm: VLM, tokenizer: Any) -> None:
    assert len(fixed_talks(found.chat)) == 4
    ours = source_logits(found.vlm, found.tokenizer, found.chat, found.image)
    for a, b in zip(ours, source_logits(vlm, tokenizer, found.chat, found.image), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_projector_alone(tmp_path: Path) -> None:
    vlm, tokenizer, projector = parts(tmp_path)
    out = tmp_path / "llava"
    write_config(out, tmp_path)
    torch.save({f"model.{k}": v for k, v in projector.items()}, out / "mm_projector.bin")
    assert is_foreign(out)
    compare(read_foreign(out, chat="vicuna_v1", base=str(tmp_path / "base")), vlm, tokenizer)
    with pytest.raises(ModelError, match="belongs to a base"):
        read_foreign(out, chat="vicuna_v1")
    with pytest.raises(ModelError, match="--chat vicuna_v1"):
        read_foreign(out, base=str(tmp_path / "base"))
    torch.save({"model.mm_projector.0.weight": projector["mm_projector.0.weight"]}, out / "mm_projector.bin")
    with pytest.raises(ModelError, match=r"3 missing: 0\.bias, 2\.bias, 2\.weight"):
        read_foreign(out, chat="vicuna_v1", base=str(tmp_path / "base"))


@pytest.mark.parametrize("own_tower", [False, True])
def test_whole_model(tmp_path: Path, own_tower: bool) -> None:
    vlm, tokenizer, projector = parts(tmp_path)
    out = tmp_path / "llava"
    write_config(out, tmp_path)
    tokenizer.save_pretrained(out)
    state = {k: v.clone() for k, v in vlm.llm.state_dict().items()}
    state.update({f"model.{k}": v for k, v in projector.items()})
    if own_tower:  # fine-tuned: it must not be replaced by the stock one
        tower = load_file(tmp_path / "tower" / "model.safetensors")
        tower["vision_model.pre_layrnorm.bias"] += 1.0
        state.update({f"model.vision_tower.vision_tower.{k}": v for k, v in tower.items()})
        assert vlm.vision is not None
        with torch.no_grad():
            dict(vlm.vision.encoder.named_parameters())["model.pre_layrnorm.bias"].add_(1.0)
    torch.save(state, out / "pytorch_model.bin")
    compare(read_foreign(out, chat="vicuna_v1"), vlm, tokenizer)
    torch.save({**state, "model.image_newline": torch.zeros(16)}, out / "pytorch_model.bin")
    with pytest.raises(ModelError, match="left over: model.image_newline"):
        read_foreign(out, chat="vicuna_v1")


def test_lora(tmp_path: Path) -> None:
    vlm, tokenizer, projector = parts(tmp_path)
    out = tmp_path / "llava"
    torch.manual_seed(0)
    tuned: Any = get_peft_model(vlm.llm, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(str(out), save_embedding_layers=False)
    write_config(out, tmp_path)
    torch.save({f"base_model.model.model.{k}": v for k, v in projector.items()}, out / "non_lora_trainables.bin")
    found = read_foreign(out, chat="vicuna_v1", base=str(tmp_path / "base"))
    compare(found, VLM(tuned.merge_and_unload(), vision=vlm.vision, projector=vlm.projector), tokenizer)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type 'flat'"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}, "image_grid_pinpoints is None"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_projector_type": "identity"}, "mm_projector_type is 'identity'"),
        ({"hidden_size": 64}, "hidden_size 64 instead of 16"),
    ],
)
def test_what_mmit_does_not_compute_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    _, _, projector = parts(tmp_path)
    out = tmp_path / "llava"
    write_config(out, tmp_path, **changes)
    torch.save({f"model.{k}": v for k, v in projector.items()}, out / "mm_projector.bin")
    with pytest.raises(ModelError, match=problem):
        read_foreign(out, chat="vicuna_v1", base=str(tmp_path / "base"))


def test_an_import_starts_from_llavas_files(tmp_path: Path) -> None:
    vlm, tokenizer, projector = parts(tmp_path)
    out = tmp_path / "llava"
    write_config(out, tmp_path)
    torch.save({f"model.{k}": v for k, v in projector.items()}, out / "mm_projector.bin")
    options = ["--chat", "vicuna_v1", "--base", str(tmp_path / "base")]
    result = CliRunner().invoke(app, ["import-model", str(out), str(tmp_path / "start"), *options])
    assert result.exit_code == 0, result.output
    compare(load_model(tmp_path / "start", device="cpu"), vlm, tokenizer)


def test_chat_and_eval_take_a_projector_with_its_base(tmp_path: Path) -> None:
    _, _, projector = parts(tmp_path)
    out = tmp_path / "llava"
    write_config(out, tmp_path)
    torch.save({f"model.{k}": v for k, v in projector.items()}, out / "mm_projector.bin")
    options = ["--chat", "vicuna_v1", "--base", str(tmp_path / "base"), "--device", "cpu"]
    asked = CliRunner().invoke(app, ["chat", str(out), *options, "--prompt", "What?", "--max-new-tokens", "3"])
    assert asked.exit_code == 0, asked.output
    data = write_records(tmp_path / "data", count=2, text_only=0)
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps({"name": "colours", "records": str(data), "metric": "exact", "max_new_tokens": 3}))
    told = ["eval", str(out), *options, "--task", str(task), "--out", str(tmp_path / "scores"), "--probe", "none"]
    scored = CliRunner().invoke(app, told)
    assert scored.exit_code == 0, scored.output
    assert list((tmp_path / "scores").rglob("*.json"))
    bare = CliRunner().invoke(app, ["chat", str(out), "--chat", "vicuna_v1", "--prompt", "What?"])
    assert bare.exit_code != 0
