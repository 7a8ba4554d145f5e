"""What every vision backend hands over, and the checks they share.

Owns the Encoder record (a module cut at the layer that is read, with the facts its input needs), the meaning
of a layer number, and strict loading of a weight file into a cut encoder. Knows no backend.

B images, H x W pixels, h x w patches, N = tokens, D = encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mmit.errors import MmitError, ModelError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SELECT = ("patch", "cls_patch")
BN_LEAVES = {"weight", "bias", "running_mean", "running_var"}


class Reader(nn.Module):
    """A cut encoder: normalised pixels (B, 3, H, W) -> features (B, prefix + h*w, D)."""

    def set_frozen(self, frozen: bool) -> None:
        """Take the memory layout that suits inference alone, or the one that is safe to train in."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder cut at the layer that is read.

    `reader` maps normalised float pixels (B, 3, H, W) to features (B, prefix + h*w, D). `identity` is what
    decides the features besides weights and layer (architecture, activation), and holds no path.
    """

    reader: Reader
    name: str
    weights_id: str
    identity: str
    layer: int
    normalize: bool
    image_size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


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
    """Refuse `normalize` below the last layer: the final norm was trained on that layer's output alone."""
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


def load_needed(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], *, full: Mapping[str, torch.Size], where: str
) -> None:
    """Load `tensors` into the cut encoder `module`; `full` are the keys and shapes it had before it was cut.

    Every key that the encoder reads must be there with the right shape, and every key of the file must be one
    of the whole architecture. Tensors of the parts that were cut away are left in the file.
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
    module.load_state_dict({key: tensors[key] for key in needed if key in tensors}, strict=False)


def pair_by_order(
    tensors: Mapping[str, torch.Tensor], *, full: Mapping[str, torch.Size], where: str
) -> dict[str, torch.Tensor]:
    """Give the tensors of a file the names of an architecture that lists the same tensors in the same order.

    Step counters of batch norm are dropped on both sides. Raises ModelError unless the counts agree, every
    shape agrees, and no `weight` meets a `bias` or a running statistic.
    """
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
