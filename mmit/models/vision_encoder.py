"""What every vision backend hands over, and the checks they share.

Owns the Encoder record (a module cut at the layer that is read, with the facts its input needs), the meaning
of a layer number, and strict loading of a weight file into a cut encoder. Knows no backend.

B images, H x W pixels, h x w patches, N = tokens, D = encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmit.errors import MmitError, ModelError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SELECT = ("patch", "cls_patch")
BN_LEAVES = {"weight", "bias", "running_mean", "running_var"}


Layer = int | tuple[int, ...]  # one layer that is read, or several whose features are joined


class Reader(nn.Module):
    """A cut encoder: normalised pixels (B, 3, H, W) -> features (B, prefix + h*w, D).

    With `own_constants` it takes uint8 pixels and normalises them itself; with `native` it takes units of pictures of
    any size, and their grids (see `vision_native`).
    """

    own_constants = False
    native = False
    # Frequencies of rotary embeddings and the like, which transformers computes with in float32 in any model.
    exact_buffers = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A cast of the module reaches its buffers too. Angles of rotary embeddings in bf16 would be those of other
        # positions.
        kept = self._buffers_of_float32() if self.exact_buffers else []
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, before in kept:
            now = module._buffers[name]
            if now is not None and now.dtype != before.dtype:
                module._buffers[name] = before.to(now.device)
        return self

    def _buffers_of_float32(self) -> list[tuple[nn.Module, str, torch.Tensor]]:
        return [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            # Only buffers that no file holds: those are computed from the config, and constants such as a mean are cast
            # like weights.
            if name in module._non_persistent_buffers_set and buffer is not None and buffer.dtype == torch.float32
        ]

    def set_frozen(self, frozen: bool) -> None:
        """Take the memory layout that suits inference alone, or the one that is safe to train in."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder cut at the layer that is read.

    `reader` maps normalised float pixels (B, 3, H, W) to features (B, prefix + h*w, D). `identity` is what
    decides the features besides weights and layer (architecture, activation), and holds no path. `native` says by
    which rule pictures of any size become patches: the options of `data.native`; None for towers of one size.
    """

    reader: Reader
    name: str
    weights_id: str
    identity: str
    layer: Layer
    normalize: bool
    image_size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    native: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reading:
    """What is read of an encoder; the options of `build_vision` that say so, with what each means."""

    weights: str | bool | None = None
    layer: int | Sequence[int] | None = None
    select: str = "patch"
    image_size: int | tuple[int, int] | None = None
    normalize: bool = False
    key_order: bool = False
    native: Mapping[str, Any] | None = None

    @property
    def with_cls(self) -> bool:
        """Whether a class token stands before the patches."""
        return self.select == "cls_patch"


@dataclass(frozen=True)
class Origin:
    """Where an encoder comes from, and the constants that belong to its weights; see `Encoder`.

    `constants` holds mean, std and interpolation, and may hold more, as timm's data config does.
    """

    name: str
    weights_id: str
    identity: str
    constants: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """Arguments of `Encoder`."""
        return {
            "name": self.name,
            "weights_id": self.weights_id,
            "identity": self.identity,
            "mean": triple(self.constants["mean"]),
            "std": triple(self.constants["std"]),
            "interpolation": str(self.constants["interpolation"]),
        }


def layers_to_read(layer: int | Sequence[int] | None, default: int, *, where: str) -> tuple[int, ...]:
    """Return the layers that are read, in their order. Raises ModelError for none, and for one given twice."""
    found = (default,) if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)
    if not found or len(set(found)) < len(found):
        raise ModelError(f"layer is {list(found)}", where=where, remedy="give one layer, or a list of different ones")
    return found


def one_or_more(layers: tuple[int, ...]) -> Layer:
    """Return a single layer as a number."""
    return layers[0] if len(layers) == 1 else layers


def single_layer(layer: int | Sequence[int] | None, *, where: str) -> int | None:
    """Return the layer of an encoder of which only one can be read. Raises ModelError for several."""
    if layer is None or isinstance(layer, int):
        return layer
    layers = layers_to_read(layer, 0, where=where)
    if len(layers) > 1:
        raise ModelError(
            "several layers are read from transformers, whose blocks all keep one resolution",
            where=where,
            remedy="give one layer",
        )
    return layers[0]


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of an image size that is one number for a square or already a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def triple(values: object) -> tuple[float, float, float]:
    """Return three channel constants; one number stands for all three."""
    red, green, blue = [values] * 3 if isinstance(values, int | float) else list(values)  # type: ignore[call-overload]
    return float(red), float(green), float(blue)


def blocks_to_run(layer: int, total: int, *, where: str) -> int:
    """Return how many transformer blocks run when `layer` is read.

    Layers are counted as Hugging Face counts `hidden_states`, for every backend: 1 is the output of the first
    block, -1 of the last, -2 of the one before it.
    """
    # Layer 0 would be the patch embedding, which nobody reads; and -1 is the last block, not what follows its norm.
    blocks = layer if layer > 0 else total + layer + 1
    if layer == 0 or not 1 <= blocks <= total:
        raise ModelError(
            f"layer {layer} does not exist; the encoder has {total} blocks",
            where=where,
            remedy=f"nearest: {_clamp(layer, 1, total)}; valid: 1..{total} from the input, -{total}..-1 from the end",
        )
    return blocks


def stage_to_read(layer: int, total: int, *, where: str) -> int:
    """Return the index of the feature stage `layer` of an encoder whose stages shrink the picture.

    Stages are counted as timm counts `out_indices`: 0 is the first, -1 the last.
    """
    if not -total <= layer < total:
        raise ModelError(
            f"stage {layer} does not exist; the encoder has {total} feature stages",
            where=where,
            remedy=f"nearest: {_clamp(layer, 0, total)}; valid: 0..{total - 1} from the input, "
            f"-{total}..-1 from the end",
        )
    return layer % total


def _clamp(layer: int, low: int, total: int) -> int:
    """Return the nearest of low..low + total - 1 and -total..-1, on the side of zero that `layer` is on."""
    return max(-total, layer) if layer < 0 else max(low, min(layer, low + total - 1))


def check_norm(wanted: bool, *, last: bool, norm: nn.Module | None, where: str) -> None:
    """Refuse `normalize` below the last layer: the final norm was trained on that layer's output alone.

    Args:
        wanted: the option. last: the layer that is read is the last. norm: the final norm, if there is one.
        where: of the error.

    Raises:
        ModelError: another layer is read, or the encoder has no norm over its tokens.
    """
    if wanted and not last:
        raise ModelError(
            "normalize applies the final norm, which belongs to the last layer",
            where=where,
            remedy="read layer -1, or leave normalize out",
        )
    if wanted and (norm is None or isinstance(norm, nn.Identity)):
        raise ModelError("this encoder has no final norm over its tokens", where=where, remedy="leave normalize out")


@contextmanager
def explained(where: str, *, remedy: str) -> Iterator[None]:
    """Turn whatever a model library raises into one ModelError that says what to do."""
    try:
        yield
    except MmitError:
        raise
    except Exception as error:
        raise ModelError(f"{type(error).__name__}: {error}", where=where, remedy=remedy) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the page-long report of unread text-tower tensors; the caller checks what is missing."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_complete(info: Mapping[str, Any], *, where: str) -> None:
    """Raise ModelError if `from_pretrained` left tensors random; `info` is its `output_loading_info`."""
    bad = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if bad:
        raise ModelError(
            f"{len(bad)} tensors are missing or of another shape: {', '.join(bad[:4])}",
            where=where,
            remedy="the checkpoint is not a complete vision model of this config",
        )


def load_needed(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], *, full: Mapping[str, torch.Size], where: str
) -> None:
    """Load tensors into an encoder that was cut at the layer that is read.

    Every key that the encoder reads must be there with the right shape, and every key of the file must be one
    of the whole architecture. Tensors of the parts that were cut away are left in the file.

    Args:
        module: the cut encoder.
        tensors: of the file, by name.
        full: keys and shapes of the encoder before it was cut.
        where: of the error.

    Raises:
        ModelError: keys are missing, unknown, or of another shape; all are counted and some named.
    """
    needed = module.state_dict()
    # A counter of training steps is no weight, and many files leave it out.
    missing = [key for key in needed if key not in tensors and not key.endswith("num_batches_tracked")]
    unknown = [key for key in tensors if key not in full]
    shapes = [
        f"{key}: file {tuple(tensors[key].shape)}, encoder {tuple(needed[key].shape)}"
        for key in needed
        if key in tensors and tensors[key].shape != needed[key].shape
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(problems.values()):
        told = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for what, keys in problems.items()
            if keys
        )
        raise ModelError(
            f"the weights do not fit the encoder: {told}",
            where=where,
            remedy="check the architecture's name; key_order: true loads a file whose tensors are "
            "in the same order under other names",
        )
    # Not strict, since step counters may be missing; all else has been compared above, with an error that says more
    # than torch's.
    module.load_state_dict({key: tensors[key] for key in needed if key in tensors}, strict=False)


def pair_by_order(
    tensors: Mapping[str, torch.Tensor], *, full: Mapping[str, torch.Size], where: str
) -> dict[str, torch.Tensor]:
    """Give the tensors of a file the names of an architecture that lists the same tensors in the same order.

    Step counters of batch norm are dropped on both sides. Raises ModelError unless the counts agree, every
    shape agrees, and no `weight` meets a `bias` or a running statistic.
    """
    # Order is all that is known of such a file. Known limit: two tensors of one shape that the file has in another
    # order are not noticed, except those of a batch norm.
    ours = [(key, shape) for key, shape in full.items() if not key.endswith("num_batches_tracked")]
    theirs = [(key, value) for key, value in tensors.items() if not key.endswith("num_batches_tracked")]
    remedy = "key_order needs a file of this very architecture, in its order"
    if len(ours) != len(theirs):
        raise ModelError(f"the file holds {len(theirs)} tensors, the encoder {len(ours)}", where=where, remedy=remedy)
    for number, ((key, shape), (name, value)) in enumerate(zip(ours, theirs, strict=True), start=1):
        leaf, other = key.rpartition(".")[2], name.rpartition(".")[2]
        if value.shape != shape:
            raise ModelError(
                f"tensor {number} is {name} {tuple(value.shape)} in the file and {key} {tuple(shape)} in the encoder",
                where=where,
                remedy=remedy,
            )
        # The four vectors of a batch norm have one shape, so only their names can tell them apart.
        if leaf != other and {leaf, other} <= BN_LEAVES:
            raise ModelError(
                f"tensor {number} is {name} in the file and {key} in the encoder", where=where, remedy=remedy
            )
    return {key: value for (key, _), (_, value) in zip(ours, theirs, strict=True)}
