"""Models of other projects, ready for use: the one door that tells their layouts apart.

Goes in: a folder. Comes out: its model with tokenizer, chat format and picture preparation, as mmit's own parts. A
layout is told by what the folder declares (config.json), never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmit.data.chat import ChatFormat, chat_format
from mmit.errors import ConfigError, ModelError, nearest
from mmit.models.generation import read_generation
from mmit.models.interop.hf_towers import held_towers
from mmit.models.interop.llava import declared, read_llava
from mmit.models.interop.llava_hf import LlavaHF, is_llava_hf, read_llava_hf
from mmit.models.interop.prismatic import prismatic_config, read_prismatic
from mmit.models.interop.tinyllava import read_tinyllava, tinyllava_config
from mmit.models.llm import usable_device

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

__all__ = ["Foreign", "check_options", "is_foreign", "read_foreign", "settle"]

OPTIONS = ("chat", "base", "tower")
# what tells a layout by its config.json -> what reads it
READERS_BY_CONFIG: dict[Callable[[Path], Any], Callable[..., Any]] = {
    declared: read_llava,
    tinyllava_config: read_tinyllava,
    prismatic_config: read_prismatic,
}


@dataclass
class Foreign:
    """A model read from another project's folder.

    `image` are the arguments of `data.images.fit`. The rest is for an import: each encoder of the tower as a class of
    transformers has it (the error that says why there is none, for encoders of other kinds), the options of
    `model.vision` that read it, and the number format of the weights.
    """

    vlm: VLM
    tokenizer: Any
    chat: ChatFormat
    image: dict[str, Any]
    towers: list[tuple[Any, dict[str, torch.Tensor]]] | ModelError
    vision_options: dict[str, Any]
    dtype: torch.dtype


def is_foreign(folder: Path) -> bool:
    """Tell whether a folder declares a layout that `read_foreign` takes."""
    return is_llava_hf(folder) or any(told(folder) is not None for told in READERS_BY_CONFIG)


def read_foreign(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    chat: str | None = None,
    base: str | None = None,
    tower: str | None = None,
    **place: Any,
) -> Foreign:
    """Read a folder of another project.

    Args:
        folder: a llava-hf folder, one of LLaVA's own, TinyLLaVA's, or a run folder of prismatic-vlms.
        dtype: number format; None takes the folder's own, of LLaVA's own float32.
        chat: a chat format in place of the folder's chat template.
        base: the LLM that an adapter or projector of LLaVA's, or a Prismatic VLM, belongs to.
        tower: hub id or folder in place of the vision tower that the folder names; of Prismatic, a timm name.
        place: packed, device_map, offload and quantization of the LLM, see `models.llm.load_llm`.

    Raises:
        ModelError: the layout is unknown or the folder incomplete. ConfigError: its chat template cannot be used.
    """
    if is_llava_hf(folder):
        found = read_llava_hf(folder, dtype=dtype, **place)
        read_generation(found.vlm.llm, folder)
        _need_chat(chat or found.chat_template, folder)
        form = chat_format(chat, found.tokenizer) if chat else _template_format(found)
        whole: Any = [(found.vision_config, found.vision_state)]
        return Foreign(found.vlm, found.tokenizer, form, found.image, whole, found.vision_options, found.dtype)
    read = next((read for told, read in READERS_BY_CONFIG.items() if told(folder) is not None), None)
    if read is not None:
        _need_chat(chat, folder)
        dtype = dtype or torch.float32
        if read is not read_tinyllava:  # all of a TinyLLaVA is in its folder
            place["base"] = base
        vlm, tokenizer, image = read(folder, tower=tower, dtype=dtype, **place)
        read_generation(vlm.llm, folder)
        vision = vlm.vision
        assert vision is not None and chat is not None
        select = "cls_patch" if vision.prefix else "patch"
        options = {"layer": -1, "select": select, "fit": image["mode"], "tiles": image.get("tiles", {})}
        try:
            whole = held_towers(vision)
        except ModelError as error:
            whole = error  # of no consequence to a model that only answers
        return Foreign(vlm, tokenizer, chat_format(chat, tokenizer), image, whole, options, dtype)
    raise ModelError(
        "its config.json declares no layout that mmit reads",
        where=str(folder),
        remedy="mmit reads llava-hf folders (LlavaForConditionalGeneration), LLaVA's own (Llava...ForCausalLM), "
        "TinyLLaVA's and run folders of prismatic-vlms",
    )


def check_options(given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the options of a folder's reading that have a value. Raises ConfigError for unknown ones."""
    for name in given:
        if name not in OPTIONS:
            raise ConfigError(f"unknown option '{name}'", where="load", remedy=nearest(name, OPTIONS))
    return {name: value for name, value in given.items() if value is not None}


def settle(found: Foreign, *, device: str, device_map: Any) -> None:
    """Freeze a model and bring its parts where they compute; a device map has placed the LLM already."""
    vlm = found.vlm.requires_grad_(False)
    place = usable_device(device)
    for part in (vlm.vision, vlm.projector, vlm.llm if device_map is None else None):
        if part is not None:
            part.to(place if device_map is None else vlm.device)  # type: ignore[arg-type]


def _need_chat(chat: str | None, folder: Path) -> None:
    if not chat:
        raise ModelError(
            "has no chat template",
            where=str(folder),
            remedy="name the format it was trained with: --chat vicuna_v1 (LLaVA-1.5) of import-model, chat and eval, "
            "or mmit.load(..., chat='vicuna_v1')",
        )


def _template_format(found: LlavaHF) -> ChatFormat:
    """Make the chat format of a folder's own template, with the ids that its processor gives."""
    assert found.chat_template is not None
    known = found.image_token if found.image_token in found.chat_template else None
    told = {"name": "hf", "template": found.chat_template, "image_token": known, "as_processor": True}
    return ChatFormat.from_json(told, found.tokenizer)
