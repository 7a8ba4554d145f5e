"""A vision tower as a vision model of transformers: its config and its tensors.

Goes in: a tower of kind hf, open_clip or timm; for `held_towers`, by which a checkpoint keeps the encoders of an
imported model, also a fused one. Comes out: a vision config of exactly the blocks that run, so that what is read is
its last hidden state, and tensors under the names of published checkpoints: CLIP's and SigLIP's, and of timm's DINOv2
(arXiv:2304.07193, with registers arXiv:2309.16588) for a checkpoint alone. Refuses all others, naming what sets them
apart.

L blocks, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, Dinov2Config, Dinov2WithRegistersConfig, SiglipVisionConfig

from mmit.errors import ModelError
from mmit.models.vision import VisionTower
from mmit.models.vision_fused import parts_of
from mmit.models.vision_hf import HFReader
from mmit.models.vision_open_clip import ViTReader
from mmit.models.vision_timm import TimmReader

HELD = "llava-hf holds CLIP and SigLIP vision transformers"
Converted = tuple[Any, dict[str, torch.Tensor]]


def hf_tower(tower: VisionTower) -> Converted:
    """Return (vision config, tensors) of a tower, without the prefix `vision_model.`.

    Raises ModelError for a tower that transformers' CLIP and SigLIP cannot compute. A tower on the meta device gives
    shapes.
    """
    reader: Any = tower.encoder
    height, width = tower.image_size
    if tower.normalize:
        _refuse(tower, "its last layer is read after the final norm, which LLaVA's classes do not apply")
    if height != width:
        _refuse(tower, f"it takes pictures of {height} x {width}, and LLaVA's are square")
    if isinstance(reader, HFReader):
        return _from_hf(tower, reader)
    if isinstance(reader, ViTReader):
        return _from_open_clip(tower, reader.model)
    if isinstance(reader, TimmReader) and type(reader.model).__name__ == "VisionTransformer":
        return _from_timm(tower, reader.model)
    return _refuse(tower, f"its network is of the class {type(getattr(reader, 'model', reader)).__name__}")


def _refuse(tower: VisionTower, reason: str) -> Any:
    raise ModelError(
        f"cannot be exported: {reason}",
        where=f"vision tower {tower.kind} {tower.name}",
        remedy=f"{HELD}; export with --format mmit, or train with such a tower",
    )


def read_blocks(tower: VisionTower) -> tuple[int, ...]:
    """Numbers of the blocks that are read, in order; the highest is the last that runs."""
    reader: Any = tower.encoder
    return tuple(reader.blocks) if isinstance(reader, HFReader) else tuple(index + 1 for index in reader.index)


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, or as shapes alone on the meta device, where a tower is asked whether it can be written."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()


def _width(tower: VisionTower) -> int:
    """D of one block."""
    return tower.dim // len(read_blocks(tower))


def _identity_norm(width: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """The final norm, which the class has and nobody reads."""
    return {
        "post_layernorm.weight": torch.ones(width, dtype=like.dtype),
        "post_layernorm.bias": torch.zeros(width, dtype=like.dtype),
    }


def _from_hf(tower: VisionTower, reader: HFReader) -> Converted:
    core: Any = getattr(reader.model, "vision_model", reader.model)
    if not isinstance(core.config, (CLIPVisionConfig, SiglipVisionConfig)):
        _refuse(tower, f"its network is of the class {type(core).__name__}")
    config = copy.deepcopy(core.config)
    state = {key: _here(value) for key, value in core.state_dict().items()}
    # The tower interpolates its position table for its own image size; the class is given the result, and interpolates
    # nothing.
    if reader.resized:
        words = core.embeddings.position_embedding.weight
        with torch.no_grad():
            like = words.new_zeros(1, tower.grid[0] * tower.grid[1] + len(words) - core.embeddings.num_patches, 1)
            table = core.embeddings.interpolate_pos_encoding(like.expand(-1, -1, words.shape[1]), *tower.image_size)
        state["embeddings.position_embedding.weight"] = _here(table[0])
    config.image_size = tower.image_size[0]
    if isinstance(config, SiglipVisionConfig):
        config.vision_use_head = False
    return config, {**state, **_identity_norm(_width(tower), next(iter(state.values())))}


def _from_open_clip(tower: VisionTower, visual: Any) -> Converted:
    """CLIP's VisionTransformer of open_clip (arXiv:2103.00020) as transformers' CLIPVisionModel."""
    blocks = list(visual.transformer.resblocks)
    block = blocks[0]
    # What differs is refused from the modules, and not from the model's name: names of one family stand for several
    # designs.
    if visual.conv1.bias is not None or isinstance(visual.ln_pre, nn.Identity):
        _refuse(tower, "it has no norm before its blocks, or a bias in its patch embedding, unlike CLIP")
    if any(not isinstance(getattr(block, scale, nn.Identity()), nn.Identity) for scale in ("ls_1", "ls_2")):
        _refuse(tower, "its blocks scale their outputs (layer scale), unlike CLIP's")
    config = CLIPVisionConfig(
        hidden_size=_width(tower),
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=tower.image_size[0],
        patch_size=visual.conv1.kernel_size[0],
        hidden_act=_activation(tower, block.mlp.gelu),
        layer_norm_eps=block.ln_1.eps,
    )
    state = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        "pre_layrnorm.weight": visual.ln_pre.weight,
        "pre_layrnorm.bias": visual.ln_pre.bias,
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for number, layer in enumerate(blocks):
        own = layer.state_dict()
        attention = {"weight": own["attn.in_proj_weight"], "bias": own["attn.in_proj_bias"]}
        state.update(_block(number, own, names=names, attention=attention, out="attn.out_proj"))
    return config, _finish(state, tower)


def _from_timm(tower: VisionTower, model: Any) -> Converted:
    """CLIP's or SigLIP's (arXiv:2303.15343) vision transformer in timm as transformers' class of that name."""
    blocks = list(model.blocks)
    block, patches = blocks[0], model.patch_embed.proj
    clip = model.cls_token is not None and isinstance(model.norm_pre, nn.LayerNorm)
    kind = "CLIP" if clip else "SigLIP"
    config_class: Any = CLIPVisionConfig if clip else SiglipVisionConfig
    # A position for each patch, and in CLIP one for the class token before them.
    places = tower.grid[0] * tower.grid[1] + clip
    unlike = {
        "a class token and no norm before its blocks": model.cls_token is not None and not clip,
        "register tokens": getattr(model, "reg_token", None) is not None,
        "a norm before its blocks": not clip and not isinstance(model.norm_pre, nn.Identity),
        "layer scale": not isinstance(block.ls1, nn.Identity),
        "norms on queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
        "a bias in its patch embedding": clip and patches.bias is not None,
        "no bias in its patch embedding": not clip and patches.bias is None,
        "no bias in its attention": block.attn.qkv.bias is None,
        "no position for its class token": model.pos_embed.shape[1] != places,
    }
    if any(unlike.values()):
        _refuse(tower, f"it has {', '.join(what for what, so in unlike.items() if so)}, unlike {kind}")
    config = config_class(
        hidden_size=_width(tower),
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=tower.image_size[0],
        patch_size=patches.kernel_size[0],
        hidden_act=_activation(tower, block.mlp.act),
        layer_norm_eps=block.norm1.eps,
        **({} if clip else {"vision_use_head": False}),
    )
    state = {"embeddings.patch_embedding.weight": patches.weight}
    state["embeddings.position_embedding.weight"] = model.pos_embed[0]
    if clip:
        state["embeddings.class_embedding"] = model.cls_token[0, 0]
        state |= {"pre_layrnorm.weight": model.norm_pre.weight, "pre_layrnorm.bias": model.norm_pre.bias}
    else:
        state["embeddings.patch_embedding.bias"] = patches.bias
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for number, layer in enumerate(blocks):
        own = layer.state_dict()
        attention = {"weight": own["attn.qkv.weight"], "bias": own["attn.qkv.bias"]}
        state.update(_block(number, own, names=names, attention=attention, out="attn.proj"))
    return config, _finish(state, tower)


