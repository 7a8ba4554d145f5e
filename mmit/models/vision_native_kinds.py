"""The families of vision encoders of native resolution: how each is read, cut and given its pictures' sizes.

C units of all pictures, K pictures, f = merge, p = patch in pixels, S = f * p, D = hidden size times layers read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface

from mmit.models.vision_encoder import CLIP_MEAN, CLIP_STD, Reader

SEGMENTS = "mmit_pictures"  # the attention function that keeps pictures apart
LIKE = 0.8  # share of the longest picture of a batch that every other one has at least


class NativeReader(Reader):
    """Normalised units (C, 3, S, S) and grids (K, 2) of units -> features (C, f * f, D), unit by unit.

    Args:
        model: the transformers model, cut.
        patch, merge: p and f. blocks: numbers of the blocks whose outputs are read.
    """

    native = True
    exact_buffers = True

    def __init__(self, model: Any, *, patch: int, merge: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.patch, self.merge, self.blocks = patch, merge, blocks

    def forward(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(C, 3, S, S), (K, 2) -> (C, f * f, D)."""
        f, p = self.merge, self.patch
        # (C, f, f, 3, p, p): the patches of each unit, row by row.
        patches = pixels.unflatten(3, (f, p)).unflatten(2, (f, p)).permute(0, 2, 4, 1, 3, 5)
        # Grids are read as numbers to cut pictures apart, and tensors without data have none.
        hidden = self.outline(patches) if without_data(pixels) else self.run(patches, grids)
        return hidden.reshape(len(pixels), f * f, -1)

    def run(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(C, f, f, 3, p, p), (K, 2) -> (C * f * f, D) in the order of the patches; each kind brings its own."""
        raise NotImplementedError

    def outline(self, patches: torch.Tensor) -> torch.Tensor:
        """As `run` on tensors without data, where a forecast counts operations and bytes.

        All units count as one picture, without windows, and positions, which cost little, are left out.
        """
        hidden = self.embedded(patches.flatten(0, 2))
        heads = getattr(self.model.config, "num_heads", None) or self.model.config.num_attention_heads
        angles = hidden.new_zeros(len(hidden), hidden.shape[1] // heads)
        ends = np.array([0, len(hidden)])  # no tensor: its numbers are read
        for block in self.stack():
            hidden = block(hidden, cu_seqlens=ends, position_embeddings=(angles, angles))
        return torch.cat([hidden] * len(self.blocks), dim=-1)

    def stack(self) -> Any:
        """The blocks."""
        raise NotImplementedError

    def embedded(self, flat: torch.Tensor) -> torch.Tensor:
        """(T, 3, p, p) -> (T, hidden size), positions left out."""
        raise NotImplementedError

    def to_raster(self, x: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(C * f * f, ...) unit by unit -> row by row of each picture."""
        f, out = self.merge, []
        for part, (rows, columns) in zip(split_pictures(x, grids, f), grids.tolist(), strict=True):
            out.append(part.unflatten(0, (rows, columns, f, f)).transpose(1, 2).flatten(0, 3))
        return torch.cat(out)

    def to_units(self, x: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        f, out = self.merge, []
        for part, (rows, columns) in zip(split_pictures(x, grids, f), grids.tolist(), strict=True):
            out.append(part.unflatten(0, (rows, f, columns, f)).transpose(1, 2).flatten(0, 3))
        return torch.cat(out)

    @contextmanager
    def watched(self, stack: Any) -> Iterator[Callable[[], list[torch.Tensor]]]:
        """Watch the blocks that are read; the callable gives their outputs, in the order in which they were named."""
        seen: dict[int, torch.Tensor] = {}

        def keep(block: int) -> Callable[..., None]:
            return lambda module, given, out: seen.__setitem__(block, out)

        handles = [stack[block - 1].register_forward_hook(keep(block)) for block in self.blocks]
        try:
            yield lambda: [seen[block] for block in self.blocks]
        finally:
            for handle in handles:
                handle.remove()


def without_data(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape alone."""
    return x.is_meta or isinstance(x, FakeTensor)


def frames(grids: torch.Tensor, merge: int) -> torch.Tensor:
    """(K, 2) grids of units -> (K, 3) frames, rows and columns of patches."""
    return F.pad(grids * merge, (1, 0), value=1)


def split_pictures(x: torch.Tensor, grids: torch.Tensor, merge: int) -> list[torch.Tensor]:
    """Cut (C * f * f, ...) into its pictures."""
    return list(x.split((grids.prod(1) * merge**2).tolist()))


def _apart(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (1, heads, T, head dim) within each picture; `attention_mask` (K,) holds their lengths."""
    if without_data(query):  # a forecast: all tokens count as one picture, as in `outline`
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling, dropout_p=dropout)
        return out.transpose(1, 2), None
    lengths = tuple(attention_mask.tolist())
    tables = [x[0].transpose(0, 1) for x in (query, key, value)]  # (T, heads, head dim)
    order, made = [], []
    for places, real in batches(lengths):
        tokens, seen = places.to(query.device), None if real is None else real.to(query.device)
        q, k, v = (table[tokens].transpose(1, 2) for table in tables)  # (G, heads, L, head dim)
        mask = None if seen is None else seen[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout, attn_mask=mask).transpose(1, 2)
        # Where each output belongs in the row; sorted once at the end, in place of a scatter for each batch.
        order.append(tokens.flatten() if seen is None else tokens[seen])
        made.append(out.flatten(0, 1) if seen is None else out[seen])
    return torch.cat(made)[torch.cat(order).argsort()][None], None


@functools.lru_cache(maxsize=8)
def batches(lengths: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Pictures of like length together.

    Returns:
        for each batch (G, L) places of its tokens in the row, padded with the row's first, and which of them are none
        of the padding; None where there is none
    """
    starts = np.cumsum([0, *lengths]).tolist()
    # Longest first, each with those of at least LIKE times its length: padding of one batch is bounded, and a few
    # batches serve any mix.
    groups: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and lengths[n] >= LIKE * lengths[groups[-1][0]]:
            groups[-1].append(n)
        else:
            groups.append([n])
    out = []
    for group in groups:
        longest = lengths[group[0]]
        places = torch.arange(longest)
        real = torch.tensor([lengths[n] for n in group])[:, None] > places
        tokens = torch.where(real, torch.tensor([starts[n] for n in group])[:, None] + places, 0)
        out.append((tokens, None if bool(real.all()) else real))
    return out


AttentionInterface.register(SEGMENTS, _apart)


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
