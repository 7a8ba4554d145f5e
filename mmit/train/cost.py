"""What a row costs: FLOPs by part and bytes alive at the peak, from shapes alone.

In: a composite that was assembled `empty`, with its tuning applied, and the facts of rows. Out: coefficients that turn
rows into FLOPs, and the bytes of a training step. FLOPs are those the model needs (each product once, causal attention
over real segments; 1 multiply-add = 2), as torch's FlopCounterMode counts them for matrix products and convolutions;
element-wise work is not counted. Weight gradients of frozen weights are not computed and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmit.models.fakes import CpuFakes
from mmit.models.recompute import set_recompute
from mmit.models.shapes import free_attention, make_fake, planned_attention
from mmit.models.tuning import Group
from mmit.train.engine import TorchEngine
from mmit.train.live_bytes import LiveBytes

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
    """Query-key pairs of a row: (K, 3) first token, length, parent or -1, as in `attention.make_plan`."""
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
        features, tower = _count(lambda: vlm.see(pixels))
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


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank by kind, unpartitioned; `passing` is what a forward and backward pass adds at its peak."""

    llm: int  # weights of the LLM, adapters included
    rest: int  # weights of tower and projector, buffers
    trained: int  # number of trained parameters
    trained_bytes: int
    masters: int  # float32 copies of trained weights that are not float32 themselves
    moments: int
    passing: int  # activations, gradients, logits
    single: int  # the same for a step of one micro-batch, where no gradients wait in float32

    @property
    def total(self) -> int:
        """At the peak, with nothing partitioned."""
        return self.llm + self.rest + self.masters + self.moments + self.passing


def measure_bytes(
    vlm: VLM,
    groups: Sequence[Group],
    batches: Iterable[Mapping[str, Any]],
    *,
    precision: str,
    accumulate: bool,
    flash: bool,
    recompute: str = "none",
) -> Bytes:
    """Run forward and backward on fake tensors and count what is alive. The composite is of no use afterwards.

    Args:
        groups: what is trained. batches: model arguments of the largest micro-batches, with pixels or features.
        accumulate: whether a step has more than one micro-batch.
        flash: whether attention keeps what a fused CUDA kernel keeps, or what mmit's CPU attention does.
        recompute: activation checkpointing, see `models.recompute`.
    """
    mode = CpuFakes(allow_non_fake_inputs=True)
    new = make_fake(vlm, mode)
    groups = [Group(g.name, g.lr, [(n, new[id(p)]) for n, p in g.parameters]) for g in groups]
    vlm.train()
    set_recompute(vlm, recompute)
    passing = single = 0
    trained = [p for g in groups for _, p in g.parameters]
    with mode:
        vlm.split()  # takes a forward of its own, which is not to be counted
        engine = TorchEngine(_Placed(vlm), groups, device=torch.device("cpu"), precision=precision)
    for batch in batches:
        nodes = batch["nodes"]
        tensors = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with planned_attention(vlm, nodes, mode=mode, flash=flash), mode, LiveBytes() as live:
            live.add([*vlm.parameters(), *vlm.buffers(), *engine.masters])
            held = live.now
            for again in range(2 if accumulate else 1):
                single = max(single, live.peak - held) if again else single
                row = {**tensors, "nodes": torch.tensor([[0, len(tensors["input_ids"]), -1]])}
                engine.forward_backward(row, scale=1.0, last=not accumulate or again == 1)
            passing = max(passing, live.peak - held)
            single = max(single, 0 if accumulate else passing)
        for p in (*trained, *engine.masters):
            p.grad = None
    llm = _bytes(vlm.llm)
    masters = [m for m, p in zip(engine.masters, trained, strict=True) if m is not p]
    return Bytes(
        llm=llm,
        rest=_bytes(vlm) - llm,
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        masters=4 * sum(m.numel() for m in masters),
        moments=8 * sum(p.numel() for p in trained),
        passing=passing,
        single=single,
    )


class _Placed(nn.Module):
    """A fake model that is where it shall be: torch cannot swap fake parameters for moved ones."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def forward(self, **tensors: Any) -> torch.Tensor:
        return self.vlm(**tensors)


def _bytes(module: nn.Module) -> int:
    tensors: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
