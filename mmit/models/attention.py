"""Attention over a packed row: every token sees its node and that node's ancestors, nothing else.

Owns the attention function that mmit registers with transformers under the name "mmit", which runs on a row's plan
(`attention_plan.py`). Without a row (generation, evaluation with a cache) it is transformers' own SDPA attention.
Sliding windows, chunks, sinks, soft caps and dropout of attention weights are computed, in rows and without. Refuses to
approximate: a model whose attention needs something else is a ModelError, never a different result.

Tokens of other records are never gathered, so nothing can leak: their influence is exactly 0.0. On CUDA in half
precision a row is few calls of a variable-length kernel (`varlen.py`); elsewhere nodes of like size are a batch.

Dimensions: T tokens in the row, H query heads, KV key heads, D head size, G nodes in a bucket, Lq / Lk their
longest query / key length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmit.errors import ModelError
from mmit.models import varlen
from mmit.models.attention_plan import AttentionPlan, RowPlan
from mmit.models.buckets import additive, make_layout, pick, place, small_attention
from mmit.models.calls import ELSEWHERE, RowInputs, call, takes
from mmit.models.row_state import ATTENTION, RowState, current_row, running
from mmit.models.virtual import PREFIX
from mmit.models.visibility import Scores, Visibility, row_mask, visibility, written_out

if TYPE_CHECKING:
    from mmit.models.prefix_cache import Before

NAME = "mmit"
SMALL = 512  # keys; up to here writing attention out beats the CPU's fused kernel (4x on 50 keys, backward included)
Prefix = tuple[torch.Tensor, torch.Tensor]  # keys and values (KV, P, D) that every query sees


@dataclass(frozen=True, slots=True)
class Kind:
    """What a layer's attention is besides causal softmax attention."""

    pattern: Visibility | None = None
    scores: Scores = Scores()


PLAIN = Kind()


def forest_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    prefix: Prefix | None = None,
    kind: Kind = PLAIN,
) -> torch.Tensor:
    """Attention of one row.

    Args:
        q: (1, H, T, D). k, v: (1, KV, T, D) with H a multiple of KV; before those of T, the keys that were known.
        plan: from `attention_plan.make_plan` on the row's nodes, on the same device.
        scale: factor on the scores.
        prefix: keys and values before those of the row.
        kind: what the layer computes beyond plain causal attention.

    Returns:
        (1, T, H, D)
    """
    # A window that is wider than the longest record hides nothing: the row then runs as plain causal attention does.
    pattern = kind.pattern if kind.pattern is not None and plan.longest > kind.pattern.reach else None
    window = None if pattern is None else pattern.window
    fused = prefix is None and kind.scores.plain and (pattern is None or window is not None)
    # Asked in this order: segments are made only where the kernel reads them.
    segments = plan.segments if fused and varlen.usable(q) else None
    if segments is not None:
        rows_q, rows_k, rows_v = (x[0].transpose(0, 1) for x in (q, k, v))
        return varlen.varlen_attention(rows_q, rows_k, rows_v, segments, scale, window=window)[None]
    heads, kv, tokens = q.shape[1], k.shape[1], q.shape[2]
    # Layers of one model may differ in their numbers of heads, so the layout is kept by these.
    if (heads, kv) not in plan.layouts:
        plan.layouts[heads, kv] = make_layout(plan.buckets, tokens, heads=heads, kv=kv)
    layout = plan.layouts[heads, kv]
    tables = [x[0].transpose(0, 1).reshape(-1, x.shape[-1]) for x in (q, k, v)]
    # One gather for all buckets, so that its backward is one sum over the keys that several nodes read.
    states = iter(pick(tables[0], tables[1], tables[2], layout))
    outs = []
    for n, b in enumerate(plan.buckets):
        g, lq, lk = b.size
        bucket = [next(states).view(g, count, length, -1) for count, length in ((heads, lq), (kv, lk), (kv, lk))]
        mask = plan.mask(n, pattern)
        if prefix is not None:
            bucket[1:] = _join(prefix[0], bucket[1]), _join(prefix[1], bucket[2])
            mask = _see_prefix(mask, prefix[0].shape[1], queries=lq, keys=lk, device=q.device)
        # The additive form of a mask is kept too: every layer of the model asks for the same ones.
        case = (n, q.dtype, bucket[1].shape[2] - lk, pattern)
        small = q.device.type == "cpu" and lk <= SMALL and kind.scores.plain
        if small and mask is not None and case not in layout.masks:
            layout.masks[case] = additive(mask, heads=heads, kv=kv, dtype=q.dtype)
        added = layout.masks.get(case) if small else None
        outs.append(_bucket_attention(bucket, mask, added, scale, kind.scores).reshape(g * heads * lq, -1))
    return place(outs, layout).view(1, tokens, heads, -1)


