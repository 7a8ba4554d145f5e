"""Run folders of prismatic-vlms (Karamcheti et al., arXiv:2402.07865), read into a composite.

Goes in: `config.json` and `checkpoints/latest-checkpoint.pt` (projector, and the LLM where it was trained), with the
LLM's base for config and tokenizer. Comes out: the composite, its tokenizer, and how its pictures are prepared. The
tower is timm's of the same name, or the file's own where it was trained. Refuses fused towers and projectors, towers
that are neither CLIP nor SigLIP, and a base that does not belong to the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mmit.errors import ModelError, nearest
from mmit.models.files import load_pickle
from mmit.models.interop.llava import own_tower
from mmit.models.interop.llava_hf import language_model
from mmit.models.interop.tensors import complain, fill_module, split_by_prefix
from mmit.models.llm import load_llm, load_tokenizer
from mmit.models.projectors import build_projector
from mmit.models.vision import VisionTower, build_vision
from mmit.models.vlm import VLM

# vision_backbone_id -> timm's model. Prismatic asks for QuickGELU by an option, which timm has in the name; without
# a tag, timm's SigLIP names stand for SigLIP 2 by now.
TOWERS = {
    "clip-vit-b": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip-vit-l": "vit_large_patch14_clip_quickgelu_224.openai",
    "clip-vit-l-336px": "vit_large_patch14_clip_quickgelu_336.openai",
    "siglip-vit-b16-224px": "vit_base_patch16_siglip_224.webli",
    "siglip-vit-b16-256px": "vit_base_patch16_siglip_256.webli",
    "siglip-vit-b16-384px": "vit_base_patch16_siglip_384.webli",
    "siglip-vit-so400m": "vit_so400m_patch14_siglip_224.webli",
    "siglip-vit-so400m-384px": "vit_so400m_patch14_siglip_384.webli",
}
# Prismatic scales this tower's pictures to 248 pixels and cuts 224 out, unless it stretches them.
ONLY_STRETCHED = ("clip-vit-b",)
FITS = {"letterbox": "pad", "resize-crop": "crop", "resize-naive": "resize"}
DEPTHS = {"linear": 1, "gelu-mlp": 2}
CHECKPOINT = "checkpoints/latest-checkpoint.pt"


def prismatic_config(folder: Path) -> dict[str, Any] | None:
    """Return the `model` entry of config.json if it describes a Prismatic VLM, else None."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    told = found.get("model") if isinstance(found, dict) else None
    return told if isinstance(told, dict) and {"vision_backbone_id", "arch_specifier"} <= told.keys() else None


