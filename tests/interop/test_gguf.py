"""Models as GGUF files: what the files hold, and what is refused before anything is written.

Tensors, LLMs and tokenizers have tests of their own in tests/models/interop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmit.data.chat import chat_format
from mmit.errors import ModelError
from mmit.interop.export import Companions
from mmit.interop.gguf import check_gguf, export_gguf
from mmit.interop.templates import TEMPLATES
from mmit.models.interop.gguf_file import TYPES, rounding
from mmit.models.interop.holds import check_export
from mmit.models.tuning import apply_tuning
from mmit.models.vision import build_vision
from tests.data.small_tokenizers import FAMILIES as TOKENIZERS
from tests.data.small_tokenizers import byte_level
from tests.interop.test_holds import sections
from tests.interop.test_llava_hf_write import SIGLIP, composite
from tests.tiny_run import CHATML

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
WIDE: dict[str, Any] = {  # rows of whole blocks
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def llama(tokenizer: Any, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **WIDE, "vocab_size": len(tokenizer) + 3, **changes}


def image_of(vlm: Any, **changes: Any) -> dict[str, Any]:
    size = list(vlm.vision.image_size)
    return {"size": size, "mode": "pad", "interpolation": "bicubic", "fill": [127, 127, 127], **changes}


def seeing(tokenizer: Any, **changes: Any) -> Any:
    """A model whose tower llama.cpp has."""
    return composite(tokenizer, build_vision("hf", SIGLIP), **changes)


def written(
    folder: Path, vlm: Any, tokenizer: Any, *, chat: str = CHATML, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Export and open the files: ({name: tensor} of each file, what the export says)."""
    folder.mkdir()
    form = chat_format(chat, tokenizer)
    ends = (*form.end_ids[-1:], tokenizer.eos_token_id)
    image = image_of(vlm) if vlm.vision is not None else {}
    found = export_gguf(folder, vlm, Companions(tokenizer, form, image, ends), **options)
    return found, {path.name: gguf.GGUFReader(path) for path in found.files}


def numbers(reader: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("dtype", ["fp16", "q8_0"])
def test_the_files_hold_the_weights_of_the_model(tmp_path: Path, dtype: str) -> None:
    tokenizer = byte_level()
    vlm = seeing(tokenizer, llm=llama(tokenizer, initializer_range=0.1))
    frozen = {"mode": "frozen", "lr": None, "options": {}}
    lora = {"mode": "lora", "lr": 1e-3, "options": {"r": 2}}
    apply_tuning(vlm, {"vision": frozen, "projector": frozen, "llm": lora})
    for name, weight in vlm.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    found, files = written(tmp_path / "out", vlm, tokenizer, dtype=dtype, name="small")
    assert found.logits is not None and found.logits.logits <= found.logits.limit
    assert list(files) == [f"small-{dtype}.gguf", "mmproj-small-fp16.gguf"]
    held, state = numbers(files[f"small-{dtype}.gguf"]), vlm.llm.state_dict()  # merged by now
    assert "lora" not in str(list(state))
    weight = state["model.layers.1.self_attn.k_proj.weight"].numpy()
    back = held["blk.1.attn_k.weight"].reshape(2, 8, 2, 64).swapaxes(1, 2).reshape(32, 64)  # heads, pairs, which half
    shuffled = weight.reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64)
    limit = rounding(shuffled, TYPES[dtype].replace("FP", "F"))
    assert (np.abs(back - weight) <= limit.reshape(2, 8, 2, 64).swapaxes(1, 2).reshape(32, 64)).all()
    assert not np.allclose(held["blk.1.attn_k.weight"], weight, atol=0.05)
    down = state["model.layers.0.mlp.down_proj.weight"].numpy()
    assert (np.abs(held["blk.0.ffn_down.weight"] - down) <= rounding(down, TYPES[dtype])).all()
    assert (held["blk.0.attn_norm.weight"] == state["model.layers.0.input_layernorm.weight"].numpy()).all()
    assert held["token_embd.weight"].shape == tuple(state["model.embed_tokens.weight"].shape)


def test_the_projector_file_holds_tower_projector_and_preparation(tmp_path: Path) -> None:
    tokenizer = byte_level()
    vlm = seeing(tokenizer)
    _, files = written(tmp_path / "out", vlm, tokenizer, name="m")
    reader = files["mmproj-m-fp16.gguf"]
    assert value(reader, "general.architecture") == "clip"
    assert value(reader, "clip.projector_type") == "janus_pro" and value(reader, "clip.use_gelu") is True
    assert value(reader, "clip.vision.image_size") == 16 and value(reader, "clip.vision.patch_size") == 8
    assert value(reader, "clip.vision.block_count") == 2  # those that run: the model is read at -2 of three
    assert value(reader, "clip.vision.image_mean") == pytest.approx(vlm.vision.mean)
    held = numbers(reader)
    assert held["v.patch_embd.weight"].shape == (8, 3, 8, 8)
    assert held["v.position_embd.weight"].shape == (4, 8)
    assert (held["mm.1.bias"] == vlm.projector.state_dict()["layers.2.bias"].numpy()).all()
    layers = [name for name in held if name.startswith("v.blk.")]
    assert len(layers) == 2 * 16


