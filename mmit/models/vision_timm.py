"""Vision encoders from timm: plain transformers read at a block, everything else at a feature stage.

Goes in: a timm model name and where its weights are. Comes out: an Encoder cut above the layer that is read,
its head gone. Also reads the timm trunks inside open_clip models (SigLIP). Refuses models that cannot return
features from the middle.

B images, h x w patches, N = tokens, D = width of the layer that is read.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmit.errors import ModelError
from mmit.models.fakes import CpuFakes
from mmit.models.files import load_tensors, resolve_file
from mmit.models.vision_encoder import (
    Encoder,
    Layer,
    Origin,
    Reader,
    Reading,
    blocks_to_run,
    check_norm,
    explained,
    layers_to_read,
    load_needed,
    one_or_more,
    pair,
    pair_by_order,
    single_layer,
    stage_to_read,
)


class _Maps(nn.Module):
    """The maps of a reader, (B, 3, H, W) -> (B, D, h, w)."""

    def __init__(self, reader: TimmReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `TimmReader.features`."""
        return self.reader.features(pixels)[0]


class TimmReader(Reader):
    """Normalised pixels (B, 3, H, W) -> features (B, N, D) of one layer of a timm model."""

    def __init__(
        self, model: nn.Module, *, index: tuple[int, ...], normalize: bool, with_cls: bool, stages: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.index, self.normalize, self.with_cls, self.stages = index, normalize, with_cls, stages
        self.channels_last = False

    def set_frozen(self, frozen: bool) -> None:
        """Keep a frozen convolutional model channels-last, and a trained one in torch's default layout."""
        # Channels-last EfficientNet runs 1.7x faster on CPU, and the tokens come out contiguous. A backward
        # pass in that layout can corrupt memory (torch 2.15, fastvit_t8 on CPU), so training avoids it.
        self.channels_last = frozen and self.stages
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)

    def features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the layers as a map (B, D, h, w), and their CLS token (B, 1, D) where that is read."""
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        extra = {"return_prefix_tokens": True} if self.with_cls else {}
        found = self.model.forward_intermediates(  # type: ignore[operator]
            pixels,
            indices=sorted(self.index),
            norm=self.normalize,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
            **extra,
        )
        layers = [found[sorted(self.index).index(index)] for index in self.index]
        if not self.with_cls:
            return layers[0] if len(layers) == 1 else torch.cat(layers, dim=1), None
        # The class token comes first; register tokens, where there are any, follow it and are not features.
        maps, tokens = zip(*((layer[0], layer[1][:, :1]) for layer in layers), strict=True)
        return torch.cat(maps, dim=1), torch.cat(tokens, dim=2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        feature_map, cls_token = self.features(pixels)
        tokens = feature_map.flatten(2).transpose(1, 2)
        return tokens if cls_token is None else torch.cat([cls_token, tokens], dim=1)


def timm_encoder(name: str, reading: Reading) -> Encoder:
    """Build an encoder from a timm name, or from `hf-hub:org/repo` / `local-dir:/folder`.

    `reading.weights` is None (random for a name, its own for a hub or folder name), True (timm's own), False (random)
    or a file.
    """
    import timm
    from timm.data import resolve_data_config

    weights = reading.weights
    _check_name(name, timm.list_models(), timm.list_pretrained())
    pretrained = weights is True or (weights is None and ":" in name)
    with explained(f"timm {name}", remedy="without a network, give a weight file that is already here"):
        model: Any = timm.create_model(name, pretrained=pretrained)
    facts = resolve_data_config(model=model)
    tensors = None
    if isinstance(weights, str):
        path = resolve_file(weights)
        tensors = load_tensors(path)
        full = {key: value.shape for key, value in model.state_dict().items()}
        if reading.key_order:
            tensors = pair_by_order(tensors, full=full, where=str(path))
    weights_id = weights if isinstance(weights, str) else "timm" if pretrained else "random"
    # Of the name only the architecture: a tag (`.openai`) names weights, which the fingerprint reads by themselves.
    identity = json.dumps(["timm", model.default_cfg.get("architecture") or name.split(".")[0]])
    origin = Origin(name, weights_id, identity, facts)
    return cut_timm(model, reading, origin=origin, built_size=tuple(facts["input_size"][1:]), tensors=tensors)


def cut_timm(
    model: Any,
    reading: Reading,
    *,
    origin: Origin,
    built_size: tuple[int, int],
    tensors: dict[str, torch.Tensor] | None = None,
) -> Encoder:
    """Cut a timm model above the layer that is read, load weights into what is left, and measure what it gives.

    A model whose blocks all keep one resolution is read at a block (default -2); any other one at a feature
    stage (default -1).

    Args:
        model: as timm built it, with its head.
        reading: layer, select, image_size and normalize count.
        origin: what the encoder states of itself.
        built_size: (H, W) that the model was built for.
        tensors: of the whole model, under its keys; None where the weights are in it already.

    Raises:
        ModelError: no such layer, no class token, no norm to apply, or weights that do not fit.
    """
    where = f"timm {origin.name}"
    # Blocks or stages: what a layer number means depends on whether the encoder keeps one resolution.
    layer, index, total, plain = _locate(model, reading.layer, where)
    if reading.with_cls and getattr(model, "cls_token", None) is None:
        raise ModelError("this encoder has no CLS token", where=where, remedy="use select: patch")
    check_norm(reading.normalize, last=index == (total - 1,), norm=getattr(model, "norm", None), where=where)

    # Keys and shapes are taken before the cut: a file holds the whole model, and unknown keys are told by these.
    full = {key: value.shape for key, value in model.state_dict().items()}
    if hasattr(model, "prune_intermediate_layers"):
        model.prune_intermediate_layers([max(index)], prune_norm=not reading.normalize, prune_head=True)
    if tensors is not None:
        load_needed(model, tensors, full=full, where=f"{where}, weights {origin.weights_id}")
    # After loading: the file's position embeddings have the size the model was built for, and are interpolated here.
    size = pair(reading.image_size or built_size)
    if size != pair(built_size) and hasattr(model, "set_input_size"):
        with explained(where, remedy=f"the encoder's own image size is {built_size}"):
            model.set_input_size(img_size=size)

    read = {"normalize": reading.normalize, "with_cls": reading.with_cls}
    reader = TimmReader(model.eval(), index=index, stages=not plain, **read)
    dim, grid = _measure(reader, size, where=where)
    return Encoder(
        reader=reader,
        layer=layer,
        normalize=reading.normalize,
        image_size=size,
        grid=grid,
        prefix=int(reading.with_cls),
        dim=dim,
        **origin.facts(),
    )


def _locate(model: Any, layer: int | Sequence[int] | None, where: str) -> tuple[Layer, tuple[int, ...], int, bool]:
    """Return the layer, the indices among all intermediates, their number, and whether they are blocks."""
    if not hasattr(model, "forward_intermediates"):
        raise ModelError(
            "this timm model cannot return features from the middle",
            where=where,
            remedy="choose one with forward_intermediates: most vit_*, eva*, convnext*, "
            "*efficientnet*, resnet*, swin* have it",
        )
    stages = [stage["reduction"] for stage in _stages(model)]
    total = len(stages)
    if len(set(stages)) == 1:
        layers = layers_to_read(layer, -2, where=where)
        indices = tuple(blocks_to_run(one, total, where=where) - 1 for one in layers)
        return one_or_more(layers), indices, total, True
    stage = single_layer(layer, where=where)
    stage = -1 if stage is None else stage
    return stage, (stage_to_read(stage, total, where=where),), total, False


def _stages(model: Any) -> list[dict[str, Any]]:
    """What timm says of each block or stage: its reduction of the picture and its channels, under num_chs."""
    return list(getattr(model.feature_info, "info", model.feature_info))


def _measure(reader: TimmReader, size: tuple[int, int], *, where: str) -> tuple[int, tuple[int, int]]:
    """Return (D, (h, w)) by a dry run, which costs neither arithmetic nor memory."""
    remedy = f"this encoder cannot take images of {size[0]} x {size[1]}; leave image_size out to use its own"
    wanted = reader.index
    if len({(stage["reduction"], stage["num_chs"]) for stage in _stages(reader.model)}) == 1:
        reader.index = (0,)  # every block gives the same shape, so the first is enough
    try:
        with explained(where, remedy=remedy), torch.no_grad():
            dim, height, width = _shape_of_map(reader, size)
    finally:
        layers, reader.index = len(wanted) // len(reader.index), wanted
    return int(dim) * layers, (int(height), int(width))


def _shape_of_map(reader: TimmReader, size: tuple[int, int]) -> torch.Size:
    """(D, h, w) of the features: on the meta device, or on fake tensors, which take several times as long."""
    whole = _Maps(reader)
    weights = {k: v.detach().to("meta") for k, v in (*whole.named_parameters(), *whole.named_buffers())}
    try:
        maps = torch.func.functional_call(whole, weights, (torch.zeros(1, 3, *size, device="meta"),))
    except (RuntimeError, NotImplementedError):  # a tensor that is neither parameter nor buffer stays on the CPU
        with CpuFakes(allow_non_fake_inputs=True):
            maps = reader.features(torch.zeros(1, 3, *size))[0]
    return maps.shape[1:]


def _check_name(name: str, names: list[str], tagged: list[str]) -> None:
    architecture = name.split(".")[0]
    if ":" in name or (architecture in names and ("." not in name or name in tagged)):
        return  # a name such as hf-hub:org/repo is looked up by timm itself
    if architecture in names:
        tags = [entry for entry in tagged if entry.startswith(f"{architecture}.")]
        raise ModelError("timm has no such weights", where=name, remedy=f"valid: {', '.join(tags) or architecture}")
    close = difflib.get_close_matches(architecture, names, n=5, cutoff=0.5)
    raise ModelError(
        "timm has no such model",
        where=name,
        remedy=f"did you mean {', '.join(close) or '?'}? timm.list_models() lists all {len(names)}",
    )
