"""Run folders of prismatic-vlms (Karamcheti et al., arXiv:2402.07865), read into a composite.

Goes in: `config.json` and `checkpoints/latest-checkpoint.pt` (projector, and the LLM where it was trained), with the
LLM's base for config and tokenizer. Comes out: the composite, its tokenizer, and how its pictures are prepared. The
tower is timm's of the same name, or the file's own where it was trained; fused towers are both. Refuses towers it does
not know, letterboxes of fused towers, and a base that does not belong to the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmit.errors import ModelError, nearest
from mmit.models.files import load_pickle
from mmit.models.interop.llava import own_tower
from mmit.models.interop.llava_hf import language_model
from mmit.models.interop.tensors import complain, fill_module, split_by_prefix
from mmit.models.llm import load_llm, load_tokenizer
from mmit.models.projectors import build_projector
from mmit.models.vision import VisionTower, build_vision
from mmit.models.vision_fused import fuse
from mmit.models.vlm import VLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    "dinov2-vit-l": "vit_large_patch14_reg4_dinov2.lvd142m",
}
# Two towers side by side: prefix of their weights -> timm's model; and the size that both take.
DINO = "vit_large_patch14_reg4_dinov2.lvd142m"
FUSED_TOWERS: dict[str, tuple[dict[str, str], int]] = {
    "dinoclip-vit-l-336px": ({"dino": DINO, "clip": "vit_large_patch14_clip_quickgelu_336.openai"}, 336),
    "dinosiglip-vit-so-224px": ({"dino": DINO, "siglip": "vit_so400m_patch14_siglip_224.webli"}, 224),
    "dinosiglip-vit-so-384px": ({"dino": DINO, "siglip": "vit_so400m_patch14_siglip_384.webli"}, 384),
}
# Towers that are not fed at their own size.
SIZES = {"dinov2-vit-l": 224}
# Prismatic scales this tower's pictures to 248 pixels and cuts 224 out, unless it stretches them.
ONLY_STRETCHED = ("clip-vit-b",)
FITS = {"letterbox": "pad", "resize-crop": "crop", "resize-naive": "resize"}
# arch_specifier -> our projector and its options
PROJECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("mlp", {"depth": 1}),
    "gelu-mlp": ("mlp", {"depth": 2}),
    "fused-gelu-mlp": ("fused_mlp", {}),
}
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
        tower: timm name (`local-dir:/folder`, `hf-hub:org/repo`) with the weights of the same architecture; of fused
            towers both, with a comma between them.
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
    # Everything that can be refused from config.json is, before a checkpoint of many GB is read.
    mode, (kind, options) = _fit(config, where), _projector(str(config["arch_specifier"]), where)
    backbone = str(config["vision_backbone_id"])
    if backbone not in FUSED_TOWERS:
        name = _tower_name(config, where)
    if base is None:
        raise ModelError(
            f"names its language model '{config.get('llm_backbone_id')}', which is not in the folder",
            where=where,
            remedy="name the folder or hub id of that model with --base",
        )
    parts = _checkpoint(folder)
    own_vision = parts.get("vision_backbone")
    if backbone in FUSED_TOWERS:
        vision = _fused(backbone, tower, own_vision, dtype=dtype, where=where)
    else:
        vision = _tower(name, tower, own_vision, dtype=dtype, where=where, image_size=SIZES.get(backbone))
    tokenizer = load_tokenizer(base)
    llm: Any
    if "llm_backbone" in parts:
        llm = _own_llm(parts["llm_backbone"], base, tokenizer=tokenizer, dtype=dtype, where=where, **place)
    else:
        llm = load_llm(base, dtype=dtype, **place)
    width = llm.get_input_embeddings().weight.shape[1]
    shape = {"vision_dim": vision.dim, "llm_dim": width, "grid": vision.grid, "prefix": vision.prefix}
    projector = build_projector(kind, **shape, **options)
    front = f"layers.{'0.' if options.get('depth') == 1 else ''}"
    own = split_by_prefix(parts["projector"], (("projector.", "own", front),), where=f"{where}, projector")["own"]
    fill_module(projector, own, where=f"{where}, projector ({config['arch_specifier']})")
    image = {
        "size": list(vision.image_size),
        "interpolation": vision.interpolation,
        "fill": [int(255 * m) for m in vision.mean],
    }
    return VLM(llm, vision=vision, projector=projector.to(dtype)), tokenizer, {**image, "mode": mode}


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
    if tower in FUSED_TOWERS and FITS[name] == "pad":
        raise ModelError(
            f"pads pictures for each tower of {tower} with another colour, and mmit prepares a picture once",
            where=where,
            remedy="mmit reads models of fused towers with resize-naive and resize-crop",
        )
    return FITS[name]


def _projector(name: str, where: str) -> tuple[str, dict[str, Any]]:
    """Our projector of an `arch_specifier`; "no-align+" tells of training alone."""
    kind = name.removeprefix("no-align+")
    if kind not in PROJECTORS:
        raise ModelError(f"arch_specifier is '{name}'", where=where, remedy=nearest(kind, PROJECTORS))
    return PROJECTORS[kind]


def _tower_name(config: Mapping[str, Any], where: str) -> str:
    name = str(config["vision_backbone_id"])
    if name not in TOWERS:
        raise ModelError(
            f"vision_backbone_id is '{name}', which mmit does not know",
            where=where,
            remedy=nearest(name, [*TOWERS, *FUSED_TOWERS]),
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


def _fused(
    backbone: str, given: str | None, own: Mapping[str, torch.Tensor] | None, *, dtype: torch.dtype, where: str
) -> VisionTower:
    """Both towers, each as `_tower` reads it, their features side by side."""
    names, size = FUSED_TOWERS[backbone]
    sources = given.split(",") if given else [""] * len(names)
    if len(sources) != len(names):
        raise ModelError(
            f"'{given}' names {len(sources)} towers, and {backbone} has {len(names)}",
            where=where,
            remedy=f"give --tower one name for each of {', '.join(names)}, with a comma between them",
        )
    if own is None:
        parts: dict[str, Any] = dict.fromkeys(names)
    else:
        prefixes = tuple((f"{part}_featurizer.", part, "") for part in names)
        split = split_by_prefix(own, prefixes, where=f"{where}, vision_backbone")
        parts = {part: {f"featurizer.{key}": value for key, value in split[part].items()} for part in names}
    encoders = []
    for source, (part, name) in zip(sources, names.items(), strict=True):
        # timm reads the size of a folder from it; a published tower takes Prismatic's.
        size_here = None if source else size
        tower = _tower(name, source or None, parts[part], dtype=torch.float32, where=where, image_size=size_here)
        encoders.append(tower.as_encoder())
    return VisionTower("fused", fuse(encoders)).to(dtype)


def _tower(
    name: str,
    given: str | None,
    own: Mapping[str, torch.Tensor] | None,
    *,
    dtype: torch.dtype,
    where: str,
    image_size: int | None = None,
) -> VisionTower:
    """timm's tower at the second-to-last block, without class token and final norm; the file's own if it has one."""
    weights, size = own is None, None if given else image_size
    vision = build_vision("timm", given or name, weights=weights, layer=-2, image_size=size, dtype=dtype)
    architecture = json.loads(vision.identity)[1]
    if architecture != name.split(".")[0]:
        raise ModelError(
            f"the tower {given} is a {architecture}, and the model was trained with {name.split('.')[0]}",
            where=where,
            remedy="name a folder or hub id of that architecture with --tower, or leave it out",
        )
    if own is not None:
        where = f"{where}, vision_backbone"
        own_tower(vision, split_by_prefix(own, (("featurizer.", "own", ""),), where=where)["own"], where)
    return vision


def _own_llm(
    tensors: Mapping[str, torch.Tensor], base: str, *, tokenizer: Any, dtype: torch.dtype, where: str, **place: Any
) -> Any:
    """The checkpoint's LLM. Its embeddings have rows for a pad token and up to a multiple of 64."""
    where = f"{where}, llm_backbone"
    own = split_by_prefix(tensors, (("llm.", "own", ""),), where=where)["own"]
    # The base's config alone: its weights would be thrown away again.
    text = load_llm(base, empty=True).config
    words = own.get("model.embed_tokens.weight")
    if words is None:
        raise ModelError("holds no llm.model.embed_tokens.weight", where=where, remedy="is the file complete?")
    rows, width = words.shape
    # Prismatic adds a pad token and rounds up to 64 rows. Another difference means another base.
    if not 0 <= rows - len(tokenizer) <= 64 or width != text.hidden_size:
        raise ModelError(
            f"has {rows} word embeddings of width {width}, and the base {base} has {len(tokenizer)} tokens "
            f"of width {text.hidden_size}",
            where=where,
            remedy="name the LLM that the model was trained from with --base",
        )
    # As many rows as the checkpoint has, or the loader would refuse its embeddings.
    text.vocab_size = rows
    return language_model(text, own, dtype=dtype, where=where, **place)
