"""LLaVA's own folders (`LlavaLlamaForCausalLM` and its kin), read into a composite.

Goes in: a folder with LLaVA's config.json and its weights in one of three layouts: the whole model; `mm_projector.bin`
beside a base; a LoRA adapter and `non_lora_trainables.bin` beside a base. Comes out: the composite with the adapter
merged, and how its pictures are prepared, LLaVA-1.6's tiles (anyres) included. The tower is the one in the shards
where there is one (it may be fine-tuned), else `mm_vision_tower`. Refuses what those fields say that mmit does not
compute: tiles that are not joined to one picture, image start and end tokens, other projectors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedTokenizerBase

from mmit.errors import ModelError
from mmit.models.interop.hf_parts import read_llava_projector
from mmit.models.interop.tensors import complain, fill_module, folder_tensors, split_by_prefix
from mmit.models.llm import load_llm, load_tokenizer
from mmit.models.projectors import build_projector
from mmit.models.tuning.lora import quietly
from mmit.models.vision import VisionTower, build_vision
from mmit.models.vision_encoder import explained, load_needed
from mmit.models.vlm import VLM

if TYPE_CHECKING:
    from mmit.models.projector_base import Projector

# LLaVA's model_type -> the LLM's
TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_mpt": "mpt"}
PREFIXES = (
    ("model.mm_projector.", "projector", ""),
    ("model.vision_tower.vision_tower.vision_model.", "vision", ""),
    ("model.vision_tower.vision_tower.", "vision", ""),
    ("", "llm", ""),
)

NEWLINE = (("model.image_newline", "newline", ""),)


def declared(folder: Path) -> dict[str, Any] | None:
    """Return config.json if it declares one of LLaVA's own classes, else None."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = " ".join(found.get("architectures") or ())
    mine = found.get("model_type") in TEXT_TYPES and re.search(r"\bLlava\w*ForCausalLM\b", kinds)
    return found if mine and "mm_vision_tower" in found else None


