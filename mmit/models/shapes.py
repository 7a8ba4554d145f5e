"""Running a model that has shapes and no weights: to count what a step would take, without taking it.

Owns two ways of running a composite that was assembled `empty`: with an attention that costs nothing and notes how it
was called (for counting FLOPs on torch's meta device), and as fake tensors, which have a device and no memory and go
through the very code that training runs (for counting bytes). Refuses a model whose attention is its own.

Dimensions: T tokens in a row, H query heads, KV key heads, Dh head size, P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface

from mmit.errors import ModelError
from mmit.models import attention, varlen
from mmit.models.attention_plan import make_plan
from mmit.models.per_record import mixers
from mmit.models.prefix_tree import Parts
from mmit.models.row_state import RowState, running
from mmit.models.rules import takes_attention
from mmit.models.tuning.structure import base_model
from mmit.models.virtual import PREFIX, prompted_nodes, virtual_tokens

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmit.models.vlm import VLM

FREE, PLANNED = "mmit_free", "mmit_planned"


@dataclass
class Calls:
    """How attention was called in one forward pass; the numbers are sums over layers."""

    width: int = 0  # H * (Dh of queries and keys + Dh of values): FLOPs of one query-key pair, halved
    virtual: int = 0  # the same times the P prefix tokens of the layer, which every query sees
    backward: bool = False  # whether gradients flow through it
    layers: int = 0


@dataclass
class _Current:
    """What the two attention functions below run with; set by their context managers."""

    calls: Calls = field(default_factory=Calls)
    row: RowState | None = None
    flash: bool = False


_current = _Current()


def _free(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """Notes the call; what comes out hangs on all that goes in, so that gradients flow as they would."""
    calls, per_pair = _current.calls, query.shape[1] * (query.shape[-1] + value.shape[-1])
    # Attention computes nothing here, so what a kernel would do is added from these numbers.
    calls.layers += 1
    calls.width += per_pair
    calls.backward |= query.requires_grad or key.requires_grad or value.requires_grad
    # A sum hangs on every key and value, and costs next to nothing to count.
    out = query[..., : value.shape[-1]].transpose(1, 2) + (key.sum() + value.sum())
    if (prefix := getattr(module, PREFIX, None)) is not None:
        # A prefix joins every query of the layer, so its keys count apart from those of the row.
        keys, values, gate = prefix()
        calls.virtual += per_pair * keys.shape[1]
        calls.backward = True
        out = out + keys.sum() + values.sum() + (0 if gate is None else gate.sum())
    return out, None


class _Flash(torch.autograd.Function):
    """(T, H, Dh), 2 x (G, KV, Dh) -> (T, H, Dh) without numbers.

    Keeps what a variable-length kernel keeps: queries, keys, values, the result, a log-sum per query and head.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, sums = _forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads = query.shape[:2]
    return query.new_empty(tokens, heads, value.shape[-1]), query.new_empty(heads, tokens, dtype=torch.float32)


def _backward(grad: torch.Tensor, states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *_: Any) -> Any:
    return tuple(torch.empty_like(x) for x in states)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    out: torch.Tensor = _Flash.apply(query, *varlen.as_taken(query, key, value))
    return out


