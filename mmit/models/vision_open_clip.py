"""Vision encoders from open_clip: CLIP, CoCa, SigLIP and the like, the text tower deleted.

Goes in: an open_clip architecture name and where its weights are. Comes out: an Encoder cut above the
layer that is read. Refuses weights trained with QuickGELU in an architecture that uses another activation.

B images, h x w patches, N = tokens, D = width.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.files import PACKAGE, resolve_file
from mmit.models.hub import unasked
from mmit.models.vision_encoder import (
    Encoder,
    Origin,
    Reader,
    Reading,
    blocks_to_run,
    check_norm,
    explained,
    layers_to_read,
    one_or_more,
    pair,
    single_layer,
    stage_to_read,
)
from mmit.models.vision_timm import cut_timm

SCHEMES = ("hf-hub:", "local-dir:")


class ViTReader(Reader):
    """Normalised pixels (B, 3, H, W) -> features (B, N, D) of blocks of an open_clip VisionTransformer."""

    def __init__(self, visual: nn.Module, *, index: tuple[int, ...], normalize: bool, with_cls: bool) -> None:
        super().__init__()
        self.model = visual
        self.index, self.normalize, self.with_cls = index, normalize, with_cls

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        out = self.model.forward_intermediates(  # type: ignore[operator]
            pixels,
            indices=sorted(self.index),
            normalize_intermediates=self.normalize,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
            output_extra_tokens=self.with_cls,
        )
        order = [sorted(self.index).index(index) for index in self.index]
        patches = torch.cat([out["image_intermediates"][place] for place in order], dim=-1)
        if not self.with_cls:
            return patches
        tokens = torch.cat([out["image_intermediates_prefix"][place] for place in order], dim=-1)
        return torch.cat([tokens, patches], dim=1)


class ResNetReader(Reader):
    """Normalised pixels (B, 3, H, W) -> features (B, h*w, D) of one stage of CLIP's modified ResNet."""

    def __init__(self, visual: nn.Module, *, index: int) -> None:
        super().__init__()
        self.model = visual
        self.index = index

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, h*w, D)."""
        out = self.model.forward_intermediates(pixels, indices=[self.index], intermediates_only=True)  # type: ignore[operator]
        return out["image_intermediates"][0].flatten(2).transpose(1, 2)


def open_clip_encoder(name: str, reading: Reading) -> Encoder:
    """Build an encoder from an open_clip name.

    `name` is an architecture, or `hf-hub:org/repo` / `local-dir:/folder`, which bring weights of their own.
    `reading.weights` is a pretrained tag, a file, None (random for an architecture, its own for a hub or folder
    name), True (its own) or False (random).
    """
    config, weights = _config(name), reading.weights
    own = name.startswith(SCHEMES)
    # Before anything is built: a wrong tag or activation is told in a second.
    pretrained, weights_id = _weights(name, weights, own=own)
    visual = _visual(name, pretrained, load=weights_id != "random", image_size=reading.image_size)
    constants = dict(visual.preprocess_cfg)
    if not own and not _is_tag(name, weights):
        constants.update(_agreed_constants(name))
    size = pair(visual.image_size)
    config["vision_cfg"]["image_size"] = size
    identity = json.dumps(["open_clip", config["vision_cfg"], config.get("quick_gelu", False)], sort_keys=True)
    origin = Origin(name, weights_id, identity, constants)
    if hasattr(visual, "trunk"):
        # open_clip has built the trunk for the wanted size; timm must not resize it a second time.
        return cut_timm(visual.trunk, replace(reading, image_size=None), origin=origin, built_size=size)
    cut = _cut_vit if hasattr(visual, "transformer") else _cut_resnet
    return Encoder(normalize=reading.normalize, image_size=size, **origin.facts(), **cut(visual, reading, origin.name))


def _visual(name: str, pretrained: str | None, *, load: bool, image_size: int | tuple[int, int] | None) -> Any:
    """Return the vision part; the text tower, which a checkpoint can only be read with, is freed here."""
    import open_clip

    # unasked: a text tower may be a model of transformers.
    remedy = "without a network, give a weight file that is already here"
    with unasked(), explained(f"open_clip {name}", remedy=remedy):
        model: Any = open_clip.create_model(
            name,
            pretrained=pretrained,
            load_weights=load,
            require_pretrained=load,
            pretrained_text=False,
            force_image_size=None if image_size is None else pair(image_size),
            device=torch.get_default_device(),  # "meta" where only shapes are wanted
        )
    return model.visual


def _cut_vit(visual: Any, reading: Reading, name: str) -> dict[str, Any]:
    """Cut a VisionTransformer; gives the arguments of `Encoder` that depend on the layer."""
    where = f"open_clip {name}"
    layers = layers_to_read(reading.layer, -2, where=where)
    total = len(visual.transformer.resblocks)
    blocks = tuple(blocks_to_run(one, total, where=where) for one in layers)
    # After an attention pool the norm is sized for the pooled token, so it is no norm over patches.
    norm = visual.ln_post if visual.attn_pool is None and not visual.final_ln_after_pool else None
    check_norm(reading.normalize, last=blocks == (total,), norm=norm, where=where)
    visual.prune_intermediate_layers([max(blocks) - 1], prune_norm=not reading.normalize, prune_head=True)
    visual.attn_pool = visual.attn_pool_contrastive = None
    read = {"normalize": reading.normalize, "with_cls": reading.with_cls}
    return {
        "reader": ViTReader(visual, index=tuple(block - 1 for block in blocks), **read),
        "layer": one_or_more(layers),
        "grid": pair(visual.grid_size),
        "prefix": int(reading.with_cls),
        "dim": visual.conv1.out_channels * len(blocks),
    }


def _cut_resnet(visual: Any, reading: Reading, name: str) -> dict[str, Any]:
    """Cut CLIP's modified ResNet, as `_cut_vit` does."""
    where = f"open_clip {name}"
    layer = single_layer(reading.layer, where=where)
    layer = -1 if layer is None else layer
    index = stage_to_read(layer, 5, where=where)
    check_norm(reading.normalize, last=index == 4, norm=None, where=where)
    if reading.with_cls:
        raise ModelError("this encoder has no CLS token", where=where, remedy="use select: patch")
    for stage in range(index + 1, 5):
        setattr(visual, f"layer{stage}", nn.Identity())
    visual.attnpool = nn.Identity()
    # The stem and the first stage shrink by 4, each later stage by 2.
    shrink = 4 * 2 ** max(0, index - 1)
    height, width = pair(visual.image_size)
    # The norm that ends the stage states its width; the stem has one of its own.
    last = visual.bn3 if index == 0 else getattr(visual, f"layer{index}")[-1].bn3
    return {
        "reader": ResNetReader(visual, index=index),
        "layer": layer,
        "grid": (height // shrink, width // shrink),
        "prefix": 0,
        "dim": last.num_features,
    }


def _config(name: str) -> dict[str, Any]:
    import open_clip

    if not name.startswith(SCHEMES):
        name = name.replace("/", "-")  # open_clip takes OpenAI's spelling, ViT-B/32, for its own
        if name not in open_clip.list_models():
            raise ModelError(
                "open_clip has no such architecture",
                where=name,
                remedy=nearest(name, open_clip.list_models()),
            )
    elif name.startswith("local-dir:"):
        resolve_file(Path(name.removeprefix("local-dir:")).expanduser() / "open_clip_config.json")
    with explained(f"open_clip {name}", remedy="the hub name or folder must hold an open_clip_config.json"):
        return open_clip.get_model_config(name)


def _weights(name: str, weights: str | bool | None, *, own: bool) -> tuple[str | None, str]:
    """Return what open_clip is given as `pretrained`, and the id of the weights."""
    import open_clip

    where = f"open_clip {name}"
    if own:
        if isinstance(weights, str):
            raise ModelError(
                f"'{name}' brings weights of its own, so weights cannot be '{weights}'",
                where=where,
                remedy="leave weights out, or give an architecture name with a file",
            )
        return None, "random" if weights is False else name
    architecture = name.replace("/", "-")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights is True:
        raise ModelError(
            "an architecture has many sets of weights",
            where=where,
            remedy=f"give one of its tags: {', '.join(tags) or 'none'}; or a file",
        )
    if not weights:
        return None, "random"
    if weights in tags:
        _check_activation(architecture, weights)
        return weights, weights
    is_path = weights.startswith(PACKAGE) or os.sep in weights or Path(weights).suffix or Path(weights).exists()
    if not is_path:
        raise ModelError(
            f"'{weights}' is neither a pretrained tag of this architecture nor a file",
            where=where,
            remedy=_tag_remedy(architecture, weights, tags),
        )
    return str(resolve_file(weights)), weights


def _is_tag(name: str, weights: str | bool | None) -> bool:
    import open_clip

    return weights in open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))


