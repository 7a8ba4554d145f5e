"""Small random llava-hf folders, made by transformers itself."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipVisionConfig,
)

from tests.data.small_tokenizers import FAMILIES

SIDE, PATCH = 16, 8
CANVASES = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]  # of LLaVA-NEXT, (height, width)
# As llava-hf's own, which take lists of parts.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% elif m['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_llava_hf(
    folder: Path,
    *,
    tower: str = "clip",
    tokens: str = "byte_level",
    width: int = 16,
    tiled: bool = False,
    **options: Any,
) -> Any:
    """Save a random model with its processor; `options` go to its config. Returns the model, in float32.

    `tiled` makes it a LLaVA-NEXT. What was made once is copied.
    """
    model, files = _made(tower, tokens, width, tiled, json.dumps(options, sort_keys=True))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    torch.manual_seed(0)
    return copy.deepcopy(model)


@functools.cache
def _made(tower: str, tokens: str, width: int, tiled: bool, more: str) -> tuple[Any, dict[str, bytes]]:
    """The model and its files."""
    tokenizer = FAMILIES[tokens]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.pad_token = tokenizer.eos_token
    clip = tower == "clip"
    eye = (CLIPVisionConfig if clip else SiglipVisionConfig)(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        **({} if clip else {"vision_use_head": False}),
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings: dict[str, Any] = {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if clip else "full",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        **json.loads(more),
    }
    torch.manual_seed(0)
    if tiled:
        config: Any = LlavaNextConfig(vision_config=eye, text_config=text, image_grid_pinpoints=CANVASES, **settings)
        model: Any = LlavaNextForConditionalGeneration(config).eval()
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=eye, text_config=text, **settings)).eval()
    with torch.no_grad():  # norms and biases at their initial values would hide a missing one
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "vision" in name or "projector" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    edge: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if tiled:
        edge["image_grid_pinpoints"] = CANVASES
    processor = (LlavaNextProcessor if tiled else LlavaProcessor)(
        (LlavaNextImageProcessor if tiled else CLIPImageProcessor)(**edge),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        num_additional_image_tokens=int(clip),
        chat_template=TEMPLATE,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return model, {path.name: path.read_bytes() for path in Path(folder).iterdir()}
