"""Models of other projects, ready for use: the one door that tells their layouts apart.

Goes in: a folder. Comes out: its model with tokenizer, chat format and picture preparation, as mmit's own parts. A
layout is told by what the folder declares (config.json), never by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmit.data.chat import ChatFormat, chat_format
from mmit.errors import ModelError
from mmit.models.interop.llava_hf import LlavaHF, is_llava_hf, read_llava_hf
from mmit.models.vlm import VLM

__all__ = ["Foreign", "is_foreign", "read_foreign"]


@dataclass
class Foreign:
    """A model read from another project's folder. `source` holds what only an import needs."""

    vlm: VLM
    tokenizer: Any
    chat: ChatFormat
    image: dict[str, Any]  # arguments of `data.images.fit`
    source: LlavaHF


def is_foreign(folder: Path) -> bool:
    """Tell whether a folder declares a layout that `read_foreign` takes."""
    return is_llava_hf(folder)


def read_foreign(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    packed: bool = True,
    chat: str | None = None,
) -> Foreign:
    """Read a folder of another project.

    Args:
        folder: a llava-hf folder.
        dtype: number format; None takes the folder's own.
        device_map: placement of the LLM, handed to transformers.
        packed: see `models.llm.load_llm`.
        chat: a chat format in place of the folder's chat template.

    Raises:
        ModelError: the layout is unknown or the folder incomplete. ConfigError: its chat template cannot be used.
    """
    if not is_foreign(folder):
        raise ModelError(
            "its config.json declares no layout that mmit reads",
            where=str(folder),
            remedy="mmit reads llava-hf folders (model_type llava, LlavaForConditionalGeneration)",
        )
    found = read_llava_hf(folder, dtype=dtype, device_map=device_map, packed=packed)
    if chat is None and not found.chat_template:
        raise ModelError(
            "has no chat template",
            where=str(folder),
            remedy="name the format it was trained with, e.g. --chat vicuna_v1 (LLaVA-1.5)",
        )
    if chat is None:
        form = _template_format(found)
        found.tokenizer.chat_template = form.to_json()["template"]
    else:
        form = chat_format(chat, found.tokenizer)
    return Foreign(found.vlm, found.tokenizer, form, found.image, found)


def _template_format(found: LlavaHF) -> ChatFormat:
    """Make the chat format of a folder's own template, with the ids that its processor gives."""
    assert found.chat_template is not None
    known = found.image_token if found.image_token in found.chat_template else None
    told = {"name": "hf", "template": found.chat_template, "image_token": known, "as_processor": True}
    return ChatFormat.from_json(told, found.tokenizer)
