"""The output head and its cross-entropy, in chunks: never more logits at once than one chunk times the vocabulary.

Owns the split of a causal LM into body and head, found by watching one small forward, and the loss of hidden states at
supervised positions. A model that does more to its logits than apply the head (soft-capping, scaling) is not split;
its own forward then gives all logits of a row at once, up to MAX_LOGIT_ROWS. Also the loss over choices, which joins
losses of tokens to losses of records.

Dimensions: S supervised positions, C of them in a chunk, D width, V vocabulary; G records, K choices of a record.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from mmit.errors import ModelError
from mmit.models.attention import run_row
from mmit.models.calls import RowInputs

MAX_LOGIT_ROWS = 8192  # supervised positions whose logits may be alive at once, where they cannot be cut into chunks
CHUNK_LOGITS = 1 << 26  # entries of a chunk: 256 MiB in float32

Split = tuple[nn.Module, nn.Module]


@torch.no_grad()
def split_head(llm: Any) -> Split | None:
    """Find body and head of a causal LM, or None where its logits are more than the head of the body's output."""
    inner: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    # A model may scale or cap its logits, or norm behind the body. One forward of two tokens tells: head and body are
    # apart if the head was given what the body returned, and what it made is the logits.
    body, head = inner.base_model, inner.get_output_embeddings()
    if body is inner or head is None:
        return None
    if head.weight.device.type == "meta":  # an empty model has no numbers to compare: it is taken for a plain one
        return body, head
    seen: dict[str, Any] = {}
    hooks = [
        body.register_forward_hook(lambda m, inputs, out: seen.update(hidden=getattr(out, "last_hidden_state", None))),
        head.register_forward_hook(lambda m, inputs, out: seen.update(given=inputs[0], made=out)),
    ]
    words = llm.get_input_embeddings().weight
    at = torch.arange(2, device=words.device)
    # A call, since ZeRO-3 gathers the table only then.
    embeddings = llm.get_input_embeddings()(at)
    try:
        logits = run_row(llm, RowInputs(embeddings, at, torch.tensor([[0, 2, -1]])), at=at).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.get("hidden") is None or "made" not in seen:
        return None
    hidden, given = seen["hidden"], seen["given"]
    abstract = hidden.is_meta or isinstance(hidden, FakeTensor)  # shapes without values, of a dry run
    same = hidden.shape == given.shape if abstract else torch.equal(hidden, given)
    return (body, head) if same and seen["made"] is logits else None


def check_rows(rows: int) -> None:
    """Refuse more logits at once than memory can be expected to hold. Raises ModelError."""
    if rows > MAX_LOGIT_ROWS:
        raise ModelError(f"{rows} supervised tokens in one row", remedy="lower data.pack_tokens or train.micro_rows")


def cross_entropy(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, *, chunk_logits: int = CHUNK_LOGITS
) -> torch.Tensor:
    """Cross-entropy of `head(hidden)`.

    Args:
        hidden: (S, D). targets: (S,).
        head: a frozen linear layer costs one product forward and one for the gradient of `hidden`, which is made
            in the forward pass; anything trained or adapted runs a second time in the backward pass where there is
            more than one chunk.
        chunk_logits: entries of a chunk, C * V.

    Returns:
        (S,) float32
    """
    weight: Any = getattr(head, "weight", None)
    if weight is not None and weight.ndim < 2:  # a partition of ZeRO-3: only a call of the module makes it whole
        check_rows(len(targets))
        return _loss(hidden, head, targets)
    vocabulary = int(getattr(head, "out_features", 0)) or weight.shape[0]
    rows = max(64, chunk_logits // vocabulary)
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return _FrozenHead.apply(hidden, head.weight, head.bias, targets, rows)
    if len(targets) <= rows:
        return _loss(hidden, head, targets)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_loss, h, head, t, use_reentrant=False) for h, t in pieces])