def test_the_file_says_what_the_tokenizer_is(tmp_path: Path) -> None:
    tokenizer = byte_level()
    vlm = seeing(tokenizer)
    _, files = written(tmp_path / "out", vlm, tokenizer, name="m", llm_only=True)
    assert list(files) == ["m-fp16.gguf"]
    reader = files["m-fp16.gguf"]
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert tokens[tokenizer.eos_token_id] == "<|eos|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert value(reader, "tokenizer.ggml.eos_token_id") == end and types[end] == 3
    assert value(reader, "tokenizer.ggml.eot_token_id") == tokenizer.eos_token_id
    assert types[tokenizer.convert_tokens_to_ids("<tool>")] == 4
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges")[:3] == [" ".join(pair) for pair in merges[:3]]
    assert "im_start" in value(reader, "tokenizer.chat_template")
    assert value(reader, "tokenizer.ggml.add_bos_token") is False


@pytest.mark.parametrize("tokens", ["byte_level", "llama_legacy"])
@pytest.mark.parametrize("chat", ["chatml", "vicuna_v1", "qa"])
def test_every_chat_format_becomes_a_template_with_the_ids_of_training(tmp_path: Path, chat: str, tokens: str) -> None:
    tokenizer = TOKENIZERS[tokens]()
    vlm = seeing(tokenizer)
    assert written(tmp_path / "out", vlm, tokenizer, chat=chat, name="m", dtype="fp32")[0].files


def test_a_template_with_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    monkeypatch.setitem(TEMPLATES, "qa", "{{ 'other' }}")
    with pytest.raises(ModelError, match="llama.cpp makes other tokens of a prompt"):
        written(tmp_path / "out", seeing(tokenizer), tokenizer, chat="qa")


@pytest.mark.parametrize(
    ("tower", "changes", "told"),
    [
        ({}, {"mode": "resize"}, "pads them with the colour"),
        ({}, {"fill": [122, 116, 104]}, r"colour \(127, 127, 127\), and .*122"),
        ({}, {"interpolation": "bilinear"}, "by bicubic"),
        ({"model_type": "clip_vision_model"}, {}, "class token"),
        ({"layer": [-1, 1]}, {}, "reads one layer"),
        ({"hidden_act": "relu"}, {}, "activation is relu"),
    ],
)
def test_other_towers_and_pictures_are_refused(tower: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    tokenizer = byte_level()
    built = {key: tower.pop(key) for key in ("select", "layer") if key in tower}
    vlm = composite(tokenizer, build_vision("hf", {**SIGLIP, **tower}, **built))
    with pytest.raises(ModelError, match=told) as caught:
        check_gguf(vlm, tokenizer, image_of(vlm, **changes), llm_only=False)
    assert "--llm-only" in caught.value.remedy
    check_gguf(vlm, tokenizer, image_of(vlm, **changes), llm_only=True)


def test_the_encoder_of_the_quickstart_is_refused_with_what_would_work() -> None:
    pytest.importorskip("timm")
    tokenizer = byte_level()
    with torch.device("meta"):
        eye = build_vision("timm", "efficientnet_lite0", weights=False)
    vlm = composite(tokenizer)
    vlm.vision = eye
    with pytest.raises(ModelError, match=r"SigLIP's vision transformer, and of .*: its network is") as caught:
        check_gguf(vlm, tokenizer, image_of(vlm), llm_only=False)
    assert "--llm-only" in caught.value.remedy and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vision__kind": "fused"}, "no tower of kind fused"),
        ({"vision__fit": "resize"}, "pads pictures to a square"),
        ({"vision__fit": "pad", "projector__kind": "resampler"}, "two linear layers"),
        ({"vision__fit": "pad", "llm__mode": "houlsby", "llm__options": {}}, "not linear"),
    ],
)
def test_the_config_alone_refuses(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    model, tune = sections(tmp_path, **changes)
    with pytest.raises(ModelError, match=told):
        check_export("gguf", model, tune, None)
    if "llm__mode" not in changes:
        check_export("gguf", model, tune, None, llm_only=True)
