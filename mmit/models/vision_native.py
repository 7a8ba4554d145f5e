"""Vision encoders of native resolution from transformers: SigLIP 2 NaFlex, the ViTs of Qwen2-VL, Qwen2.5-VL, Qwen3-VL
and Qwen3.5, MoonViT and Pixtral's.

Goes in: a hub id or folder of the whole model or of its vision part, or the dict of a vision config. Comes out: an
Encoder that takes pictures of any size as units, blocks of merge x merge patches. Pictures of one call never attend to
each other. What stands above the layer that is read is gone, the merger into the width of the model's own LLM too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from PIL.Image import Resampling

from mmit.errors import ModelError, nearest
from mmit.models.vision_encoder import (
    Encoder,
    Origin,
    Reading,
    blocks_to_run,
    check_complete,
    check_norm,
    explained,
    layers_to_read,
    one_or_more,
    quiet_loading,
)
from mmit.models.vision_native_kinds import NATIVE, Kind


def native_encoder(
    name: str | Mapping[str, Any], config: Any, class_name: str, reading: Reading, *, where: str
) -> Encoder:
    """Build an encoder of native resolution.

    Args:
        name: hub id, folder, or the dict of a vision config.
        config: its vision config.
        class_name: a key of NATIVE.
        reading: see `build_vision`; its `native` are min_pixels and max_pixels of a picture, and for NaFlex `merge`,
            in place of the published ones.
        where: begins its errors.

    Raises:
        ModelError: options it does not have, or weights that are missing.
    """
    kind = NATIVE[class_name]
    if isinstance(reading.weights, str):
        raise ModelError("a weight file is for towers of one size", where=where, remedy="leave weights out")
    if reading.image_size is not None:
        raise ModelError(
            "takes pictures at their own size, so there is no image_size",
            where=where,
            remedy="remove model.vision.image_size; max_pixels or max_edge under model.vision.native bounds a picture",
        )
    if reading.with_cls:
        raise ModelError("this encoder has no CLS token", where=where, remedy="use select: patch")
    total = getattr(config, "depth", None) or config.num_hidden_layers
    layers = layers_to_read(reading.layer, kind.layer, where=where)
    blocks = tuple(blocks_to_run(one, total, where=where) for one in layers)
    model, weights_id = _model(name, class_name, config=config, kind=kind, weights=reading.weights, where=where)
    core = getattr(model, "vision_model", model)
    last = blocks == (total,)
    check_norm(reading.normalize, last=last, norm=getattr(core, "post_layernorm", None), where=where)
    kind.cut(model, max(blocks), last=last, normalize=reading.normalize)
    rule, constants = _rule(name, config, kind, reading.native or {}, where=where)
    patch, merge = rule["patch"], rule["merge"]
    width = getattr(config, "embed_dim", None) or config.hidden_size  # of Qwen2-VL the latter is its LLM's
    shown = name if isinstance(name, str) else class_name
    return Encoder(
        reader=kind.reader(model, patch=patch, merge=merge, blocks=blocks),
        layer=one_or_more(layers),
        normalize=reading.normalize,
        # A unit stands where a picture does in a tower of one size: its side, and its patches.
        image_size=(patch * merge, patch * merge),
        grid=(merge, merge),
        prefix=0,
        dim=width * len(blocks),
        native=rule,
        **Origin(shown, weights_id, _identity(class_name, config), constants).facts(),
    )


def native_class(name: str) -> Any:
    """The class of transformers that a key of NATIVE names."""
    import transformers

    # By name of the class, which is what decides how it is cut; families share model types.
    if hasattr(transformers, name):
        return getattr(transformers, name)
    # Encoders that are not among the names of the package, that of Qwen2.5-VL in 5.17 alone.
    family = "qwen2_5_vl" if name.startswith("Qwen2_5") else "qwen2_vl"
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _model(
    name: str | Mapping[str, Any], class_name: str, *, config: Any, kind: Kind, weights: Any, where: str
) -> tuple[Any, str]:
    model_class = native_class(class_name)
    if weights is False or not isinstance(name, str):
        if weights is True:
            raise ModelError("a config dict brings no weights", where=where, remedy="leave weights out")
        return model_class(config), "random"
    with explained(where, remedy="the hub id or folder must hold the weights of the vision encoder"), quiet_loading():
        model, info = model_class.from_pretrained(
            name,
            config=config,
            key_mapping={kind.keys: ""},
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    check_complete(info, where=where)
    return model, name


def _rule(
    name: str | Mapping[str, Any], config: Any, kind: Kind, limits: Mapping[str, Any], *, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of `data.native` and the constants: published ones, with the user's limits on top."""
    stated = preprocessor(name, where=where) if isinstance(name, str) else {}
    merge = getattr(config, "spatial_merge_size", None) or getattr(config, "merge_kernel_size", (1, 1))[0]
    patch = int(config.patch_size)
    own = {key: value for key, value in kind.limits.items() if key != "max_patches"}
    if "max_patches" in kind.limits:
        # NaFlex states a number of patches, the others an area in pixels; inside mmit it is an area.
        count = stated.get("max_patches") or stated.get("max_num_patches") or kind.limits["max_patches"]
        own["max_pixels"] = int(count) * patch**2
    size = stated.get("size") or {}
    for key, told in {
        "min_pixels": stated.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": stated.get("max_pixels") or size.get("longest_edge"),
        "max_side": size.get("max_height"),
        "max_edge": size.get("longest_edge"),
    }.items():
        if key in own and told:
            own[key] = int(told)
    # The side is a bound of MoonViT's position table, and no choice.
    valid = [key for key in own if key != "max_side"] + ["merge"] * (kind.rule == "naflex")
    for key in limits:
        if key not in valid:
            raise ModelError(f"unknown option '{key}'", where="model.vision.native", remedy=nearest(key, valid))
    rule = {"rule": kind.rule, "patch": patch, "merge": int(merge), **own, **limits}
    constants = {
        "mean": stated.get("image_mean", kind.constants["mean"]),
        "std": stated.get("image_std", kind.constants["std"]),
        "interpolation": Resampling(stated["resample"]).name.lower()
        if stated.get("resample") is not None
        else kind.constants["interpolation"],
    }
    return rule, constants


def preprocessor(name: str, *, where: str) -> dict[str, Any]:
    """Return a checkpoint's preprocessor_config.json, {} where it has none."""
    from transformers.utils import cached_file

    with explained(f"{where}, preprocessor_config.json", remedy="check the network, or give a local folder"):
        path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def _identity(class_name: str, config: Any) -> str:
    plain = {
        key: value
        for key, value in sorted(config.to_dict().items())
        if isinstance(value, (int, float, list, tuple, dict)) or key == "hidden_act"
    }
    return json.dumps([class_name, plain], default=str)
