"""Decoding: from prompts laid into rows to new tokens, one step for all unfinished prompts at a time.

Owns the key-value cache of a batch and the sums behind likelihood scoring. Takes embeddings and index tensors of rows,
gives token ids; knows neither tokenizers nor records. Many prompts run as one row, so what they share (system prompt,
picture) is computed once; then every prompt's path is copied out into a left-padded batch. Refuses what a model's cache
does not allow: see `support`.

Dimensions: T tokens in a row, B prompts, S targets, L longest path, KV key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mmit.errors import ModelError
from mmit.models.attention import NAME, run_row
from mmit.models.batch_cache import GrowingLayer, batch_cache
from mmit.models.calls import RowInputs, cache_name, cache_of, call, takes
from mmit.models.deepstack import as_wide
from mmit.models.llm import input_device
from mmit.models.modes import evaluation_mode
from mmit.models.per_record import rotary_limit, turning_point
from mmit.models.prefix_cache import Before
from mmit.models.sampling import Sampling, choose
from mmit.models.sending import send
from mmit.models.virtual import with_prompt
from mmit.models.vlm import CANNOT_RUN, same_logits

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

LLM = PreTrainedModel | PeftModel
CROWDED = 0.75  # a batch is closed up when no more than this share of its places is still at work

Stop = Callable[[int, Sequence[int]], bool]
Keep = Callable[[Cache, Sequence[Sequence[int]]], None]


class Prompts(NamedTuple):
    """A row of prompts: token embeddings and where each prompt ends."""

    embeddings: torch.Tensor  # (T, width of the LLM)
    positions: torch.Tensor  # (T,)
    nodes: torch.Tensor  # (K, 3) first token, length, parent or -1; parents come first
    predict_at: torch.Tensor  # (B,) last token of each prompt
    before: Before | None = None  # tokens of the first nodes that were run before; T and B's places are without them
    ids: torch.Tensor | None = None  # (T,) of the tokens, negative for pictures, where layers ask; see `calls.call`


@dataclass(frozen=True, slots=True)
class Support:
    """What a language model's attention and cache allow."""

    batched: bool  # prompts of several lengths can be decoded together
    shared: bool  # many prompts can run as one row