def _check_activation(architecture: str, tag: str) -> None:
    """Refuse weights trained with QuickGELU in an architecture without it, where open_clip only warns."""
    import open_clip

    trained = open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)
    if trained and not (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False):
        right = f"{architecture}-quickgelu"
        known = right in open_clip.list_models()
        raise ModelError(
            f"the weights '{tag}' were trained with QuickGELU, which {architecture} does not use",
            where=f"open_clip {architecture}",
            remedy=f"use name: {right}" if known else "this pair has no right architecture in open_clip",
        )


def _tag_remedy(architecture: str, tag: str, tags: list[str]) -> str:
    import open_clip

    others = [
        name
        for name in open_clip.list_models()
        if tag in open_clip.list_pretrained_tags_by_model(name) and name.startswith(architecture)
    ]
    hint = f"'{tag}' belongs to {', '.join(others)}; " if others else ""
    return hint + (nearest(tag, tags) if tags else "this architecture has no pretrained tags")


def _agreed_constants(name: str) -> dict[str, Any]:
    """Return the constants on which all published weights of an architecture agree.

    open_clip knows them only by tag, so a SigLIP file given by path would be fed CLIP's mean and std.
    """
    import open_clip

    architecture = name.replace("/", "-")
    known = [
        open_clip.get_pretrained_cfg(architecture, tag) for tag in open_clip.list_pretrained_tags_by_model(architecture)
    ]
    agreed = {}
    for key in ("mean", "std", "interpolation"):
        values = {json.dumps(entry[key]) for entry in known if entry.get(key)}
        if len(values) == 1:
            agreed[key] = json.loads(values.pop())
    return agreed
