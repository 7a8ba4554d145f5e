"""Vision encoders of native resolution from transformers: SigLIP 2 NaFlex, Qwen2.5-VL's and Qwen3-VL's ViT, MoonViT.

Goes in: a hub id or folder of the whole model or of its vision part, or the dict of a vision config. Comes out: an
Encoder that takes pictures of any size as units, blocks of merge x merge patches. Pictures of one call never attend to
each other. What stands above the layer that is read is gone, the merger into the width of the model's own LLM too.

C units of all pictures, K pictures, f = merge, p = patch in pixels, S = f * p, D = hidden size times layers read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface

from mmit.errors import ModelError, nearest
from mmit.models.vision_encoder import (
    CLIP_MEAN,
    CLIP_STD,
    Encoder,
    Reader,
    blocks_to_run,
    check_norm,
    explained,
    layers_to_read,
    one_or_more,
    quiet_loading,
    triple,
)

SEGMENTS = "mmit_pictures"  # the attention function that keeps pictures apart
HALF = (0.5, 0.5, 0.5)
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

    def _to_raster(self, x: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(C * f * f, ...) unit by unit -> row by row of each picture."""
        f, out = self.merge, []
        for part, (rows, columns) in zip(_split(x, grids, f), grids.tolist(), strict=True):
            out.append(part.unflatten(0, (rows, columns, f, f)).transpose(1, 2).flatten(0, 3))
        return torch.cat(out)

    def _to_units(self, x: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        f, out = self.merge, []
        for part, (rows, columns) in zip(_split(x, grids, f), grids.tolist(), strict=True):
            out.append(part.unflatten(0, (rows, f, columns, f)).transpose(1, 2).flatten(0, 3))
        return torch.cat(out)

    @contextmanager
    def _watched(self, stack: Any) -> Iterator[Callable[[], list[torch.Tensor]]]:
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
        hidden = embeddings.patch_embedding(flat) + self._to_units(torch.cat(places), grids)
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
        with self._watched(self.stack()) as states:
            self.model.merger.states = states if len(self.blocks) > 1 else None
            out = self.model(flat, grid_thw=_frames(grids, self.merge))
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
        flat = self._to_raster(patches.flatten(0, 2), grids)
        with self._watched(self.stack()) as states:
            hidden = self.model(flat, grid_thw=_frames(grids, self.merge)).last_hidden_state
            if len(self.blocks) > 1:
                hidden = torch.cat(states(), dim=-1)
        return self._to_units(hidden, grids)

    def stack(self) -> Any:
        """See `NativeReader.stack`."""
        return self.model.layers

    def embedded(self, flat: torch.Tensor) -> torch.Tensor:
        """See `NativeReader.embedded`."""
        return self.model.patch_embed.proj(flat).flatten(1)


def without_data(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape alone."""
    return x.is_meta or isinstance(x, FakeTensor)


def _frames(grids: torch.Tensor, merge: int) -> torch.Tensor:
    """(K, 2) grids of units -> (K, 3) frames, rows and columns of patches."""
    return F.pad(grids * merge, (1, 0), value=1)


def _split(x: torch.Tensor, grids: torch.Tensor, merge: int) -> list[torch.Tensor]:
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
# Names of transformers' classes.
NATIVE: dict[str, Kind] = {
    "Siglip2VisionModel": _NAFLEX,
    "Qwen2_5_VisionTransformerPretrainedModel": _QWEN2,
    "Qwen3VLVisionModel": _QWEN3,
    "Qwen3_5VisionModel": _QWEN3,
    "Kimi_K25VisionModel": _MOONVIT,
}
# model_type of a whole model or of its vision part -> class
NATIVE_TYPES = {
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen2_5_vl_vision": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
    "qwen3_vl_vision": "Qwen3VLVisionModel",
    "qwen3_5": "Qwen3_5VisionModel",
    "qwen3_5_vision": "Qwen3_5VisionModel",
    "kimi_k25": "Kimi_K25VisionModel",
    "kimi_k25_vision": "Kimi_K25VisionModel",
}


def native_encoder(  # noqa: PLR0913
    name: str | Mapping[str, Any],
    config: Any,
    class_name: str,
    *,
    weights: str | bool | None,
    layer: int | Sequence[int] | None,
    select: str,
    image_size: Any,
    normalize: bool,
    limits: Mapping[str, Any],
    where: str,
) -> Encoder:
    """Build an encoder of native resolution.

    Args:
        name: hub id, folder, or the dict of a vision config. config: its vision config. class_name: a key of NATIVE.
        weights, layer, select, normalize: see `build_vision`.
        limits: min_pixels and max_pixels of a picture, and for NaFlex `merge`, in place of the published ones.

    Raises:
        ModelError: options it does not have, or weights that are missing.
    """
    kind = NATIVE[class_name]
    if image_size is not None:
        raise ModelError(
            "takes pictures at their own size, so there is no image_size",
            where=where,
            remedy="remove model.vision.image_size; model.vision.native.max_pixels bounds a picture",
        )
    if select != "patch":
        raise ModelError("this encoder has no CLS token", where=where, remedy="use select: patch")
    total = getattr(config, "depth", None) or config.num_hidden_layers
    layers = layers_to_read(layer, kind.layer, where=where)
    blocks = tuple(blocks_to_run(one, total, where=where) for one in layers)
    model, weights_id = _model(name, class_name, config=config, kind=kind, weights=weights, where=where)
    core = getattr(model, "vision_model", model)
    check_norm(normalize, last=blocks == (total,), norm=getattr(core, "post_layernorm", None), where=where)
    kind.cut(model, max(blocks), last=blocks == (total,), normalize=normalize)
    rule, constants = _rule(name, config, kind, limits, where=where)
    patch, merge = rule["patch"], rule["merge"]
    return Encoder(
        reader=kind.reader(model, patch=patch, merge=merge, blocks=blocks),
        name=name if isinstance(name, str) else class_name,
        weights_id=weights_id,
        identity=_identity(class_name, config),
        layer=one_or_more(layers),
        normalize=normalize,
        image_size=(patch * merge, patch * merge),
        grid=(merge, merge),
        prefix=0,
        dim=config.hidden_size * len(blocks),
        mean=triple(constants["mean"]),
        std=triple(constants["std"]),
        interpolation=str(constants["interpolation"]),
        native=rule,
    )


def native_class(name: str) -> Any:
    """The class of transformers that a key of NATIVE names."""
    import transformers

    if hasattr(transformers, name):
        return getattr(transformers, name)
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # its encoder is not among the names of 5.17

    return getattr(modeling_qwen2_5_vl, name)


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
    bad = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if bad:
        raise ModelError(
            f"{len(bad)} tensors are missing or of another shape: {', '.join(bad[:4])}",
            where=where,
            remedy="the checkpoint is not a complete vision model of this config",
        )
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
        count = stated.get("max_patches") or stated.get("max_num_patches") or kind.limits["max_patches"]
        own["max_pixels"] = int(count) * patch**2
    size = stated.get("size") or {}
    for key, told in {
        "min_pixels": stated.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": stated.get("max_pixels") or size.get("longest_edge"),
        "max_side": size.get("max_height"),
    }.items():
        if key in own and told:
            own[key] = int(told)
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
