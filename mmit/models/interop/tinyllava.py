"""TinyLLaVA folders (`TinyLlavaForConditionalGeneration`), read into a composite.

Goes in: a Hugging Face folder of TinyLLaVA Factory, with language model, tower and connector in its weights. Comes
out: the composite, its tokenizer, and how its pictures are prepared. Refuses connectors other than linear and
mlpNx_gelu, SigLIP towers under `patch` (TinyLLaVA drops their first patch as if it were a class token), and what a
LLaVA folder is refused for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerBase

from mmit.errors import ModelError, nearest
from mmit.models.interop.llava import own_tower, picture_fit, projector_depth
from mmit.models.interop.llava_hf import language_model
from mmit.models.interop.tensors import fill_module, folder_tensors, split_by_prefix
from mmit.models.llm import load_tokenizer
from mmit.models.projectors import build_projector
from mmit.models.vision import build_vision
from mmit.models.vision_encoder import explained
from mmit.models.vlm import VLM

PREFIXES = (
    ("language_model.", "llm", ""),
    ("vision_tower._vision_tower.vision_model.", "vision", ""),
    ("vision_tower._vision_tower.", "vision", ""),
    ("connector._connector.", "projector", ""),
)


def tinyllava_config(folder: Path) -> dict[str, Any] | None:
    """Return config.json if it declares TinyLLaVA's class, else None."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("model_type") == "tinyllava" else None


def read_tinyllava(
    folder: Path, *, tower: str | None = None, dtype: torch.dtype = torch.float32, **place: Any
) -> tuple[VLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """Read a folder of TinyLLaVA.

    Args:
        folder: holds config.json, weights and tokenizer.
        tower: hub id or folder in place of config.json's `vision_model_name_or_path`, for its config.
        dtype: number format of the weights.
        place: packed, device_map, offload and quantization of the LLM, see `load_llm`.

    Returns:
        (composite, tokenizer, how pictures are prepared: the arguments of `data.preparation.ImagePreparation`).

    Raises:
        ModelError: the folder is incomplete, or asks for what mmit does not compute.
    """
    config, where = tinyllava_config(folder), str(folder)
    if config is None:
        raise ModelError("its config.json does not declare TinyLLaVA's class", where=where)
    fit = picture_fit(config, where)
    depth = projector_depth(str(config.get("connector_type")), where, field="connector_type")
    name = tower or config.get("vision_model_name_or_path")
    if not name or config.get("vision_model_name_or_path2"):
        raise ModelError(
            "does not name one vision tower (vision_model_name_or_path)",
            where=where,
            remedy="mmit reads models of one CLIP or SigLIP tower; name it with tower",
        )
    parts = split_by_prefix(folder_tensors(folder), PREFIXES, where=where)
    eye = build_vision(
        "hf", name, layer=config.get("vision_feature_layer", -2), select=_select(config, name, where), dtype=dtype
    )
    own_tower(eye, parts["vision"], where)
    llm: Any = language_model(_text(config, where), parts["llm"], dtype=dtype, where=where, **place)
    width = llm.get_input_embeddings().weight.shape[1]
    projector = build_projector("mlp", vision_dim=eye.dim, llm_dim=width, grid=eye.grid, prefix=eye.prefix, depth=depth)
    own = {f"layers.{'0.' if depth == 1 else ''}{key}": value for key, value in parts["projector"].items()}
    fill_module(projector, own, where=f"{where}, connector")
    image = {"size": list(eye.image_size), "interpolation": eye.interpolation, "fill": [int(255 * m) for m in eye.mean]}
    return VLM(llm, vision=eye, projector=projector.to(dtype)), load_tokenizer(where), {**image, **fit}


def _select(config: dict[str, Any], name: str, where: str) -> str:
    """Which tokens are read; "patch" drops the first one there, whatever it is, and "cls_patch" none."""
    told = config.get("vision_feature_select_strategy", "patch")
    with explained(f"hf {name}", remedy="name the tower's folder or hub id with tower"):
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if not kind.startswith("siglip"):
        return told
    if told != "cls_patch":
        raise ModelError(
            f"its vision tower is a '{kind}', whose first token is a patch, and vision_feature_select_strategy "
            f"'{told}' drops the first token",
            where=where,
            remedy="mmit reads TinyLLaVA's SigLIP models that keep all tokens ('cls_patch'), and those with CLIP",
        )
    return "patch"  # there is no class token: all tokens are patches


def _text(config: dict[str, Any], where: str) -> Any:
    text = dict(config.get("text_config") or {})
    kind = text.pop("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"its text_config is of the model_type '{kind}'", where=where, remedy=nearest(kind, list(CONFIG_MAPPING))
        )
    return AutoConfig.for_model(kind, **text)