def _loss(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _softmax_loss(logits: torch.Tensor, targets: torch.Tensor, *, slope: bool) -> torch.Tensor:
    """Cross-entropy (C,) in float32 of (C, V) logits, which become its slope in place where that is wanted.

    Block by block: float32 copies stay as small as a block, which a CPU keeps in its cache.
    """
    losses = []
    block = 16 if logits.device.type == "cpu" else 256
    for part, target in zip(logits.split(block), targets[:, None].split(block), strict=True):
        top = part.amax(1, keepdim=True)
        probability = part.softmax(1, dtype=torch.float32)
        # The largest probability is exp(top - logsumexp): no pass of its own for the logsumexp.
        below = top.float() - part.gather(1, target).float()
        losses.append((below - probability.amax(1, keepdim=True).log())[:, 0])
        if slope:
            part.copy_(probability.scatter_add_(1, target, torch.full_like(below, -1.0)))
    return torch.cat(losses)


class _FrozenHead(torch.autograd.Function):
    """Hidden states (S, D), head (V, D) and (V,), targets (S,) -> losses (S,) float32.

    Loss and its gradient together, chunk by chunk; nothing of size V outlives its chunk. What is kept is (S, D).
    The loss of a position depends on its own hidden state alone, so the gradient for a weight of 1 is made at once
    and multiplied by the real one later.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(targets), rows):
            span = slice(begin, begin + rows)
            logits = F.linear(hidden[span], weight, bias)
            losses[span] = _softmax_loss(logits, targets[span], slope=slope is not None)
            if slope is not None:
                # `logits` holds its own gradient by now: the product with it is made while it is there.
                slope[span] = logits @ weight
        if slope is not None:
            ctx.save_for_backward(slope)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        # A loss of a position reaches its own hidden state alone, so the gradient for any weight is that for 1, scaled.
        return (slope * grad[:, None]).to(slope.dtype), None, None, None, None


def sums(losses: torch.Tensor, samples: torch.Tensor, *, count: int) -> torch.Tensor:
    """Sum losses (S,) by sample: (count,). `samples` (S,) says whose each is.

    A selection and not `index_add`, whose sum depends on the order of its threads on CUDA.
    """
    chosen = samples == torch.arange(count, device=losses.device)[:, None]  # (count, S)
    return torch.where(chosen, losses, 0).sum(1)


def choice_losses(
    losses: torch.Tensor,
    samples: torch.Tensor,
    *,
    choices: torch.Tensor,
    shares: torch.Tensor,
    questions: torch.Tensor,
    lm: float,
    temperature: float,
) -> torch.Tensor:
    """Cross-entropy over the choices of each record, plus a small part of the loss on its question (arXiv:2001.07676).

    The score of a choice is its log-probability, summed over its tokens and the one that ends it. With temperature T
    the scores are divided by T and the loss is multiplied by T squared, as in distillation.

    Args:
        losses: (S,) cross-entropies of tokens. samples: (S,) which sample each belongs to.
        choices: (G, K) the samples of each record, -1 behind the last. shares: (G, K), 0 there; they sum to 1.
        questions: (G,) the sample with loss on the question, -1 for none.
        lm: part of the mean loss on the question, 0 to 1; 1 - lm is that of the cross-entropy.

    Returns:
        (G,)
    """
    count = int(choices.shape[0] * choices.shape[1] + questions.shape[0])  # as many samples at most
    total = sums(losses, samples, count=count)
    scores = torch.where(choices < 0, -torch.inf, -total[choices.clamp_min(0)]) / temperature
    # `where`: a share of 0 on a choice that is not there is 0 and not NaN.
    weighed = torch.where(choices < 0, 0, shares * scores.log_softmax(1))
    found = -weighed.sum(1) * temperature**2
    if lm == 0:
        return found
    tokens = sums(torch.ones_like(losses), samples, count=count)
    at = questions.clamp_min(0)
    mean = torch.where(questions < 0, 0, total[at] / tokens[at].clamp_min(1))
    return (1 - lm) * found + lm * mean