def _planned(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """mmit's attention over the current plan, or the calls of kernels on CUDA with all that they keep."""
    if _current.flash and _current.row is not None and getattr(module, PREFIX, None) is None:
        plan, window = _current.row.plan, options.get("sliding_window")
        window = window if window is not None and plan.longest > window else None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        # What counts is what is kept: shapes of results and log-sums, as the kernels have them.
        parts = Parts(_forward, _backward)
        out = varlen.varlen_attention(q, k, v, plan.segments, 1.0, window=window, kernels=varlen.Kernels(_flash, parts))
        return out[None], None
    with running(_current.row):
        return attention._attention(module, query, key, value, None, **options)


@contextmanager
def _implementation(vlm: VLM, name: str, current: _Current) -> Iterator[None]:
    global _current  # noqa: PLW0603
    llm = base_model(vlm.llm)
    if not takes_attention(type(llm)) and not mixers(llm):
        raise ModelError(
            f"{type(llm).__name__} does not route its attention through transformers' attention interface, so its "
            "cost cannot be forecast",
            where="model.llm.name",
            remedy="train without dry_run, or use an architecture that supports attention backends",
        )
    # Known limit: one at a time in a process, since transformers' table of functions is one for all models.
    before, own = _current, llm.config._attn_implementation
    llm.set_attn_implementation(name)
    _current = current
    try:
        with _experts(llm), _autocast():
            yield
    except (RuntimeError, TypeError, NotImplementedError) as error:
        # Code that decides by values, and kernels that torch has no shapes of.
        raise ModelError(
            f"{type(llm).__name__} does not run on shapes alone ({type(error).__name__}: {str(error)[:120]}), so its "
            "cost cannot be forecast",
            where="model.llm.name",
            remedy="train without dry_run; its first steps tell time and memory",
        ) from error
    finally:
        _current = before
        llm.set_attn_implementation(own)


@contextmanager
def _experts(llm: Any) -> Iterator[None]:
    """Experts as batched products, which need no numbers to know their shapes and cost the same FLOPs.

    Their bytes are more than those of grouped products: each token's copy of its experts' weights is among them.
    """
    if not llm._can_set_experts_implementation():
        yield
        return
    own = llm.config._experts_implementation
    llm.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        llm.set_experts_implementation(own)


@contextmanager
def _autocast() -> Iterator[None]:
    """PEFT switches autocast off around adapters of experts, also on the meta device, which has none."""
    own = torch.autocast

    class Autocast(own):  # type: ignore[misc, valid-type]
        def __new__(cls, device_type: str, *args: Any, **options: Any) -> Any:
            return nullcontext() if device_type == "meta" else own(device_type, *args, **options)

    torch.autocast = Autocast  # type: ignore[misc]
    try:
        yield
    finally:
        torch.autocast = own  # type: ignore[misc]


@contextmanager
def free_attention(vlm: VLM) -> Iterator[Calls]:
    """Inside, attention computes nothing; yields the notes on how it was called."""
    calls = Calls()
    with _implementation(vlm, FREE, _Current(calls=calls)):
        yield calls


@contextmanager
def planned_attention(vlm: VLM, nodes: torch.Tensor, *, mode: FakeTensorMode, flash: bool) -> Iterator[None]:
    """Inside, a fake composite given a row as one node runs the attention of other nodes.

    Args:
        vlm: a composite of fake tensors, see `make_fake`.
        nodes: (K, 3) first token, length and parent of each. They are real numbers, which fake tensors do not have.
        mode: the mode the fake tensors are of.
        flash: keep what a fused CUDA kernel keeps, not what attention on a CPU does.

    Raises:
        ModelError: the model does not route its attention through transformers, or does not run on shapes alone.
    """
    nodes = prompted_nodes(nodes, virtual_tokens(base_model(vlm.llm)))
    plan = make_plan(nodes)
    segments = plan.segments  # made now: inside the mode its numbers would be fake
    assert segments is not None
    for number, b in enumerate(plan.buckets):
        if (mask := plan.mask(number)) is not None:
            plan.masks[number, None] = mode.from_tensor(mask)
        b.queries, b.keys, b.keep = (mode.from_tensor(x) for x in (b.queries, b.keys, b.keep))
    row = RowState(nodes.tolist(), plan, torch.device("cpu"))
    with _implementation(vlm, PLANNED, _Current(row=row, flash=flash)):
        yield


def make_fake(vlm: VLM, mode: FakeTensorMode) -> dict[int, nn.Parameter]:
    """Give every tensor of an empty composite a device (the CPU), in place.

    Returns:
        the new parameter for the `id` of each old one; shared ones stay shared.
    """
    made: dict[int, Any] = {}
    old = []  # kept alive, so that no id is used twice
    for module in vlm.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                    old.append(tensor)
                table[name] = made[id(tensor)]
    return {key: value for key, value in made.items() if isinstance(value, nn.Parameter)}


AttentionInterface.register(FREE, _free)
AttentionInterface.register(PLANNED, _planned)
