"""The encoders of an imported model as transformers' classes, so that a checkpoint can hold them.

Goes in: a tower, also a fused one. Comes out: for each of its encoders a vision config of exactly the blocks that run,
and tensors under the names of published checkpoints: CLIP's and SigLIP's by `hf_towers`, timm's DINOv2
(arXiv:2304.07193), with or without registers (arXiv:2309.16588), here. Refuses all others with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2WithRegistersConfig

from mmit.errors import ModelError
from mmit.models.interop.hf_towers import Converted, hf_tower
from mmit.models.vision import VisionTower
from mmit.models.vision_fused import parts_of
from mmit.models.vision_timm import TimmReader


def held_towers(tower: VisionTower) -> list[Converted]:
    """Return (vision config, tensors) of each encoder of a tower, in its order.

    Each is read at its last layer, without its final norm. Raises ModelError for an encoder that transformers' CLIP,
    SigLIP and DINOv2 cannot compute.
    """
    encoders = parts_of(tower.as_encoder())
    return [_held(tower if len(encoders) == 1 else VisionTower(tower.kind, encoder)) for encoder in encoders]


def _held(tower: VisionTower) -> Converted:
    reader: Any = tower.encoder
    if isinstance(reader, TimmReader) and _is_dinov2(reader.model) and len(reader.index) == 1:
        return _dinov2(tower, reader.model)
    return hf_tower(tower)


def _is_dinov2(model: Any) -> bool:
    """A plain vision transformer with layer scale, a class token and no norm before its blocks."""
    if type(model).__name__ != "VisionTransformer" or model.cls_token is None:
        return False
    return isinstance(model.norm_pre, nn.Identity) and not isinstance(model.blocks[0].ls1, nn.Identity)


def _dinov2(tower: VisionTower, model: Any) -> Converted:
    block, width = model.blocks[0], tower.dim
    unlike = {
        "a gated MLP": type(block.mlp).__name__ != "Mlp",
        "an activation other than GELU": not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none",
        "norms on queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
        "no bias in its attention": block.attn.qkv.bias is None,
        "a picture that is no square": tower.image_size[0] != tower.image_size[1],
        "its final norm applied": tower.normalize,
    }
    if any(unlike.values()):
        told = ", ".join(what for what, so in unlike.items() if so)
        problem, where = f"cannot be held: it has {told}, unlike DINOv2", f"vision tower {tower.name}"
        raise ModelError(problem, where=where, remedy="use the model from its own folder")
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features // width,
        "image_size": tower.image_size[0],
        "patch_size": model.patch_embed.proj.kernel_size[0],
        "layer_norm_eps": block.norm1.eps,
    }
    config: Any = Dinov2Config(**sizes)
    state = {"embeddings.cls_token": model.cls_token, "embeddings.mask_token": torch.zeros(1, width)}
    if model.reg_token is not None:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=model.reg_token.shape[1])
        state["embeddings.register_tokens"] = model.reg_token
    places = model.pos_embed
    if places.shape[1] == tower.grid[0] * tower.grid[1]:  # timm may give its class token no position
        places = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
    state["embeddings.position_embeddings"] = places
    for leaf in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{leaf}"] = getattr(model.patch_embed.proj, leaf)
        state[f"layernorm.{leaf}"] = torch.full((width,), float(leaf == "weight"))  # nobody reads it
    for number, layer in enumerate(model.blocks):
        state |= {f"encoder.layer.{number}.{key}": value for key, value in _block(layer).items()}
    return config, {key: value.detach().float().cpu().contiguous() for key, value in state.items()}


def _block(layer: Any) -> dict[str, torch.Tensor]:
    """The tensors of a block under the names of published DINOv2 checkpoints."""
    own = layer.state_dict()
    names = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names["attn.proj"] = "attention.output.dense"
    found = {f"layer_scale{n}.lambda1": own[f"ls{n}.gamma"] for n in (1, 2)}
    for leaf in ("weight", "bias"):
        found |= {f"{theirs}.{leaf}": own[f"{ours}.{leaf}"] for ours, theirs in names.items()}
        for name, part in zip(("query", "key", "value"), own[f"attn.qkv.{leaf}"].chunk(3), strict=True):
            found[f"attention.attention.{name}.{leaf}"] = part.clone()  # not a view: files hold whole tensors
    return found