def read_prismatic(
    folder: Path, *, base: str | None = None, tower: str | None = None, dtype: torch.dtype = torch.float32, **place: Any
) -> tuple[VLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """Read a run folder of prismatic-vlms.

    Args:
        folder: holds config.json and checkpoints/latest-checkpoint.pt.
        base: folder or hub id of the LLM (`llm_backbone_id`): its config and tokenizer, and its weights where the
            checkpoint has none (stage align).
        tower: timm name (`local-dir:/folder`, `hf-hub:org/repo`) with the weights of the same architecture.
        dtype: number format of the weights.
        place: packed, device_map, offload and quantization of the LLM, see `load_llm`.

    Returns:
        (composite, tokenizer, how pictures are prepared: the arguments of `data.preparation.ImagePreparation`).
        A letterboxed picture whose sides differ by an odd number is padded to a pixel less there.

    Raises:
        ModelError: the folder is incomplete, does not fit its base, or asks for what mmit does not compute.
    """
    config, where = prismatic_config(folder), str(folder)
    if config is None:
        raise ModelError("its config.json describes no Prismatic VLM", where=where)
    mode, depth = _fit(config, where), _depth(str(config["arch_specifier"]), where)
    name = _tower_name(config, where)
    if base is None:
        raise ModelError(
            f"names its language model '{config.get('llm_backbone_id')}', which is not in the folder",
            where=where,
            remedy="name the folder or hub id of that model with --base",
        )
    parts = _checkpoint(folder)
    eye = _tower(name, tower, parts.get("vision_backbone"), dtype=dtype, where=where)
    tokenizer = load_tokenizer(base)
    llm: Any
    if "llm_backbone" in parts:
        llm = _own_llm(parts["llm_backbone"], base, tokenizer=tokenizer, dtype=dtype, where=where, **place)
    else:
        llm = load_llm(base, dtype=dtype, **place)
    width = llm.get_input_embeddings().weight.shape[1]
    projector = build_projector("mlp", vision_dim=eye.dim, llm_dim=width, grid=eye.grid, prefix=eye.prefix, depth=depth)
    front = f"layers.{'0.' if depth == 1 else ''}"
    own = split_by_prefix(parts["projector"], (("projector.", "own", front),), where=f"{where}, projector")["own"]
    fill_module(projector, own, where=f"{where}, projector ({config['arch_specifier']})")
    image = {"size": list(eye.image_size), "interpolation": eye.interpolation, "fill": [int(255 * m) for m in eye.mean]}
    return VLM(llm, vision=eye, projector=projector.to(dtype)), tokenizer, {**image, "mode": mode}


def _fit(config: Mapping[str, Any], where: str) -> str:
    name, tower = str(config.get("image_resize_strategy")), str(config["vision_backbone_id"])
    if name not in FITS:
        raise ModelError(f"image_resize_strategy is '{name}'", where=where, remedy=nearest(name, FITS))
    if tower in ONLY_STRETCHED and name != "resize-naive":
        raise ModelError(
            f"prepares pictures of {tower} with '{name}', which cuts off a margin that mmit keeps",
            where=where,
            remedy="mmit reads models with this tower and resize-naive",
        )
    return FITS[name]


def _depth(name: str, where: str) -> int:
    """How many linear layers an `arch_specifier` means; "no-align+" tells of training alone."""
    kind = name.removeprefix("no-align+")
    if kind not in DEPTHS:
        raise ModelError(
            f"arch_specifier is '{name}'",
            where=where,
            remedy=f"mmit reads {' and '.join(DEPTHS)} over one tower, not fused towers and their projector",
        )
    return DEPTHS[kind]


def _tower_name(config: Mapping[str, Any], where: str) -> str:
    name = str(config["vision_backbone_id"])
    if name not in TOWERS:
        raise ModelError(
            f"vision_backbone_id is '{name}', and mmit reads models of one CLIP or SigLIP tower",
            where=where,
            remedy=nearest(name, TOWERS),
        )
    return TOWERS[name]


def _checkpoint(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of the checkpoint by their name. Raises ModelError for a file of another layout."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ModelError(f"holds no {CHECKPOINT}", where=str(folder), remedy="fetch the folder again")
    loaded = load_pickle(path)
    found = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("projector"), dict):
        raise ModelError(
            "holds no projector",
            where=str(path),
            remedy='expected {"model": {"projector": ..., "llm_backbone": ...}}, as prismatic-vlms saves it',
        )
    known = ("projector", "llm_backbone", "vision_backbone")
    complain("the checkpoint holds other parts", left_over=found.keys() - set(known), where=str(path))
    return {part: dict(tensors) for part, tensors in found.items()}


def _tower(
    name: str, given: str | None, own: Mapping[str, torch.Tensor] | None, *, dtype: torch.dtype, where: str
) -> VisionTower:
    """timm's tower at the second-to-last block, without class token and final norm; the file's own if it has one."""
    eye = build_vision("timm", given or name, weights=own is None, layer=-2, dtype=dtype)
    architecture = json.loads(eye.identity)[1]
    if architecture != name.split(".")[0]:
        raise ModelError(
            f"the tower {given} is a {architecture}, and the model was trained with {name.split('.')[0]}",
            where=where,
            remedy="name a folder or hub id of that architecture with --tower, or leave it out",
        )
    if own is not None:
        where = f"{where}, vision_backbone"
        own_tower(eye, split_by_prefix(own, (("featurizer.", "own", ""),), where=where)["own"], where)
    return eye


def _own_llm(
    tensors: Mapping[str, torch.Tensor], base: str, *, tokenizer: Any, dtype: torch.dtype, where: str, **place: Any
) -> Any:
    """The checkpoint's LLM. Its embeddings have rows for a pad token and up to a multiple of 64."""
    where = f"{where}, llm_backbone"
    own = split_by_prefix(tensors, (("llm.", "own", ""),), where=where)["own"]
    text = load_llm(base, empty=True).config
    words = own.get("model.embed_tokens.weight")
    if words is None:
        raise ModelError("holds no llm.model.embed_tokens.weight", where=where, remedy="is the file complete?")
    rows, width = words.shape
    if not 0 <= rows - len(tokenizer) <= 64 or width != text.hidden_size:
        raise ModelError(
            f"has {rows} word embeddings of width {width}, and the base {base} has {len(tokenizer)} tokens "
            f"of width {text.hidden_size}",
            where=where,
            remedy="name the LLM that the model was trained from with --base",
        )
    text.vocab_size = rows
    return language_model(text, own, dtype=dtype, where=where, **place)
