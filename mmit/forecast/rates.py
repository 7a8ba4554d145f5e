"""What a row costs: FLOPs by part and bytes alive at the peak, from shapes alone.

In: a composite that was assembled `empty`, with its tuning applied, and the facts of rows. Out: coefficients that turn
rows into FLOPs, and the bytes of a training step. FLOPs are those the model needs (each product once, causal attention
over real segments; 1 multiply-add = 2), as torch's FlopCounterMode counts them for matrix products and convolutions;
element-wise work is not counted. Weight gradients of frozen weights are not computed and not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmit.models.shapes import free_attention

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

PARTS = ("tower", "projector", "backbone", "attention", "head")


@dataclass(frozen=True)
class RowFacts:
    """What decides the cost of a micro-batch; the mean over many is as good."""

    tokens: float
    supervised: float
    crops: float  # distinct pictures, or crops of them: what the tower sees
    pairs: float  # query-key pairs: sum over tokens of the tokens they see, themselves included


def count_pairs(nodes: torch.Tensor) -> int:
    """Query-key pairs of a row: (K, 3) first token, length, parent or -1, as in `attention_plan.make_plan`."""
    depth: list[int] = []
    pairs = 0
    table: list[list[int]] = nodes.tolist()
    for _, length, parent in table:
        before = 0 if parent < 0 else depth[parent] + table[parent][1]
        depth.append(before)
        pairs += length * before + length * (length + 1) // 2
    return pairs


@dataclass(frozen=True)
class Rate:
    """FLOPs of one part: forward and backward, per unit, and per micro-batch whatever it holds."""

    forward: float = 0.0
    backward: float = 0.0
    forward_each: float = 0.0
    backward_each: float = 0.0


@dataclass(frozen=True)
class Rates:
    """FLOPs per crop (tower, projector), token (backbone), predicted position (head), query-key pair (attention)."""

    tower: Rate
    projector: Rate
    backbone: Rate
    head: Rate
    attention: Rate
    prefix_pairs: float = 0.0  # pairs with prefix tokens, per token of the row

    def flops(self, row: RowFacts, *, recompute: float = 0.0, cached: bool = False) -> dict[str, dict[str, float]]:
        """FLOPs of one micro-batch: {part: {"forward", "backward", "recompute"}}.

        Args:
            recompute: share of the decoder layers whose forward pass is run again in the backward pass.
            cached: the tower's features come from a cache.
        """
        amounts = {
            "tower": 0.0 if cached else row.crops,
            "projector": row.crops,
            "backbone": row.tokens,
            "attention": row.pairs + self.prefix_pairs * row.tokens,
            "head": row.supervised,
        }
        out = {}
        for part in PARTS:
            rate: Rate = getattr(self, part)
            forward = rate.forward * amounts[part] + (rate.forward_each if amounts[part] else 0)
            backward = rate.backward * amounts[part] + (rate.backward_each if amounts[part] else 0)
            again = forward * recompute if part in ("backbone", "attention") else 0.0
            out[part] = {"forward": forward, "backward": backward, "recompute": again}
        return out


def measure_rates(vlm: VLM) -> Rates:
    """Count FLOPs on the meta device: the LLM at two lengths and two numbers of predicted positions, one picture.

    Raises ModelError where the model's attention is its own.
    """
    tower = projector = Rate()
    grad = False
    if vlm.vision is not None and vlm.projector is not None:
        pixels = torch.zeros(1, 3, *vlm.vision.image_size, dtype=torch.uint8, device="meta")
        features, tower = _count(lambda: vlm.encode_images(pixels))
        leaf = features.detach().requires_grad_(features.requires_grad)
        images, projector = _count(lambda: vlm.image_embeddings(leaf))
        grad = images.requires_grad
    grad |= vlm.word_embeddings.requires_grad
    with free_attention(vlm) as calls:
        short, long, more = (_count_llm(vlm, length, at, grad=grad) for length, at in ((32, 8), (64, 8), (64, 24)))
    layers = 3  # the passes above
    width, virtual = calls.width / layers, calls.virtual / layers
    head = _slope(long, more, 16)
    body = _slope(short, long, 32)
    rest = Rate(
        body.forward,
        body.backward,
        short.forward - 32 * body.forward - 8 * head.forward,
        short.backward - 32 * body.backward - 8 * head.backward,
    )
    attention = Rate(2 * width, 4 * width if calls.backward else 0.0)
    return Rates(tower, projector, rest, head, attention, prefix_pairs=virtual / width if width else 0.0)


def _slope(a: Rate, b: Rate, units: int) -> Rate:
    return Rate((b.forward - a.forward) / units, (b.backward - a.backward) / units)


def _count(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Rate]:
    with FlopCounterMode(display=False) as forward:
        out = run()
    with FlopCounterMode(display=False) as backward:
        if out.requires_grad:
            out.sum().backward()
    return out, Rate(float(forward.get_total_flops()), float(backward.get_total_flops()))


def _count_llm(vlm: VLM, length: int, count: int, *, grad: bool) -> Rate:
    words = vlm.word_embeddings
    embeddings = torch.zeros(length, words.shape[1], dtype=words.dtype, device="meta", requires_grad=grad)
    at = torch.zeros(count, dtype=torch.int64, device="meta")
    positions = torch.zeros(length, dtype=torch.int64, device="meta")
    nodes = torch.tensor([[0, length, -1]])
    return _count(lambda: vlm.row_logits(embeddings, positions=positions, nodes=nodes, at=at).float())[1]