def _bucket_attention(
    states: list[torch.Tensor],
    mask: torch.Tensor | None,
    added: torch.Tensor | None,
    scale: float,
    scores: Scores,
) -> torch.Tensor:
    """Attention of one bucket, by whichever of three ways computes it fastest.

    Args:
        states: queries (G, H, Lq, D), keys and values (G, KV, Lk, D).
        mask: (G, 1, Lq, Lk) True = visible; None for plain causal.
        added: the same in additive form, where attention is to be written out for few keys.
        scale: factor on the scores.
        scores: what no fused kernel computes.

    Returns:
        (G, H, Lq, D)
    """
    queries, keys, values = states
    if not scores.plain:
        return written_out(queries, keys, values, mask, scale, scores)
    if added is not None:
        return small_attention(queries, keys, values, added, scale)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


# Arguments of attention functions that change what is computed -> what they mean.
NOT_COMPUTED = {
    "position_bias": "adds a bias to its scores",
    "indices": "chooses the keys that a query sees",
    "block_indices": "chooses the keys that a query sees",
}


def _join(before: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(KV, P, D) in front of every one of (G, KV, L, D)."""
    return torch.cat([before.to(states)[None].expand(len(states), -1, -1, -1), states], dim=2)


def _see_prefix(
    mask: torch.Tensor | None, count: int, *, queries: int, keys: int, device: torch.device
) -> torch.Tensor | None:
    """The mask with `count` visible keys in front; None stands for causal, or for nothing to hide from one query."""
    if mask is None:
        # A single query sees every key behind the prefix: no mask at all is faster than one that hides nothing.
        if queries == 1:
            return None
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return F.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in every layer; adds the layer's prefix where it has one."""
    row = current_row()
    virtual = getattr(module, PREFIX, None)
    if virtual is None:
        return layer_attention(module, query, key, value, attention_mask, row, **kwargs)
    # A call of the module and no look at its attributes: ZeRO-3 brings the weights together for calls.
    keys, values, gate = virtual()
    prefix = (keys.to(query), values.to(query))
    if gate is None:
        return layer_attention(module, query, key, value, attention_mask, row, prefix=prefix, **kwargs)
    # With a gate the prefix has a softmax of its own: at a gate of 0, where training starts, the layer is what it was.
    out, _ = layer_attention(module, query, key, value, attention_mask, row, **kwargs)
    added = F.scaled_dot_product_attention(
        query,
        prefix[0][None].expand(len(query), -1, -1, -1),
        prefix[1][None].expand(len(query), -1, -1, -1),
        scale=kwargs.get("scaling"),
        enable_gqa=query.shape[1] != prefix[0].shape[0],
    )
    return out + gate.to(out) * added.transpose(1, 2), None


def layer_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row: RowState | None,
    *,
    prefix: Prefix | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over a packed row, or over an ordinary batch where there is no row.

    Args:
        module: the layer's attention, for messages and to know whether it trains.
        query: (B, H, Lq, D); in a row B is 1 and Lq the tokens of the row.
        key, value: (B, KV, Lk, D) and (B, KV, Lk, D of values).
        attention_mask: what `visibility` reads in a row; transformers' own mask elsewhere.
        row: the row that is run, or None.
        prefix: keys and values (KV, P, D) of P virtual tokens that every query sees, and the factor (H, 1) on them.
        kwargs: as transformers calls attention functions: scaling, dropout, softcap, s_aux.

    Returns:
        (B, Lq, H, D of values), and None where transformers expects attention weights.

    Raises:
        ModelError: the layer asks for something that packed attention does not compute, or masks the row itself.
    """
    for name, what in NOT_COMPUTED.items():
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} {what}, which packed attention does not compute",
                remedy="set data.packing=false",
            )
    given = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if given is None else given
    dropout = (kwargs.get("dropout") or 0.0) if module.training else 0.0
    scores = Scores(kwargs.get("softcap"), kwargs.get("s_aux"), dropout)
    if row is not None:
        # How `run_row` learns that this layer kept the row's records apart; a model none of whose layers says so is
        # refused.
        row.calls.append(ATTENTION)
        kind = Kind(visibility(attention_mask), scores)
        plan = row.on(query.device).plan
        return forest_attention(query, key, value, plan, scale, prefix=prefix, kind=kind), None
    if prefix is not None:
        queries, keys = query.shape[2], key.shape[2]
        count = prefix[0].shape[1]
        attention_mask = _see_prefix(attention_mask, count, queries=queries, keys=keys, device=query.device)
        key, value = _join(prefix[0], key), _join(prefix[1], value)
    if scores.plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return written_out(query, key, value, attention_mask, scale, scores).transpose(1, 2), None


def run_row(
    llm: torch.nn.Module,
    inputs: RowInputs,
    *,
    at: torch.Tensor | None = None,
    before: Before | None = None,
    plan: RowPlan | None = None,
) -> Any:
    """Run one row through a causal LM, or through its body alone.

    A row of one node is ordinary causal attention and needs nothing of the model; more nodes need mmit's attention
    function.

    Args:
        inputs: the row.
        at: (S,) positions whose logits are wanted; None for a body, which has none.
        before: a cache that keeps the row's keys and values, and how many tokens of the first of its nodes it holds
            already; all else counts from the next one. None keeps nothing.
        plan: made before, of these nodes; that of others is not used.

    Returns:
        the model's output; `logits` are (1, S, V), a body's `last_hidden_state` (1, T, D).

    Raises:
        ModelError: no layer asked for the row, so nodes would see each other.
    """
    embeddings, positions, nodes, ids = inputs
    row, (known, cache) = None, before or (0, None)
    if len(nodes) > 1:
        # One node needs no plan: it is ordinary causal attention, in whatever way the model has it.
        table: list[list[int]] = nodes.cpu().tolist()
        if plan is None or (plan.nodes, plan.known) != (table, known):
            plan = RowPlan(table, known)
        row = RowState(table, AttentionPlan(plan, embeddings.device), embeddings.device)
    with running(row):
        out = call(
            llm,
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            # Given, so that transformers does not look for packed sequences in the positions itself.
            attention_mask=None if row is None else positions.new_ones(1, known + len(positions)),
            use_cache=cache is not None,
            logits_to_keep=at,
            cache=cache,
            ids=None if ids is None else ids[None],
            # One node has the positions that a model counts by itself; without attention there are none.
            optional=("use_cache", "position_ids"),
            remedy=ELSEWHERE if row is None else "set data.packing=false",
        )
    if row is not None:
        _check_kept_apart(llm, row)
    return out


def _check_kept_apart(llm: torch.nn.Module, row: RowState) -> None:
    """Refuse a model that ran a row without asking for it. After the forward: only then its layers have shown it."""
    if ATTENTION in row.calls and not takes(llm, "position_ids"):
        raise ModelError(
            f"the forward of {type(llm).__name__} does not take position_ids, so that it would count on from one "
            "record of a row to the next",
            remedy="set data.packing=false",
        )
    if not row.calls:
        raise ModelError(
            f"{type(llm).__name__} does not route its attention through transformers' attention interface, so "
            "records packed in one row would see each other",
            remedy="set data.packing=false, or use an architecture that supports attention backends",
        )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, row_mask)