def support(llm: LLM) -> Support:
    """Find out what a language model allows, by its kinds of cache layer and a row of two tokens.

    Keys and values of every past token can be copied and padded; a running state (convolutions, linear
    attention) cannot, so such a model decodes one prompt at a time with the cache it makes itself. Layers with a
    sliding window are kept whole: transformers' mask hides what lies outside the window.
    """
    # The kinds of layer that transformers itself makes for this config: names of models are not asked.
    layers = DynamicCache(config=llm.config).layers
    config = llm.config.get_text_config()
    chunked = getattr(config, "attention_chunk_size", None) is not None
    # Loops of such a model read what the last one has put into the cache, and cut it to their windows themselves.
    looped = getattr(config, "recurrent_kv_cache_mode", None) == "last_loop"
    if chunked or looped or not {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return Support(batched=False, shared=False)
    if not takes(llm, "position_ids") and not _counts_by_mask(llm):
        return Support(batched=False, shared=False)
    return Support(batched=True, shared=_shares_rows(llm))


@torch.no_grad()
def _counts_by_mask(llm: LLM) -> bool:
    """Whether a prompt with padding in front goes on as it does alone, in a model that is not given positions."""
    # BLOOM's positions come of the mask. RoFormer's are a count of what the cache holds, padding included.
    device = input_device(llm)
    rows = []
    for ids in (torch.tensor([1, 2], device=device), torch.tensor([3, 4, 5, 6, 7], device=device)):
        words, at = llm.get_input_embeddings()(ids), torch.arange(len(ids), device=device)
        rows.append(Prompts(words, at, torch.tensor([[0, len(ids), -1]]), at[-1:]))
    able = Support(batched=True, shared=False)
    try:
        with evaluation_mode(llm):
            beside = step(llm, prefill(llm, rows, support=able), [2, 2])[:1]
            alone = step(llm, prefill(llm, rows[:1], support=able), [2])
    except torch.OutOfMemoryError:
        raise
    except (ModelError, *CANNOT_RUN):  # a cache of another kind
        return False
    return same_logits(beside, alone)


def _shares_rows(llm: LLM) -> bool:
    # Prompts that share a beginning share its keys, which the length of a prompt may not decide about.
    if llm.config._attn_implementation != NAME or rotary_limit(llm) is not None:
        return False
    zeros = torch.zeros(2, dtype=torch.int64, device=input_device(llm))
    two = Prompts(
        llm.get_input_embeddings()(zeros).detach(),
        zeros,
        torch.tensor([[0, 1, -1], [1, 1, -1]]),
        torch.tensor([1], device=zeros.device),
    )
    try:
        _run(llm, two, DynamicCache())
    except (ModelError, TypeError, ValueError):  # attention that mmit does not compute
        return False
    return True


@dataclass(slots=True)
class State:
    """A batch between two steps."""

    cache: Cache
    lengths: torch.Tensor  # (B,) on the CPU, tokens of each prompt that are in the cache
    logits: torch.Tensor  # (B, V) for the next token
    # Longrope: the prompts, one a row, and the length beyond which their cached keys are of the wrong factors.
    rows: list[Prompts] | None = None
    turn: int | None = None


def prefill(llm: LLM, rows: Sequence[Prompts], *, support: Support, keep: Keep | None = None) -> State:
    """Run the prompts and lay them into one batch, row after row.

    Args:
        llm: the language model.
        rows: one row of many prompts where `support.shared`; else rows of one prompt each, and just one such row
            unless `support.batched`.
        support: `support(llm)`.
        keep: given each row's cache, and where in it the tokens of each prompt are.

    Raises:
        ModelError: the model does not support rows of this kind.
    """
    # A part of a row is known only where there is no soft prompt, which would stand before all that is known.
    rows = [row if row.before is not None else _prompted(llm, row) for row in rows]
    turn = turning_point(llm)
    kept: dict[str, Any] = {} if turn is None else {"rows": list(rows), "turn": turn}
    if not support.batched:
        (row,) = rows
        out = _run(llm, row, None)
        cache_name(llm)  # refuses a model whose next step could not be given the cache
        cache = cache_of(out)
        if cache is None:
            raise ModelError(
                f"{type(llm).__name__} returns no cache that the next step could continue from",
                remedy="use an architecture that transformers can decode with a cache",
            )
        return State(cache, torch.tensor([len(row.embeddings)]), out.logits[0], **kept)
    caches: list[Cache] = [DynamicCache() if row.before is None else row.before.cache for row in rows]
    logits = [_run(llm, row, cache).logits[0] for row, cache in zip(rows, caches, strict=True)]
    known = [0 if row.before is None else row.before.length for row in rows]
    # `predict_at` counts without the known tokens, the nodes with them.
    paths = [paths_of(row.nodes.tolist(), (row.predict_at + n).tolist()) for row, n in zip(rows, known, strict=True)]
    for cache, each in zip(caches, paths, strict=True):
        if keep is not None:
            keep(cache, each)
    lengths = torch.tensor([len(path) for row in paths for path in row])
    return State(batch_cache(caches, paths), lengths, torch.cat(logits), **kept)


def _prompted(llm: LLM, row: Prompts) -> Prompts:
    """A row below the model's soft prompt, if it has one."""
    embeddings, positions, nodes, at = with_prompt(llm, *row[:4])
    ids = None if row.ids is None else F.pad(row.ids, (len(embeddings) - len(row.embeddings), 0), value=-1)
    return Prompts(embeddings, positions, nodes, at, ids=ids)


def _run(llm: LLM, row: Prompts, cache: Cache | None) -> Any:
    """Run a row; without `cache`, a single prompt whose model makes the cache it needs by itself."""
    if cache is None:
        return call(
            llm,
            inputs_embeds=row.embeddings[None],
            position_ids=row.positions[None],
            use_cache=True,
            logits_to_keep=row.predict_at,
            ids=None if row.ids is None else row.ids[None],
            optional=("use_cache", "position_ids"),
        )
    before = Before(0 if row.before is None else row.before.length, cache)
    inputs = RowInputs(row.embeddings, row.positions, row.nodes, row.ids)
    return run_row(llm, inputs, at=row.predict_at, before=before)


def in_parts(row: Prompts, most: int) -> list[Prompts]:
    """A row of one prompt as rows of at most so many tokens, each of which goes on from the cache of those before."""
    known, cache = (0, DynamicCache()) if row.before is None else row.before
    parts = []
    for begin in range(0, len(row.embeddings), most):
        embeddings, positions = row.embeddings[begin : begin + most], row.positions[begin : begin + most]
        size, above = len(positions), known + begin
        nodes = torch.tensor([[0, above, -1], [above, size, 0]] if above else [[0, size, -1]])
        ids = None if row.ids is None else row.ids[begin : begin + most]
        last = row.predict_at.new_tensor([size - 1])
        parts.append(Prompts(embeddings, positions, nodes, last, Before(above, cache), ids))
    return parts


def feed(llm: LLM, part: Prompts) -> None:
    """Run a part of a prompt that is not its last one: its keys and values go into the cache."""
    assert part.before is not None
    _run(llm, part, part.before.cache)


def paths_of(nodes: list[list[int]], predict_at: list[int]) -> list[list[int]]:
    """Row positions of each prompt's tokens, in order."""
    above: list[list[int]] = []
    for _, _, parent in nodes:
        start, length, _ = nodes[parent]
        above.append([] if parent < 0 else above[parent] + list(range(start, start + length)))
    owner = {start + i: n for n, (start, length, _) in enumerate(nodes) for i in range(length)}
    return [above[owner[at]] + list(range(nodes[owner[at]][0], at + 1)) for at in predict_at]


def join(state: State, more: State) -> None:
    """Put the prompts of `more` behind those of `state`, between two steps; uses `more` up.

    Both are of one model whose prompts can be batched. Nothing of `state` is copied while its buffers have room.
    """
    for layer, new in zip(state.cache.layers, more.cache.layers, strict=True):
        cast("GrowingLayer", layer).join(cast("GrowingLayer", new))
    state.lengths = torch.cat([state.lengths, more.lengths])
    if state.rows is not None and more.rows is not None:
        state.rows += more.rows


def leave(state: State, kept: list[int]) -> None:
    """Keep the prompts at some places of the batch, in this order; at least one.

    A place that stays where it is costs nothing.
    """
    lengths = state.lengths[torch.tensor(kept)]
    width = int(lengths.max())
    for layer in state.cache.layers:
        cast("GrowingLayer", layer).keep(kept, width)
    state.lengths = lengths
    if state.rows is not None:
        state.rows = [state.rows[place] for place in kept]


def steps(
    llm: LLM,
    state: State,
    *,
    limits: Sequence[int],
    end_ids: Sequence[int],
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
    stop: Stop | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Decode, yielding after each step the new tokens as (prompt, id); uses the state up.

    Args:
        llm: the language model.
        state: from `prefill`.
        limits: (B,) most new tokens of each prompt, at least 1.
        end_ids: ids that end an answer; they are not yielded.
        sampling: greedy if None.
        numbers: (B,) what stands for each prompt in its random draws; default its place in the batch.
        stop: asked after each token with the prompt and all its new ids; True ends it.

    Raises:
        ModelError: the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    places = list(range(len(limits)))  # the prompt that each place of the batch works for
    draws = [sampling.generator(n) for n in (places if numbers is None else numbers)]
    answers: list[list[int]] = [[] for _ in places]
    running = set(places)
    logits = state.logits
    while True:
        chosen = choose(logits, sampling, [draws[prompt] for prompt in places])
        new = []
        for prompt, token in zip(places, chosen, strict=True):
            if prompt not in running:
                continue
            # The end itself is no part of the answer: neither yielded, nor counted, nor shown to `stop`.
            if token in end_ids:
                running.remove(prompt)
                continue
            answers[prompt].append(token)
            new.append((prompt, token))
            if len(answers[prompt]) >= limits[prompt] or (stop is not None and stop(prompt, answers[prompt])):
                running.remove(prompt)
        if new:
            yield new
        if not running:
            return
        # A finished prompt's place computes for nothing; closing up copies keys. So only when enough of them are done.
        if len(running) <= CROWDED * len(places):
            kept = [place for place, prompt in enumerate(places) if prompt in running]
            leave(state, kept)
            places, chosen = [places[k] for k in kept], [chosen[k] for k in kept]
        logits = step(llm, state, chosen)
        renew(llm, state, logits, [answers[prompt] if prompt in running else None for prompt in places])


def step(llm: LLM, state: State, chosen: Sequence[int]) -> torch.Tensor:
    """Feed one token per place; return (B, V) logits."""
    device = input_device(llm)
    # Columns left of a prompt's first token. A batch of one has none, whatever its cache counts.
    padding = state.cache.get_seq_length() - state.lengths if len(chosen) > 1 else torch.zeros(1, dtype=torch.int64)
    # One copy to the device for all that a step needs there.
    ids, positions, *rest = send(torch.stack([torch.tensor(chosen), state.lengths, padding]), device)
    mask = None
    if padding.any():
        columns = torch.arange(state.cache.get_seq_length() + 1, device=device)
        mask = (columns >= rest[0][:, None]).long()
    out = call(
        llm,
        input_ids=ids[:, None],
        attention_mask=mask,
        position_ids=positions[:, None],
        use_cache=True,
        logits_to_keep=1,
        cache=state.cache,
        # A model that does not take positions has none, or counts them from the mask and the cache.
        optional=("use_cache", "position_ids"),
    )
    state.lengths = state.lengths + 1
    return out.logits[:, -1]


def renew(llm: LLM, state: State, logits: torch.Tensor, written: Sequence[Sequence[int] | None]) -> None:
    """Correct, in place, the (B, V) logits of prompts that have just grown past the switch of longrope.

    Args:
        written: (B,) each place's new ids, the one just fed among them; None for a finished one.
    """
    for place, answer in enumerate(written if state.turn is not None else ()):
        # Once for each prompt: at the step in which it grows past the point, and not after, when all its keys are of
        # the new factors.
        if answer is not None and int(state.lengths[place]) - 1 == state.turn:
            logits[place] = _anew(llm, state, place, answer)


def _anew(llm: LLM, state: State, place: int, answer: Sequence[int]) -> torch.Tensor:
    """Run a prompt and its answer so far as one sequence, put its keys and values in place; return (V,) logits.

    What transformers does where a sequence grows past the point at which longrope changes its factors.
    """
    assert state.rows is not None
    row = state.rows[place]
    words = llm.get_input_embeddings()(torch.tensor(answer, device=input_device(llm)))
    embeddings = torch.cat([row.embeddings, as_wide(words.to(row.embeddings), row.embeddings)])
    more = torch.arange(1, len(answer) + 1, device=row.positions.device)
    positions = torch.cat([row.positions, row.positions[-1] + more])
    nodes = torch.tensor([[0, len(embeddings), -1]])
    ids = None if row.ids is None else torch.cat([row.ids, row.ids.new_tensor(answer)])
    last = torch.tensor([len(embeddings) - 1], device=positions.device)
    whole = Prompts(embeddings, positions, nodes, last, ids=ids)
    if not isinstance(state.cache.layers[0], GrowingLayer):
        out = _run(llm, whole, None)
        state.cache = cast("Cache", cache_of(out))
        return out.logits[0, -1]
    cache = DynamicCache()
    out = _run(llm, whole, cache)
    for layer, new in zip(state.cache.layers, cache.layers, strict=True):
        cast("GrowingLayer", layer).put(place, cast("Any", new).keys[0], cast("Any", new).values[0])
    return out.logits[0, -1]


def decode(llm: LLM, state: State, *, limits: Sequence[int], **options: Any) -> list[list[int]]:
    """Return the new ids of every prompt.

    Args:
        llm, state, limits, options: as `steps` takes them.

    Returns:
        (B,) lists of ids, each of at most its limit.
    """
    answers: list[list[int]] = [[] for _ in limits]
    for new in steps(llm, state, limits=limits, **options):
        for prompt, token in new:
            answers[prompt].append(token)
    return answers


class Likelihoods(NamedTuple):
    """Of some continuations: the summed log-probability of each, and how many of its tokens are not the likeliest."""

    sums: torch.Tensor  # (count,) float32
    misses: torch.Tensor  # (count,) int64


def log_likelihoods(vlm: VLM, row: Prompts, *, targets: torch.Tensor, owners: torch.Tensor, count: int) -> Likelihoods:
    """Sum the log-probabilities of given continuations.

    Args:
        vlm: the composite.
        row: the prompts with their continuations; `predict_at` (S,) is where each target is predicted.
        targets: (S,) the tokens of the continuations.
        owners: (S,) which of the `count` continuations each belongs to.
        count: number of continuations.
    """
    logits = vlm.row_logits(row.embeddings, positions=row.positions, nodes=row.nodes, at=row.predict_at, ids=row.ids)
    targets, owners = send(targets, logits.device), send(owners, logits.device)
    log_probabilities = -F.cross_entropy(logits.float(), targets, reduction="none")
    missed = (logits.argmax(-1) != targets).long()
    return Likelihoods(
        torch.zeros(count, device=logits.device).index_add_(0, owners, log_probabilities),
        torch.zeros(count, dtype=torch.int64, device=logits.device).index_add_(0, owners, missed),
    )
