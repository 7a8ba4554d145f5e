"""The families of vision encoders of native resolution: how each is read, cut and given its pictures' sizes.

C units of all pictures, K pictures, f = merge, p = patch in pixels, S = f * p, D = hidden size times layers read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmit.models.vision_encoder import CLIP_MEAN, CLIP_STD
from mmit.models.vision_native_reader import SEGMENTS, NativeReader, frames, split_pictures

HALF = (0.5, 0.5, 0.5)


class NaFlexReader(NativeReader):
    """SigLIP 2 NaFlex (arXiv:2502.14786); its pictures lie side by side in one row, not padded to the largest."""

    def run(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.run`."""
        core = getattr(self.model, "vision_model", self.model)
        embeddings = core.embeddings
        # Its patches have the channel last.
        flat = patches.flatten(0, 2).permute(0, 2, 3, 1).flatten(1)
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.reshape(side, side, -1)
        known: dict[tuple[int, int], torch.Tensor] = {}
        shapes = [(rows, columns) for rows, columns in (grids * self.merge).tolist()]
        for rows, columns in dict.fromkeys(shapes):
            shape = torch.tensor([[rows, columns]], device=flat.device)
            known[rows, columns] = embeddings.resize_positional_embeddings(table, shape, max_length=rows * columns)[0]
        places = [known[shape] for shape in shapes]
        hidden = embeddings.patch_embedding(flat) + self.to_units(torch.cat(places), grids)
        lengths = grids.prod(1) * self.merge**2
        states = {}
        hidden = hidden[None]
        for number, layer in enumerate(core.encoder.layers, 1):
            out = layer(hidden, lengths)  # the attention function takes lengths where others take a mask
            hidden = out[0] if isinstance(out, tuple) else out
            states[number] = hidden
        if len(self.blocks) == 1:
            return core.post_layernorm(hidden)[0]
        return torch.cat([states[block][0] for block in self.blocks], dim=-1)

    def outline(self, patches: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.outline`."""
        core = getattr(self.model, "vision_model", self.model)
        hidden = core.embeddings.patch_embedding(patches.flatten(0, 2).flatten(1))[None]
        for layer in core.encoder.layers:
            out = layer(hidden, np.array([hidden.shape[1]]))
            hidden = out[0] if isinstance(out, tuple) else out
        return torch.cat([hidden[0]] * len(self.blocks), dim=-1)


class Joined(nn.Module):
    """Stands where a Qwen ViT has its merger: only joins the patches of a unit, of all layers that are read."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = patches
        self.states: Callable[[], list[torch.Tensor]] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(C * f * f, D) -> (C, f * f * D)."""
        hidden = hidden if self.states is None else torch.cat(self.states(), dim=-1)
        return hidden.reshape(len(hidden) // self.patches, -1)


class QwenReader(NativeReader):
    """Qwen2.5-VL's (arXiv:2502.13923) and Qwen3-VL's ViT; a picture is a film of one frame, shown twice."""

    def run(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.run`."""
        times = self.model.config.temporal_patch_size
        flat = patches.flatten(0, 2).unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1)
        # Its model puts the patches of a unit side by side, and the windows of Qwen2.5-VL back in order by units.
        with self.watched(self.stack()) as states:
            self.model.merger.states = states if len(self.blocks) > 1 else None
            out = self.model(flat, grid_thw=frames(grids, self.merge))
            self.model.merger.states = None
        merged = out if isinstance(out, torch.Tensor) else out.pooler_output
        return merged.unflatten(1, (self.merge**2, -1)).flatten(0, 1)

    def stack(self) -> Any:
        """See `NativeReader.stack`."""
        return self.model.blocks

    def embedded(self, flat: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.embedded`."""
        return self.model.patch_embed(torch.stack([flat] * self.model.config.temporal_patch_size, dim=2).flatten(1))


class MoonViTReader(NativeReader):
    """MoonViT (arXiv:2504.07491), as Kimi-K2.5 has it; its final norm belongs to the last layer."""

    def run(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.run`."""
        flat = self.to_raster(patches.flatten(0, 2), grids)
        with self.watched(self.stack()) as states:
            hidden = self.model(flat, grid_thw=frames(grids, self.merge)).last_hidden_state
            if len(self.blocks) > 1:
                hidden = torch.cat(states(), dim=-1)
        return self.to_units(hidden, grids)

    def stack(self) -> Any:
        """See `NativeReader.stack`."""
        return self.model.layers

    def embedded(self, flat: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.embedded`."""
        return self.model.patch_embed.proj(flat).flatten(1)


class PixtralReader(NativeReader):
    """Pixtral's ViT (arXiv:2410.07073), one picture a call: its own mask is as large as all pictures together."""

    def run(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.run`."""
        flat = self.to_raster(patches.flatten(0, 2), grids)
        shapes, made = (grids * self.merge).tolist(), []
        for part, (rows, columns) in zip(split_pictures(flat, grids, self.merge), shapes, strict=True):
            whole = part.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            with self.watched(self.stack()) as states:
                last = self.model(whole[None]).last_hidden_state
                made.append(last[0] if len(self.blocks) == 1 else torch.cat(states(), dim=-1)[0])
        return self.to_units(torch.cat(made), grids)

    def stack(self) -> Any:
        """See `NativeReader.stack`."""
        return self.model.transformer.layers

    def outline(self, patches: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.outline`."""
        hidden = self.model.ln_pre(self.model.patch_conv(patches.flatten(0, 2)).flatten(1))[None]
        angles = hidden.new_zeros(hidden.shape[1], hidden.shape[2] // self.model.config.num_attention_heads)
        for block in self.stack():
            out = block(hidden, None, position_embeddings=(angles, angles))
            hidden = out[0] if isinstance(out, tuple) else out
        return torch.cat([hidden[0]] * len(self.blocks), dim=-1)


@dataclass(frozen=True)
class Kind:
    """What sets one family apart: its reader, its rule for sizes, and how its model is cut.

    Attributes:
        layer: read by default. constants, limits: of its image processor, where a folder has no
            preprocessor_config.json. cut: (model, blocks that run, whether the last is among them, normalize).
        keys: prefixes of its weights in a whole model's file.
    """

    reader: type[NativeReader]
    rule: str
    layer: int
    constants: Mapping[str, Any]
    limits: Mapping[str, int]
    cut: Callable[..., None]
    keys: str


def _cut_naflex(model: Any, blocks: int, *, last: bool, normalize: bool) -> None:
    core = getattr(model, "vision_model", model)
    core.encoder.layers = core.encoder.layers[:blocks]
    if not normalize:
        core.post_layernorm = nn.Identity()
    if hasattr(core, "head"):
        core.use_head = False
        del core.head
    core.config._attn_implementation = SEGMENTS


def _cut_qwen(model: Any, blocks: int, *, last: bool, normalize: bool) -> None:
    model.blocks = model.blocks[:blocks]
    model.merger = Joined(model.spatial_merge_size**2)
    if hasattr(model, "deepstack_merger_list"):
        model.deepstack_visual_indexes, model.deepstack_merger_list = [], nn.ModuleList()


def _cut_pixtral(model: Any, blocks: int, *, last: bool, normalize: bool) -> None:
    model.transformer.layers = model.transformer.layers[:blocks]


def _cut_moonvit(model: Any, blocks: int, *, last: bool, normalize: bool) -> None:
    model.layers = model.layers[:blocks]
    if not last:
        model.final_layernorm = nn.Identity()


_HALVES = {"mean": HALF, "std": HALF}
_NAFLEX = Kind(
    NaFlexReader,
    "naflex",
    -2,
    {**_HALVES, "interpolation": "bilinear"},
    {"max_patches": 256},
    _cut_naflex,
    r"^(vision_model\.)",
)
_MOONVIT = Kind(
    MoonViTReader,
    "moonvit",
    -1,
    {**_HALVES, "interpolation": "bicubic"},
    {"max_patches": 16384, "max_side": 512},
    _cut_moonvit,
    r"^(model\.)?vision_tower\.",
)
_QWEN2 = Kind(
    QwenReader,
    "qwen",
    -1,
    {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"},
    {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280},
    _cut_qwen,
    r"^(model\.)?visual\.",
)
_QWEN3 = replace(
    _QWEN2,
    constants={**_HALVES, "interpolation": "bicubic"},
    limits={"min_pixels": 256 * 256, "max_pixels": 4096 * 4096},
)
_PIXTRAL = Kind(
    PixtralReader,
    "pixtral",
    -1,
    {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"},
    {"max_edge": 1024},
    _cut_pixtral,
    r"^(model\.)?vision_tower\.",
)
# Names of transformers' classes.
NATIVE: dict[str, Kind] = {
    "Siglip2VisionModel": _NAFLEX,
    "Qwen2VisionTransformerPretrainedModel": _QWEN2,
    "Qwen2_5_VisionTransformerPretrainedModel": _QWEN2,
    "Qwen3VLVisionModel": _QWEN3,
    "Qwen3VLMoeVisionModel": _QWEN3,
    "Qwen3_5VisionModel": _QWEN3,
    "Qwen3_5MoeVisionModel": _QWEN3,
    "Kimi_K25VisionModel": _MOONVIT,
    "PixtralVisionModel": _PIXTRAL,
}
# model_type of a whole model or of its vision part -> class
NATIVE_TYPES = {
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "qwen2_vl": "Qwen2VisionTransformerPretrainedModel",
    "qwen2_vl_vision": "Qwen2VisionTransformerPretrainedModel",
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen2_5_vl_vision": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
    "qwen3_vl_vision": "Qwen3VLVisionModel",
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
    "qwen3_vl_moe_vision": "Qwen3VLMoeVisionModel",
    "qwen3_5": "Qwen3_5VisionModel",
    "qwen3_5_vision": "Qwen3_5VisionModel",
    "qwen3_5_moe": "Qwen3_5MoeVisionModel",
    "qwen3_5_moe_vision": "Qwen3_5MoeVisionModel",
    "kimi_k25": "Kimi_K25VisionModel",
    "kimi_k25_vision": "Kimi_K25VisionModel",
    "mistral3": "PixtralVisionModel",
    "pixtral": "PixtralVisionModel",
}
