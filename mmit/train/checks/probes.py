"""Invariants of a model that a run measures before its first step.

A record in a row is the record alone, also the longest of the data; an adapter changes nothing before it is trained;
every tensor of an adapter has a gradient. In: the composite in place, and real records. Each probe is a few forwards
without dropout. What fails is one sentence with a way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmit.data.packing import Sample, build_row
from mmit.errors import ModelError
from mmit.models.calls import call
from mmit.models.modes import evaluation_mode
from mmit.models.partition import shape
from mmit.models.vlm import CANNOT_RUN, VLM, same_logits

if TYPE_CHECKING:
    from mmit.data.dataset import InstructionData
    from mmit.data.measure import Measurements

LAST = 32  # targets of a record that are compared
SAMPLES = 3


@torch.no_grad()
def check_records(vlm: VLM, data: InstructionData, scan: Measurements) -> None:
    """Compare a row of real records, the longest of all among them, with each of them alone.

    Raises:
        ModelError: they differ by more than rounding.
    """
    samples = _some(data, scan)
    if len(samples) < 2:
        return
    with evaluation_mode(vlm):
        together = _logits(vlm, samples, share=data.share_prefix and not vlm.padded)
        for sample in samples:
            if not same_logits(together[sample.record], _logits(vlm, [sample], share=False)[sample.record]):
                raise ModelError(
                    f"a record of {sample.length} tokens is answered differently beside other records than alone",
                    where="data.packing",
                    remedy="set data.packing=false" if not vlm.padded else "set train.micro_rows=1",
                )


def _some(data: InstructionData, scan: Measurements) -> list[Sample]:
    """The longest sample and the shortest of some others, numbered from 0."""
    # The longest, since what changes with length shows there first (windows, scaled positions, running states).
    order = scan.length.argsort(kind="stable")
    units = [int(order[-1]), *(int(u) for u in order[: SAMPLES - 1] if u != order[-1])]
    found = [max(data.unit_samples(scan, unit)[0], key=lambda s: s.length) for unit in units]
    return [Sample(s.ids, s.supervised, s.images, n, s.widths) for n, s in enumerate(found)]


def _logits(vlm: VLM, samples: list[Sample], *, share: bool) -> dict[int, torch.Tensor]:
    """(LAST, V) logits at the last targets of each record; pictures are vectors that hang on their place alone."""
    row = build_row(samples, share=share)
    device = vlm.device
    words = vlm.llm.get_input_embeddings()
    embeddings = words(row.input_ids.to(device))
    ids = row.input_ids.index_fill(0, row.image_positions, -1).to(device)
    if len(row.image_positions):
        # No tower is run: vectors of about the size of words, the same for a place in whatever row it stands.
        depth = row.positions[row.image_positions].float()[:, None] + 1
        size = words(torch.arange(64, device=device)).float().std()
        vectors = torch.sin(depth * torch.arange(1.0, embeddings.shape[1] + 1)).to(device) * size
        embeddings = embeddings.index_copy(0, row.image_positions.to(device), vectors.to(embeddings))
    places = {s.record: (row.target_records == s.record).nonzero()[-LAST:, 0] for s in samples}
    at = row.predict_at[torch.cat(list(places.values()))].to(device)
    logits = vlm.row_logits(embeddings, positions=row.positions.to(device), nodes=row.nodes, at=at, ids=ids)
    parts = logits.split([len(p) for p in places.values()])
    return dict(zip(places, parts, strict=True))


def _words(vlm: VLM) -> dict[str, Any]:
    """A row of one record from all over the vocabulary."""
    count, device = 8, vlm.device
    ids = torch.arange(1, count + 1, device=device) * max(shape(vlm.word_embeddings)[0] // (count + 1), 1)
    words = vlm.llm.get_input_embeddings()
    at = torch.arange(count, device=device)
    nodes = torch.tensor([[0, count, -1]])
    embeddings = words(ids)
    return {"embeddings": embeddings, "positions": at, "nodes": nodes, "at": at, "ids": ids}


@torch.no_grad()
def answers(vlm: VLM) -> torch.Tensor:
    """(S, V) logits of a few tokens, by which a model is recognised."""
    with evaluation_mode(vlm):
        return vlm.row_logits(**_words(vlm))


@torch.no_grad()
def check_embeddings(vlm: VLM) -> torch.Tensor:
    """Compare the model's answers to token ids, as transformers asks it, with those to what mmit gives it: embeddings
    and positions from 0.

    Returns:
        (S, V) the latter, as `answers` gives them.

    Raises:
        ModelError: the model does something to the ids that their embeddings do not show, or counts otherwise.
    """
    with evaluation_mode(vlm):
        row = _words(vlm)
        ids, at = row["ids"][None], row["positions"]
        given = {"input_ids": ids, "use_cache": False, "logits_to_keep": at}
        by_ids = call(vlm.llm, **given, optional=("use_cache",)).logits[0]
        try:
            by_embeddings = vlm.row_logits(**row)
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            raise ModelError(
                f"{type(vlm.llm).__name__} answers token ids and not their embeddings "
                f"({type(error).__name__}: {str(error)[:200]}), and pictures can only be given as embeddings",
                where="model.llm",
                remedy="use another language model",
            ) from error
        if same_logits(by_embeddings, by_ids):
            return by_embeddings
        counted = call(vlm.llm, **given, position_ids=at[None], optional=("use_cache", "position_ids")).logits[0]
        if same_logits(by_embeddings, counted):
            raise ModelError(
                f"{type(vlm.llm).__name__} counts the positions of tokens otherwise than from 0 (RoBERTa and its like "
                "leave out those of padding), so that what is trained here would answer otherwise there",
                where="model.llm",
                remedy="use another language model",
            )
        raise ModelError(
            f"{type(vlm.llm).__name__} answers token ids differently than their embeddings, and pictures can only "
            "be given as embeddings",
            where="model.llm",
            remedy="use another language model",
        )


@torch.no_grad()
def check_causal(vlm: VLM, before: torch.Tensor) -> None:
    """See that no token's answer hangs on what follows it: the loss would then be of a text that is shown.

    Args:
        vlm: to check. before: its `answers`.

    Raises:
        ModelError: it does.
    """
    with evaluation_mode(vlm):
        row = _words(vlm)
        half = len(row["ids"]) // 2
        ids = torch.cat([row["ids"][:half], row["ids"][half:].flip(0)])
        other = row | {"ids": ids, "embeddings": vlm.llm.get_input_embeddings()(ids)}
        changed = vlm.row_logits(**other)
    if not same_logits(changed[:half], before[:half]):
        raise ModelError(
            f"tokens of {type(vlm.llm).__name__} see those that follow, so that it would learn no answer to write",
            where="model.llm",
            remedy="use a language model that is a decoder, or one whose config says is_decoder: true if it is one",
        )


def check_start_of_adapter(vlm: VLM, before: torch.Tensor) -> None:
    """Compare with the `answers` from before an adapter was put on.

    Raises:
        ModelError: the adapter changes the model.
    """
    if not same_logits(answers(vlm), before):
        raise ModelError(
            "the adapter changes what the model answers before anything is trained: some of its layers read the "
            "weights of others past their adapters",
            where="tune.llm.options",
            remedy="set init: true, or name other layers in targets",
        )


def without_gradient(vlm: VLM) -> list[str]:
    """Names of the trained tensors of the LLM that a forward of a few tokens gives no gradient."""
    trained = {n: p for n, p in vlm.llm.named_parameters() if p.requires_grad}
    # allow_unused gives None for what the loss does not depend on; a gradient of zeros is one (LoRA's A before B
    # moves).
    with evaluation_mode(vlm), torch.enable_grad():
        loss = vlm.row_logits(**_words(vlm)).float().square().mean()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, found, strict=True) if gradient is None]
