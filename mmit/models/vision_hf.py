"""Vision encoders from transformers: CLIP and SigLIP (with SigLIP 2 at a fixed size).

Goes in: a hub id or local folder, or the dict of a vision config. Comes out: an Encoder whose layers above
the one that is read are gone. Refuses other model types, and checkpoints that lack a tensor it reads.

B images, h x w patches, N = tokens, D = hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Resampling
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.files import load_tensors, resolve_file
from mmit.models.vision_encoder import (
    CLIP_MEAN,
    CLIP_STD,
    Encoder,
    Reader,
    blocks_to_run,
    check_norm,
    explained,
    load_needed,
    pair,
    triple,
)

# A whole CLIP or SigLIP model is read through its vision part. NaFlex SigLIP 2 ("siglip2") takes packed
# patches and has no fixed grid; fixed-size SigLIP 2 checkpoints say "siglip".
MODEL_CLASSES = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
# What the image processors of these models do when a checkpoint carries no preprocessor_config.json.
DEFAULT_CONSTANTS = {
    "CLIPVisionModel": {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"},
    "SiglipVisionModel": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"},
}


class HFReader(Reader):
    """Normalised pixels (B, 3, H, W) -> features (B, N, D) of one hidden state of a transformers model."""

    def __init__(self, model: nn.Module, *, norm: nn.Module, drop: int, resized: bool) -> None:
        super().__init__()
        self.model, self.norm = model, norm
        self.drop, self.resized = drop, resized

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        # With the layers above cut and the final norm gone, the last hidden state is the one that is read.
        hidden = self.model(pixels, interpolate_pos_encoding=self.resized).last_hidden_state
        return self.norm(hidden[:, self.drop :])


def hf_encoder(
    name: str | Mapping[str, Any],
    *,
    weights: str | bool | None,
    layer: int | None,
    select: str,
    image_size: int | tuple[int, int] | None,
    normalize: bool,
) -> Encoder:
    """Build an encoder from a hub id, a folder, or a config dict (random weights).

    `weights` is None or True (those of the hub id or folder; a config dict has none), False (random), or a
    file with the keys of the transformers class.
    """
    config, kind = _config(name)
    shown = name if isinstance(name, str) else kind
    where = f"hf {shown}"
    layer = -2 if layer is None else layer
    blocks = blocks_to_run(layer, config.num_hidden_layers, where=where)
    model, weights_id = _model(name, kind, config=config, weights=weights, where=where)

    # Versions of transformers differ in whether the vision model sits one level down.
    core: Any = getattr(model, "vision_model", model)
    has_cls = hasattr(core.embeddings, "class_embedding")
    if select == "cls_patch" and not has_cls:
        raise ModelError("this encoder has no CLS token", where=where, remedy="use select: patch")
    check_norm(normalize, last=blocks == config.num_hidden_layers, norm=core.post_layernorm, where=where)
    norm = core.post_layernorm if normalize else nn.Identity()
    full = {key: value.shape for key, value in core.state_dict().items()}
    identity = _identity(kind, config)
    _cut(core, blocks)
    native = pair(config.image_size)
    size = pair(image_size or native)
    reader = HFReader(model, norm=norm, drop=int(has_cls and select == "patch"), resized=size != native)
    if isinstance(weights, str):
        path = resolve_file(weights)
        _load_file(reader, core, load_tensors(path), full=full, where=f"{where}, weights {path}")

    constants = _constants(name, kind) if isinstance(name, str) else DEFAULT_CONSTANTS[kind]
    return Encoder(
        reader=reader,
        name=shown,
        weights_id=weights_id,
        identity=identity,
        layer=layer,
        normalize=normalize,
        image_size=size,
        grid=(size[0] // config.patch_size, size[1] // config.patch_size),
        prefix=int(has_cls and select == "cls_patch"),
        dim=config.hidden_size,
        mean=triple(constants["mean"]),
        std=triple(constants["std"]),
        interpolation=str(constants["interpolation"]),
    )


def _cut(core: Any, blocks: int) -> None:
    core.encoder.layers = core.encoder.layers[:blocks]
    core.config.num_hidden_layers = blocks
    core.post_layernorm = nn.Identity()
    if hasattr(core, "head"):
        core.use_head = False
        del core.head


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
    if model_type not in MODEL_CLASSES:
        raise ModelError(
            f"model type '{model_type}' is not a vision encoder that mmit reads",
            where=where,
            remedy=nearest(model_type, MODEL_CLASSES),
        )
    if not isinstance(name, str):
        if not model_type.endswith("_vision_model"):
            raise ModelError(
                f"a config dict describes the vision part alone, not a whole '{model_type}'",
                where=where,
                remedy=f"use model_type: {model_type}_vision_model",
            )
        valid = transformers.AutoConfig.for_model(model_type).to_dict()
        for key in name:
            if key not in valid:
                raise ModelError(f"unknown key '{key}'", where=where, remedy=nearest(key, valid))
        with explained(where, remedy="check the values against the model's documentation"):
            config = transformers.AutoConfig.for_model(**name)
    return getattr(config, "vision_config", config), MODEL_CLASSES[model_type]


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
    with explained(where, remedy="the hub id or folder must hold model.safetensors or pytorch_model.bin"):
        with _quiet():
            model, info = model_class.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    bad = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if bad:
        raise ModelError(
            f"{len(bad)} tensors are missing or of another shape: {', '.join(bad[:4])}",
            where=where,
            remedy="the checkpoint is not a complete vision model of this config",
        )
    return model, name


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the page-long report of unread text-tower tensors; the caller checks what is missing."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_file(
    reader: HFReader,
    core: nn.Module,
    tensors: dict[str, torch.Tensor],
    *,
    full: dict[str, torch.Size],
    where: str,
) -> None:
    prefix = "vision_model."
    if all(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    norm = {key.removeprefix("post_layernorm."): value for key, value in tensors.items() if "post_layernorm." in key}
    load_needed(core, tensors, full=full, where=where)
    if not isinstance(reader.norm, nn.Identity):
        load_needed(reader.norm, norm, full={key: value.shape for key, value in norm.items()}, where=where)


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