def _block(
    number: int,
    own: Mapping[str, torch.Tensor],
    *,
    names: Mapping[str, str],
    attention: Mapping[str, torch.Tensor],
    out: str,
) -> dict[str, torch.Tensor]:
    """Tensors of one block; `attention` holds q, k and v in one (3 D, ...) tensor each for weight and bias."""
    prefix = f"encoder.layers.{number}."
    state = {}
    for leaf in ("weight", "bias"):
        for theirs, hf in {**names, out: "self_attn.out_proj"}.items():
            state[f"{prefix}{hf}.{leaf}"] = own[f"{theirs}.{leaf}"]
        for name, part in zip("qkv", attention[leaf].chunk(3), strict=True):
            state[f"{prefix}self_attn.{name}_proj.{leaf}"] = part.clone()  # not a view: files hold whole tensors
    return state


def _finish(state: dict[str, torch.Tensor], tower: VisionTower) -> dict[str, torch.Tensor]:
    state = {key: _here(value).contiguous() for key, value in state.items()}
    return {**state, **_identity_norm(_width(tower), next(iter(state.values())))}


def _activation(tower: VisionTower, module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"
    # By the class's name: open_clip and timm each have classes of their own.
    known = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
    name = type(module).__name__
    return known[name] if name in known else _refuse(tower, f"its activation is {name}")


def held_towers(tower: VisionTower) -> list[Converted]:
    """Return (vision config, tensors) of each encoder of a tower, in its order.

    Each is read at its last layer, without its final norm. Raises ModelError for an encoder that transformers' CLIP,
    SigLIP and DINOv2 cannot compute.
    """
    encoders = parts_of(tower.as_encoder())
    return [_held(tower if len(encoders) == 1 else VisionTower(tower.kind, encoder)) for encoder in encoders]


def _held(tower: VisionTower) -> Converted:
    reader: Any = tower.encoder
    # DINOv2 first, since it is a vision transformer of timm's like the others, and only its layer scale tells them
    # apart.
    if isinstance(reader, TimmReader) and _is_dinov2(reader.model) and len(reader.index) == 1:
        return _dinov2(tower, reader.model)
    return hf_tower(tower)


def _is_dinov2(model: Any) -> bool:
    """A plain vision transformer with layer scale, a class token and no norm before its blocks."""
    if type(model).__name__ != "VisionTransformer" or model.cls_token is None:
        return False
    return isinstance(model.norm_pre, nn.Identity) and not isinstance(model.blocks[0].ls1, nn.Identity)


def _dinov2(tower: VisionTower, model: Any) -> Converted:
    # Of the first block: all blocks of these classes are built alike.
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
    # The mask token is used in pre-training alone; the class wants one, and zeros change nothing.
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
        state |= {f"encoder.layer.{number}.{key}": value for key, value in _dinov2_block(layer).items()}
    return config, {key: value.detach().float().cpu().contiguous() for key, value in state.items()}


def _dinov2_block(layer: Any) -> dict[str, torch.Tensor]:
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