def read_llava(
    folder: Path,
    *,
    base: str | None = None,
    tower: str | None = None,
    dtype: torch.dtype = torch.float32,
    **place: Any,
) -> tuple[VLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """Read a folder of LLaVA.

    Args:
        folder: holds config.json and weights.
        base: the LLM that an adapter or a projector alone belongs to (`--model-base`).
        tower: hub id or folder in place of config.json's `mm_vision_tower`.
        dtype: number format of the weights.
        place: packed, device_map, offload and quantization of the LLM, see `load_llm`.

    Returns:
        (composite, tokenizer, how pictures are prepared: the arguments of `data.preparation.ImagePreparation`).

    Raises:
        ModelError: the folder is incomplete, does not fit its base, or asks for what mmit does not compute.
    """
    config, where = declared(folder), str(folder)
    if config is None:
        raise ModelError("its config.json declares none of LLaVA's classes", where=where)
    fit = picture_fit(config, where)
    line_end = fit.get("tiles", {}).get("line_ends", False)
    read = {
        "layer": config.get("mm_vision_select_layer", -2),
        "select": config.get("mm_vision_select_feature", "patch"),
    }
    vision = build_vision("hf", tower or config["mm_vision_tower"], dtype=dtype, **read)
    rest = next((folder / n for n in ("non_lora_trainables.bin", "mm_projector.bin") if (folder / n).exists()), None)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    if rest is None:
        prefixes = (*NEWLINE, *PREFIXES) if line_end else PREFIXES
        parts = split_by_prefix(folder_tensors(folder), prefixes, where=where)
        llm: Any = _whole_llm(config, parts["llm"], dtype=dtype, where=where, **place)
        # A run that tuned its tower keeps it in the shards; others leave it with its hub id.
        if parts["vision"]:
            own_tower(vision, parts["vision"], where)
        tokenizer = load_tokenizer(where)
    else:
        if base is None:
            problem = f"holds {rest.name}, which belongs to a base"
            raise ModelError(problem, where=where, remedy="name the base with --base")
        llm, tokenizer = _llm_over_base(folder, config, base, dtype=dtype, **place), load_tokenizer(base)
    depth = projector_depth(config.get("mm_projector_type", "linear"), where)
    between: dict[str, Any] = {"vision_dim": vision.dim, "llm_dim": llm.get_input_embeddings().weight.shape[1]}
    between |= {"grid": vision.grid, "prefix": vision.prefix}
    projector = build_projector("mlp", depth=depth, line_end=line_end, **between)
    _fill_projector(projector, rest, parts, depth=depth, where=where)
    image = {"size": list(vision.image_size), "interpolation": vision.interpolation}
    image["fill"] = [int(255 * m) for m in vision.mean]
    return VLM(llm, vision=vision, projector=projector.to(dtype)), tokenizer, {**image, **fit}


def _fill_projector(
    projector: Projector, rest: Path | None, parts: dict[str, dict[str, torch.Tensor]], *, depth: int, where: str
) -> None:
    """Give the projector its weights: from the file beside a base, else from the parts of a whole model."""
    if rest is not None:
        read_llava_projector(rest, projector)
    else:
        # One linear layer has no number in LLaVA's names.
        own = {f"layers.{'0.' if depth == 1 else ''}{key}": value for key, value in parts["projector"].items()}
        if newline := parts.get("newline"):
            own["line_end"] = newline[""]
        fill_module(projector, own, where=f"{where}, mm_projector and image_newline (line_end)")


def _llm_over_base(folder: Path, config: dict[str, Any], base: str, *, dtype: torch.dtype, **place: Any) -> Any:
    """The base, with the folder's adapter merged into it where there is one."""
    where = str(folder)
    llm: Any = load_llm(base, dtype=dtype, **place)
    _same_base(config, llm, base=base, where=where)
    if not (folder / "adapter_config.json").exists():
        return llm
    if place.get("quantization") or place.get("device_map"):
        raise ModelError(
            "its adapter is merged into the LLM, which must be whole and in one place for that",
            where=where,
            remedy="make a model of it first: mmit import-model, then load that",
        )
    with explained(where, remedy="is this the base that the adapter was trained on?"), quietly():
        return PeftModel.from_pretrained(llm, where).merge_and_unload()


def picture_fit(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return mode of the fit, and fill and tiles of anyres. Raises ModelError for fields that mmit cannot honour."""
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect not in ("pad", "square", "anyres"):
        raise ModelError(f"image_aspect_ratio is '{aspect}'", where=where, remedy="mmit reads pad, square and anyres")
    for field in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if config.get(field):
            raise ModelError(f"{field} is set: images stand between tokens of their own", where=where)
    return _tiles(config, where) if aspect == "anyres" else {"mode": {"pad": "pad", "square": "crop"}[aspect]}


def _tiles(config: dict[str, Any], where: str) -> dict[str, Any]:
    """How LLaVA-1.6 cuts a picture. Its canvases are (W, H), as a tiling's are; its padding is black."""
    merge = config.get("mm_patch_merge_type") or "flat"
    if merge not in ("spatial", "spatial_unpad"):
        raise ModelError(
            f"image_aspect_ratio is 'anyres' and mm_patch_merge_type '{merge}'",
            where=where,
            remedy="mmit joins the tiles of a picture: it reads spatial_unpad and spatial",
        )
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise ModelError(
            "keeps the class token, so that its tiles join to no picture",
            where=where,
            remedy="mmit reads mm_vision_select_feature 'patch' with anyres",
        )
    told = config.get("image_grid_pinpoints")
    try:  # training writes the text of its flag: a list of tuples
        found = json.loads(told.translate(str.maketrans("()", "[]"))) if isinstance(told, str) else told
        pinpoints = [[int(width), int(height)] for width, height in found or ()]
    except (ValueError, TypeError):
        pinpoints = []
    if not pinpoints:
        raise ModelError(
            f"image_grid_pinpoints is {told!r}, no list of canvases",
            where=where,
            remedy="give (width, height) in pixels, LLaVA-1.6's are [[336, 672], [672, 336], [672, 672], ...]",
        )
    unpad = merge == "spatial_unpad"
    tiles = {"pinpoints": pinpoints, "unpad": unpad, "line_ends": unpad}
    return {"mode": "any_resolution", "fill": [0, 0, 0], "tiles": tiles}


def projector_depth(kind: str, where: str, *, field: str = "mm_projector_type") -> int:
    """Return how many linear layers a projector has. Raises ModelError for other projectors."""
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind != "linear" and found is None:
        raise ModelError(f"{field} is '{kind}'", where=where, remedy="mmit reads linear and mlpNx_gelu")
    return int(found[1]) if found else 1


def _text_config(config: dict[str, Any]) -> Any:
    kind = TEXT_TYPES[config["model_type"]]
    valid = AutoConfig.for_model(kind).to_dict()
    plain = {k: v for k, v in config.items() if k in valid and k not in ("model_type", "architectures")}
    return AutoConfig.for_model(kind, **plain)


def _whole_llm(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], *, dtype: torch.dtype, where: str, **place: Any
) -> Any:
    from mmit.models.interop.llava_hf import language_model

    text = _text_config(config)
    return language_model(text, tensors, dtype=dtype, where=where, **place)


def _same_base(config: dict[str, Any], llm: Any, *, base: str, where: str) -> None:
    told = {key: config.get(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    other = {key: (value, getattr(llm.config, key, None)) for key, value in told.items() if value is not None}
    wrong = [f"{key} {a} instead of {b}" for key, (a, b) in other.items() if a != b]
    if wrong:
        raise ModelError(f"does not belong to {base}: it was trained with {', '.join(wrong)}", where=where)


def own_tower(vision: VisionTower, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Put the folder's own tower, which may be fine-tuned, in place of the stock one."""
    core = getattr(vision.encoder.model, "vision_model", vision.encoder.model)
    needed = core.state_dict()
    complain("its vision tower is not whole", missing=needed.keys() - tensors.keys(), where=where)
    load_needed(core, tensors, full={key: value.shape for key, value in tensors.items()}, where=where)
