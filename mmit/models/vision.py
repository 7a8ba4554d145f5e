"""The vision tower: uint8 images in, features of one layer of a vision encoder out.

Owns the one interface over open_clip, timm and transformers encoders: normalisation with the encoder's own
constants, freezing, and the fingerprint that keys a feature cache. Runs nothing above the layer that is read.
Refuses float pixels, so that constants cannot be applied twice.

B images, H x W pixels, h x w patches, N = tokens, D = encoder width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.vision_encoder import SELECT, Encoder, Reader, Reading
from mmit.models.vision_fused import fuse
from mmit.models.vision_hf import hf_encoder
from mmit.models.vision_open_clip import open_clip_encoder
from mmit.models.vision_timm import timm_encoder
from mmit.plugins import FORM, calling, is_spec, own_function, source_hash

FUSED = "fused"
ENCODERS: dict[str, Any] = {"open_clip": open_clip_encoder, "timm": timm_encoder, "hf": hf_encoder}


def build_vision(
    kind: str,
    name: str | Mapping[str, Any],
    *,
    towers: Sequence[Mapping[str, Any]] = (),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> VisionTower:
    """Build a frozen vision tower.

    Args:
        kind: "open_clip", "timm" or "hf"; `module:name` of a builder of the user's own (see `vision`); or "fused",
            whose `towers` are named in place of everything else.
        name: an open_clip architecture, `hf-hub:org/repo` or `local-dir:/folder`; a timm model name; a
            transformers hub id or folder, or the dict of a CLIP / SigLIP vision config.
        towers: of kind fused, the arguments of each: kind, name, and where they are not the default weights, layer,
            image_size and key_order.
        dtype: of the weights and of the features.
        options: fields of `Reading`:
            weights: a file (`path` or `package:some_package/file`); a pretrained tag (open_clip); True for what
                the library publishes under that name; False for random. None takes the weights a hub id or folder
                brings, and random ones for a bare architecture.
            layer: of a transformer, counted as Hugging Face's `hidden_states` for every kind: 1 is the output of
                the first block, -1 of the last; default -2, as LLaVA (arXiv:2310.03744). Of an encoder whose
                stages shrink the picture (convolutions, Swin), the stage counted from 0; default -1, as of Qwen's
                ViT and MoonViT. A list of a transformer's layers joins their features, in that order, along D.
            select: "patch" leaves the CLS token out, "cls_patch" puts it first.
            image_size: side or (H, W) when it is not the encoder's own; position embeddings are interpolated.
            normalize: apply the encoder's final norm, which is possible at the last layer only.
            key_order: timm only; name the tensors of a weight file by their order.
            native: of encoders of native resolution, min_pixels, max_pixels and merge (see `vision_native`).

    Raises:
        ModelError: unknown kind, name, tag, layer or option (with the nearest valid one), weights that do not
            fit or were trained with another activation.
    """
    reading = Reading(**options)
    if kind == FUSED:
        if replace(reading, native=reading.native or None) != Reading():
            problem = "layer, weights, select, image_size and native belong to each of the towers"
            raise ModelError(problem, where="fused", remedy="set them under towers")
        fused = VisionTower(kind, fuse([_encoder(**tower) for tower in towers])).to(dtype)
        fused.own_code = _own_code(*(tower["kind"] for tower in towers))
        return fused
    if towers:
        raise ModelError("towers is for kind fused", where=f"{kind} {name}", remedy="remove it, or set kind: fused")
    tower = VisionTower(kind, _encoder(kind, name, **options)).to(dtype)
    tower.own_code = _own_code(kind)
    return tower


def _own_code(*kinds: str) -> list[str]:
    return [source_hash(kind, where="model.vision.kind") for kind in kinds if is_spec(kind)]


def _encoder(kind: str, name: str | Mapping[str, Any], **options: Any) -> Encoder:
    """One encoder of a library; see `build_vision`."""
    reading, where = Reading(**options), f"{kind} {name}"
    if kind not in ENCODERS and not is_spec(kind):
        remedy = f"{nearest(kind, [*ENCODERS, FUSED])}, or {FORM} of your own"
        raise ModelError(f"unknown vision kind '{kind}'", remedy=remedy)
    if reading.select not in SELECT:
        remedy = nearest(reading.select, SELECT)
        raise ModelError(f"unknown select '{reading.select}'", where=where, remedy=remedy)
    # What one library alone knows is refused here for the others, or a key that does nothing would look obeyed.
    if reading.native and kind != "hf":
        raise ModelError("native is for kind hf", where=where, remedy="remove model.vision.native")
    if reading.key_order and (kind != "timm" or not isinstance(reading.weights, str)):
        raise ModelError("key_order is for a timm model with a weight file", where=where, remedy="leave key_order out")
    if not isinstance(name, str) and kind != "hf":
        raise ModelError("only kind hf takes a config dict", where=kind, remedy="give the name of an architecture")
    build = ENCODERS[kind] if kind in ENCODERS else own_builder(kind)
    return build(name, reading)


class VisionTower(nn.Module):
    """A vision encoder cut at the layer that is read, frozen until `unfreeze()`.

    Attributes: kind, name, weights_id, layer, image_size (H, W), grid (h, w), prefix (1 with a CLS token in
    front, else 0), tokens N = prefix + h*w, dim D, mean, std, interpolation, trainable, native (the rule by which
    pictures of any size become patches, see `data.native`; None for a tower of one size), own_code (hashes of the code
    of builders that are the user's own, which a feature cache needs besides `fingerprint`).

    To a tower of native resolution a unit of patches is what a whole picture is to others: image_size is its side,
    grid its patches, and pictures come as their units with their grids.
    """

    _constants: torch.Tensor  # (2, 3, 1, 1) float32: mean and standard deviation of the colours

    def __init__(self, kind: str, encoder: Encoder) -> None:
        super().__init__()
        self.kind, self.name, self.weights_id = kind, encoder.name, encoder.weights_id
        self.layer, self.normalize, self.identity = encoder.layer, encoder.normalize, encoder.identity
        self.image_size, self.grid = encoder.image_size, encoder.grid
        self.prefix, self.dim = encoder.prefix, encoder.dim
        self.tokens = encoder.prefix + encoder.grid[0] * encoder.grid[1]
        self.mean, self.std, self.interpolation = encoder.mean, encoder.std, encoder.interpolation
        self.native = None if encoder.native is None else dict(encoder.native)
        self._made = encoder
        self.own_code: list[str] = []
        self.own_constants = encoder.reader.own_constants
        self.encoder: Any = encoder.reader  # a Reader, in PEFT's wrapper where LoRA trains it
        # Some encoders carry fixed tables as parameters; unfreezing must not start to train those.
        self._learned = [name for name, weight in self.encoder.named_parameters() if weight.requires_grad]
        # A buffer, since made in each forward pass the host would wait for its copy to the device.
        self.register_buffer("_constants", torch.tensor([self.mean, self.std]).view(2, 3, 1, 1), persistent=False)
        self.trainable = self.adapted = False
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the features."""
        return next(self.encoder.parameters()).dtype

    def freeze(self) -> None:
        """Stop training the encoder: no gradients, eval mode whatever the parent does."""
        self.trainable = self.adapted = False
        self.encoder.requires_grad_(False)
        self.encoder.set_frozen(True)
        self.eval()

    def unfreeze(self) -> None:
        """Train the encoder: gradients flow, and train() and eval() act on it."""
        self.trainable, self.adapted = True, False
        self.encoder.set_frozen(False)
        for name in self._learned:
            self.encoder.get_parameter(name).requires_grad_(True)
        self.train()

    def adapt(self, names: Iterable[str]) -> None:
        """Train these parameters of the encoder, and whatever was put into it.

        The tower stays in eval mode: running statistics must not move, for a checkpoint would not hold them.
        """
        self.trainable = self.adapted = True
        self.encoder.set_frozen(False)
        for name in set(names) & set(self._learned):
            self.encoder.get_parameter(name).requires_grad_(True)
        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> VisionTower:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A cast to the tower's dtype reaches buffers too; these stay what they are, beside the weights.
        place = self._constants.device
        self._constants = torch.tensor([self.mean, self.std], device=place).view(2, 3, 1, 1)
        return self

    def train(self, mode: bool = True) -> VisionTower:
        """Switch to train mode only when trainable: frozen batch norm and dropout must not wake up."""
        # Called by every `train()` of a parent, so the tower itself must know better.
        super().train(mode and self.trainable and not self.adapted)
        return self

    def forward(self, pixels: torch.Tensor, grids: torch.Tensor | None = None) -> torch.Tensor:
        """Return features (B, N, D) in the tower's dtype for RGB pixels (B, 3, H, W) of dtype uint8.

        `grids` (K, 2) are rows and columns of units of K pictures, for a tower of native resolution, whose B units lie
        picture after picture, row by row; without it each unit is a picture of its own.

        Raises ModelError for another dtype or size, and grids that do not hold B units.
        """
        if pixels.dtype != torch.uint8:
            raise ModelError(
                f"pixels are {pixels.dtype}, and the tower normalises uint8 pixels itself",
                where=f"vision tower {self.name}",
                remedy="pass the picture as loaded, 0..255",
            )
        if pixels.ndim != 4 or pixels.shape[1:] != (3, *self.image_size):
            raise ModelError(
                f"pixels have shape {tuple(pixels.shape)}",
                where=f"vision tower {self.name}",
                remedy=f"it takes (B, 3, {self.image_size[0]}, {self.image_size[1]})",
            )
        if not len(pixels):
            return torch.zeros(0, self.tokens, self.dim, dtype=self.dtype, device=pixels.device)
        # no_grad, not inference_mode: the projector saves these features for its backward pass, which
        # autograd forbids for inference tensors, and a clone out of that mode would copy every feature.
        with nullcontext() if self.trainable else torch.no_grad():
            given = pixels if self.own_constants else self._normalise(pixels)
            if self.native is None:
                return self.encoder(given).to(self.dtype)
            return self.encoder(given, self._grids(grids, pixels)).to(self.dtype)

    def _grids(self, grids: torch.Tensor | None, pixels: torch.Tensor) -> torch.Tensor:
        if grids is None:
            return torch.ones(len(pixels), 2, dtype=torch.int64, device=pixels.device)
        if int(grids.prod(1).sum()) != len(pixels):
            raise ModelError(
                f"{len(grids)} pictures of {grids.prod(1).tolist()} units, but pixels of {len(pixels)}",
                where=f"vision tower {self.name}",
                remedy="give the pixels and the grids of the same pictures",
            )
        return grids.to(pixels.device)

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        # In float32 whatever the tower's dtype: bf16 has 8 bits of mantissa, and 0..255 needs them all.
        mean, std = self._constants
        return ((pixels.float() / 255 - mean) / std).to(self.dtype)

    def as_encoder(self) -> Encoder:
        """The tower as one encoder of a fused tower."""
        return self._made

    def fingerprint(self) -> str:
        """Return a sha256 over all that decides the features of a given uint8 picture.

        Covers architecture, weights, layer, selected tokens, dtype, image size and constants; not the path
        the weights came from. Reads every weight, so call it once per run.
        """
        facts = [
            self.identity,
            self.layer,
            self.normalize,
            self.prefix,
            str(self.dtype),
            self.image_size,
            self.mean,
            self.std,
        ]
        # What a picture becomes is keyed by its preparation; how patches are joined, by the identity and this.
        facts += [] if self.native is None else [self.native["patch"], self.native["merge"]]
        # Everything that a feature depends on and nothing else: a cache that was keyed by a path would serve features
        # of other weights.
        digest = hashlib.sha256(json.dumps(facts).encode())
        for key, value in sorted(self.encoder.state_dict().items()):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


TAKES = ("weights", "layer", "select", "image_size", "normalize")


def own_builder(spec: str) -> Callable[..., Encoder]:
    """Import a function (name, *, weights, layer, select, image_size, normalize) -> Encoder.

    Raises ConfigError: it cannot be imported or called so. What is returned raises ModelError where the function fails
    or its encoder is none.
    """
    gives = "mmit.models.vision_encoder.Encoder"
    function = own_function(spec, positional=("name",), keywords=TAKES, gives=gives, where="model.vision.kind")

    def build(name: Any, reading: Reading) -> Encoder:
        where = f"vision encoder {spec}"
        remedy = f"it is called with a name and {', '.join(TAKES)}"
        with calling("", where=where, remedy=remedy, kind=ModelError):
            encoder = function(name, **{option: getattr(reading, option) for option in TAKES})
        if not isinstance(encoder, Encoder) or not isinstance(encoder.reader, Reader):
            problem = f"returned a {type(encoder).__name__}"
            raise ModelError(problem, where=where, remedy=f"return a {gives} whose reader is a Reader")
        _try(encoder, where)
        return encoder

    return build


@torch.no_grad()
def _try(encoder: Encoder, where: str) -> None:
    if encoder.native is not None:  # whose units come with grids: `VisionTower` checks these
        return
    reader = encoder.reader
    weight = next(reader.parameters(), torch.empty(0))
    dtype = torch.uint8 if reader.own_constants else weight.dtype
    remedy = f"it is called with pixels (B, 3, {encoder.image_size[0]}, {encoder.image_size[1]})"
    with calling("its reader", where=where, remedy=remedy, kind=ModelError):
        out = reader.eval()(torch.zeros(1, 3, *encoder.image_size, dtype=dtype, device=weight.device))
    expected = (1, encoder.prefix + encoder.grid[0] * encoder.grid[1], encoder.dim)
    if tuple(getattr(out, "shape", ())) != expected:
        problem = f"gives features {tuple(getattr(out, 'shape', ())) or type(out).__name__}, and states {expected}"
        raise ModelError(problem, where=where, remedy="state prefix, grid and dim of what the reader gives")
