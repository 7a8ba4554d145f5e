"""Vision encoders from transformers: CLIP, SigLIP (with SigLIP 2 at a fixed size), DINOv2 and DINOv3.

Goes in: a hub id or local folder, or the dict of a vision config. Comes out: an Encoder whose layers above
those that are read are gone; types of native resolution are built by `vision_native`. Refuses other model types, and
checkpoints that lack a tensor it reads.

B images, h x w patches, N = tokens, D = hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Resampling
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.files import load_tensors, resolve_file
from mmit.models.vision_encoder import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Encoder,
    Origin,
    Reader,
    Reading,
    blocks_to_run,
    check_complete,
    check_norm,
    explained,
    layers_to_read,
    load_needed,
    one_or_more,
    pair,
    quiet_loading,
)
from mmit.models.vision_native import native_encoder
from mmit.models.vision_native_kinds import NATIVE, NATIVE_TYPES

# A whole CLIP or SigLIP model is read through its vision part. NaFlex SigLIP 2 ("siglip2") has no fixed grid and
# is read by `vision_native`; fixed-size SigLIP 2 checkpoints say "siglip".
MODEL_CLASSES = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
# Where the blocks of these classes are, by version, and what their final norm is called.
_STACKS = ("encoder.layers", "encoder.layer", "model.layer", "layer")
_NORMS = ("post_layernorm", "layernorm", "norm")
# What the image processors of these models do when a checkpoint carries no preprocessor_config.json.
DEFAULT_CONSTANTS = {
    "CLIPVisionModel": {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"},
    "SiglipVisionModel": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"},
    "Dinov2Model": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"},
    "Dinov2WithRegistersModel": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"},
    "DINOv3ViTModel": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"},
}


class HFReader(Reader):
    """Normalised pixels (B, 3, H, W) -> features (B, N, D) of hidden states of a transformers model.

    Args:
        blocks: numbers of the blocks whose outputs are read; the model is cut above the highest.
        special: tokens in front of the patches: a class token and perhaps registers. with_cls: keep the class token.
        resized: interpolate position embeddings to the size of the pixels, where the class does so on request.
    """

    exact_buffers = True

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: nn.Module,
        blocks: tuple[int, ...],
        special: int,
        with_cls: bool,
        resized: bool | None,
    ) -> None:
        super().__init__()
        self.model, self.norm = model, norm
        self.blocks, self.special, self.with_cls, self.resized = blocks, special, with_cls, resized

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        options: dict[str, Any] = {} if self.resized is None else {"interpolate_pos_encoding": self.resized}
        if len(self.blocks) == 1:
            # With the layers above cut and the final norm gone, the last hidden state is the one that is read.
            hidden = self.model(pixels, **options).last_hidden_state
        else:
            states = self.model(pixels, output_hidden_states=True, **options).hidden_states
            hidden = torch.cat([states[block] for block in self.blocks], dim=-1)
        patches = hidden[:, self.special :]
        return self.norm(torch.cat([hidden[:, :1], patches], dim=1) if self.with_cls else patches)


def hf_encoder(name: str | Mapping[str, Any], reading: Reading) -> Encoder:
    """Build an encoder from a hub id, a folder, or a config dict (random weights).

    `reading.weights` is None or True (those of the hub id or folder; a config dict has none), False (random), or a
    file with the keys of the transformers class; `native` holds limits for towers of native resolution.
    """
    config, kind = _config(name)
    shown = name if isinstance(name, str) else kind
    where = f"hf {shown}"
    if kind in NATIVE:
        return native_encoder(name, config, kind, reading, where=where)
    if reading.native:
        raise ModelError(
            f"native has {', '.join(reading.native)}, and this encoder takes pictures of one size",
            where=where,
            remedy=f"remove model.vision.native; encoders of native resolution: {', '.join(sorted(NATIVE_TYPES))}",
        )
    layers = layers_to_read(reading.layer, -2, where=where)
    blocks = tuple(blocks_to_run(one, config.num_hidden_layers, where=where) for one in layers)
    model, weights_id = _model(name, kind, config=config, weights=reading.weights, where=where)
    size, identity = pair(reading.image_size or pair(config.image_size)), _identity(kind, config)  # before the cut
    reader = _cut_reader(model, kind, reading, config=config, blocks=blocks, size=size, where=where)
    constants = _constants(name, kind) if isinstance(name, str) else DEFAULT_CONSTANTS[kind]
    return Encoder(
        reader=reader,
        layer=one_or_more(layers),
        normalize=reading.normalize,
        image_size=size,
        grid=(size[0] // config.patch_size, size[1] // config.patch_size),
        prefix=int(reading.with_cls),
        dim=config.hidden_size * len(blocks),
        **Origin(shown, weights_id, identity, constants).facts(),
    )


def _cut_reader(
    model: Any,
    kind: str,
    reading: Reading,
    *,
    config: Any,
    blocks: tuple[int, ...],
    size: tuple[int, int],
    where: str,
) -> HFReader:
    """Cut the model above the highest block that is read, and load a weight file into what is left."""
    # Versions of transformers differ in whether the vision model sits one level down.
    core: Any = getattr(model, "vision_model", model)
    has_cls = any(hasattr(core.embeddings, name) for name in ("class_embedding", "cls_token"))
    if reading.with_cls and not has_cls:
        raise ModelError("this encoder has no CLS token", where=where, remedy="use select: patch")
    norm_name = next(name for name in _NORMS if hasattr(core, name))
    own_norm = getattr(core, norm_name)
    check_norm(reading.normalize, last=blocks == (config.num_hidden_layers,), norm=own_norm, where=where)
    full = {key: value.shape for key, value in core.state_dict().items()}
    _cut(core, max(blocks), norm_name)
    clip_like = kind in ("CLIPVisionModel", "SiglipVisionModel")  # DINO's classes follow the pixels by themselves
    reader = HFReader(
        model,
        norm=own_norm if reading.normalize else nn.Identity(),
        blocks=blocks,
        special=int(has_cls) + int(getattr(config, "num_register_tokens", 0) or 0),
        with_cls=reading.with_cls,
        resized=size != pair(config.image_size) if clip_like else None,
    )
    if isinstance(reading.weights, str):
        path = resolve_file(reading.weights)
        _load_file(reader, core, load_tensors(path), full=full, where=f"{where}, weights {path}", norm=norm_name)
    return reader


def _cut(core: Any, blocks: int, norm: str) -> None:
    path = next(path for path in _STACKS if _has(core, path))
    holder, _, name = path.rpartition(".")
    parent = core.get_submodule(holder)
    setattr(parent, name, getattr(parent, name)[:blocks])
    core.config.num_hidden_layers = blocks
    # The model would apply its final norm to whatever block is now the last; `HFReader` applies it where it was asked
    # for.
    setattr(core, norm, nn.Identity())
    if hasattr(core, "head"):
        core.use_head = False
        del core.head


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), nn.ModuleList)
    except AttributeError:
        return False


def _config(name: str | Mapping[str, Any]) -> tuple[Any, str]:
    """Return the vision config and the name of the transformers class."""
    import transformers

    if isinstance(name, str):
        with explained(f"hf {name}", remedy="give a hub id or a folder with a config.json"):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model_type = config.model_type
    else:
        model_type = str(name.get("model_type", ""))
    where = f"hf {name}" if isinstance(name, str) else "hf config dict"
    classes = {**MODEL_CLASSES, **NATIVE_TYPES}
    if model_type not in classes:
        raise ModelError(
            f"model type '{model_type}' is not a vision encoder that mmit reads",
            where=where,
            remedy=nearest(model_type, classes),
        )
    if not isinstance(name, str):
        part = model_type.endswith(("_vision_model", "_vision")) or model_type == "pixtral"
        if not part and not model_type.startswith("dino"):
            raise ModelError(
                f"a config dict describes the vision part alone, not a whole '{model_type}'",
                where=where,
                remedy=f"use model_type: {model_type}_vision_model",
            )
        valid = transformers.AutoConfig.for_model(model_type).to_dict()
        if model_type == "siglip_vision_model":  # its model reads the key in every version, its config names it in some
            valid.setdefault("vision_use_head", True)
        for key in name:
            if key not in valid:
                raise ModelError(f"unknown key '{key}'", where=where, remedy=nearest(key, valid))
        with explained(where, remedy="check the values against the model's documentation"):
            config = transformers.AutoConfig.for_model(**name)
    return getattr(config, "vision_config", config), classes[model_type]


def _model(
    name: str | Mapping[str, Any], kind: str, *, config: Any, weights: str | bool | None, where: str
) -> tuple[nn.Module, str]:
    """Return the whole vision model and the id of its weights; a file is loaded later, once it is cut."""
    import transformers

    model_class = getattr(transformers, kind)
    if isinstance(weights, str) or weights is False or not isinstance(name, str):
        if weights is True:
            raise ModelError("a config dict brings no weights", where=where, remedy="leave weights out, or give a file")
        return model_class(config), weights if isinstance(weights, str) else "random"
    remedy = "the hub id or folder must hold model.safetensors or pytorch_model.bin"
    with explained(where, remedy=remedy), quiet_loading():
        model, info = model_class.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    check_complete(info, where=where)
    return model, name


def _load_file(
    reader: HFReader,
    core: nn.Module,
    tensors: dict[str, torch.Tensor],
    *,
    full: dict[str, torch.Size],
    where: str,
    norm: str,
) -> None:
    prefix = "vision_model."
    # Files of a whole CLIP and of its vision model alone name the same tensors with and without it.
    if all(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    final = {key.removeprefix(f"{norm}."): value for key, value in tensors.items() if key.startswith(f"{norm}.")}
    load_needed(core, tensors, full=full, where=where)
    if not isinstance(reader.norm, nn.Identity):
        load_needed(reader.norm, final, full={key: value.shape for key, value in final.items()}, where=where)


def _identity(kind: str, config: Any) -> str:
    plain = {
        key: value
        for key, value in sorted(config.to_dict().items())
        if isinstance(value, int | float) or key == "hidden_act"
    }
    return json.dumps([kind, plain])


def _constants(name: str, kind: str) -> Mapping[str, Any]:
    """Return the constants of the checkpoint's preprocessor_config.json, or its class's where it has none."""
    from transformers.utils import cached_file

    where = f"hf {name}, preprocessor_config.json"
    with explained(where, remedy="check the network, or give a local folder"):
        path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return DEFAULT_CONSTANTS[kind]
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    # The tower divides by 255 itself. Other scales (-1 to 1 without constants) would feed it other pixels.
    if abs(found.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-4 or not found.get("do_rescale", True):
        raise ModelError("pixels are not scaled by 1/255", where=where, remedy="mmit cannot feed this encoder")
    default = DEFAULT_CONSTANTS[kind]
    if not found.get("do_normalize", True):
        return {**default, "mean": 0.0, "std": 1.0}
    return {
        "mean": found.get("image_mean", default["mean"]),
        "std": found.get("image_std", default["std"]),
        "interpolation": Resampling(found["resample"]).name.lower()
        if "resample" in found
        else default["interpolation"],
    }
