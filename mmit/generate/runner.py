"""Prompts through a composite, up to where their answers begin.

In: prompts as tokens and the features of their pictures. Out: the state that decoding goes on from, or a row with its
embeddings. Prompts that share one run lie in one row, and a common beginning is computed once; a store of beginnings
that were run before spares those too. Draws no token and knows no chat format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from mmit.data.packing import Row, Sample, build_row, token_keys, without
from mmit.data.preparation import splice_index
from mmit.models import decoding
from mmit.models.calls import asks_for_ids
from mmit.models.decoding import Prompts
from mmit.models.prefix_cache import BLOCK, divide
from mmit.models.virtual import virtual_tokens

if TYPE_CHECKING:
    from mmit.data.prompts import Prompt
    from mmit.models.prefix_cache import Block, PrefixCache
    from mmit.models.vlm import VLM
    from mmit.pictures import Features, Pictures


@dataclass(slots=True)
class Usage:
    """What a model has computed since it was made."""

    prefill_tokens: int = 0  # prompt tokens run through the LLM
    unshared_tokens: int = 0  # what they would be if no beginning were shared
    new_tokens: int = 0
    pictures: int = 0  # pictures run through the vision tower


class Runner:
    """A composite that prompts are run through, and counts of what was computed.

    Attributes:
        vlm: the composite, in eval mode.
        usage: counts of what was computed so far.
        activate: called before the LLM runs a prompt or the engine a step: where several models share one LLM, it
            puts this one's adapter to work. Answers of two such models may not be streamed at the same time.
    """

    def __init__(self, vlm: VLM) -> None:
        # Dropout and batch statistics must not play a part in an answer, whatever the caller did before.
        self.vlm = vlm.eval()
        self.usage = Usage()
        self.activate: Callable[[], None] = _nothing
        self._support: decoding.Support | None = None

    @property
    def support(self) -> decoding.Support:
        """Whether its prompts can be decoded together, and run as one row."""
        if self._support is None:
            self._support = decoding.support(self.vlm.llm)
        return self._support

    def prefill(
        self, batch: Sequence[Prompt], features: Features, *, store: PrefixCache | None = None
    ) -> tuple[decoding.State, list[int]]:
        """Run prompts, one sample each, up to where their answers begin; just one unless `support.batched`.

        Args:
            store: beginnings that were run before, whose tokens are not run again; takes up those of the batch.

        Returns:
            the state of the batch, and of each prompt how many tokens were known.
        """
        samples = [prompt.samples[0] for prompt in batch]
        if store is None or not self._remembers:
            rows = [self._row(group, features)[1] for group in self._groups(samples)]
            return decoding.prefill(self.vlm.llm, rows, support=self.support), [0] * len(batch)
        tokens = [token_keys(sample) for sample in samples]
        found = [store.find(each) for each in tokens]
        prompts, known = self._row_beyond(samples, features, store, found)

        keep = partial(store.add, tokens)
        return decoding.prefill(self.vlm.llm, [prompts], support=self.support, keep=keep), known

    def prefill_in_parts(
        self, prompt: Prompt, features: Features, *, store: PrefixCache, most: int
    ) -> Iterator[tuple[decoding.State, int] | None]:
        """Run one prompt as `prefill` does, in parts; other work may be done between two of them.

        Args:
            prompt: of one sample. features: of its pictures.
            store: known beginnings; a model that it keeps nothing of is run in one part.
            most: tokens of a part.

        Yields:
            None after every part but the last, then the state and how many tokens were known.
        """
        sample = prompt.samples[0]
        if not self._remembers:
            state, (known,) = self.prefill([prompt], features, store=store)
            yield state, known
            return
        tokens = token_keys(sample)
        row, (known,) = self._row_beyond([sample], features, store, [store.find(tokens)])
        *parts, last = decoding.in_parts(row, most)
        for part in parts:
            self.activate()  # between two parts another model of the same base may have worked
            decoding.feed(self.vlm.llm, part)
            yield None
        self.activate()
        keep = partial(store.add, [tokens])
        yield decoding.prefill(self.vlm.llm, [last], support=self.support, keep=keep), known

    def unknown(self, prompt: Prompt, store: PrefixCache) -> int:
        """How many tokens of a prompt `prefill` would run."""
        known = len(store.find(token_keys(prompt.samples[0]))) * BLOCK if self._remembers else 0
        return prompt.length - known

    def remember(
        self, store: PrefixCache, prompt: Prompt, ids: Sequence[int], state: decoding.State, place: int
    ) -> None:
        """Keep what was run of a prompt and the answer to it, for the prompt that goes on from there.

        Args:
            ids: of the answer. state, place: where it was decoded, before it leaves.
        """
        if self._remembers:
            length, width = int(state.lengths[place]), state.cache.get_seq_length()
            tokens = [*token_keys(prompt.samples[0]), *ids][:length]
            store.add([tokens], state.cache, [range(width - length, width)], place=place)

    @property
    def _remembers(self) -> bool:
        """A model without shared rows runs each prompt as plain attention, and a soft prompt comes before all keys."""
        return self.support.shared and not virtual_tokens(self.vlm.llm)

    def _row_beyond(
        self, samples: list[Sample], features: Features, store: PrefixCache, found: list[list[Block]]
    ) -> tuple[Prompts, list[int]]:
        """Lay samples into a row of which the tokens of the blocks `found` for each are known, and how many."""
        whole = build_row(samples)
        paths = decoding.paths_of(whole.nodes.tolist(), whole.predict_at.tolist())
        division = divide(whole.nodes.tolist(), paths, [len(blocks) * BLOCK for blocks in found])
        # Nothing is known: the plain way keeps the row as it is.
        if not division.length:
            return self._row(samples, features)[1], [0] * len(samples)
        row, kept = without(whole, division.order[: division.length])
        self.usage.unshared_tokens += whole.unshared_tokens
        embeddings = self._embedded(row, features, kept)
        nodes = torch.tensor(division.nodes)
        known = set(division.order[: division.length])
        device = self.vlm.device
        before = store.before(division, paths, found)
        places = row.positions.to(device), nodes, row.predict_at.to(device)
        prompts = Prompts(embeddings, *places, before, self._ids(row))
        return prompts, [sum(place in known for place in path) for path in paths]

    def _see(self, pictures: Pictures, batch: Sequence[Prompt]) -> Features:
        before = pictures.seen
        features = pictures.take(batch)
        self.usage.pictures += pictures.seen - before
        return features

    def _groups(self, samples: list[Sample]) -> list[list[Sample]]:
        """Samples by the row they run in: all in one where the model allows it, else each in its own."""
        return [samples] if self.support.shared else [[sample] for sample in samples]

    def _row(self, samples: list[Sample], features: Features) -> tuple[Row, Prompts]:
        """Lay samples into a row and splice their pictures in."""
        row = build_row(samples)
        self.usage.unshared_tokens += row.unshared_tokens
        embeddings, device = self._embedded(row, features), self.vlm.device
        places = row.positions.to(device), row.nodes, row.predict_at.to(device)
        return row, Prompts(embeddings, *places, ids=self._ids(row))

    def _ids(self, row: Row) -> torch.Tensor | None:
        """(T,) ids of a row, negative for pictures; None for a model whose layers do not ask for them."""
        if not asks_for_ids(self.vlm.llm):
            return None
        return row.input_ids.index_fill(0, row.image_positions, -1).to(self.vlm.device)

    def _embedded(self, row: Row, features: Features, kept: torch.Tensor | None = None) -> torch.Tensor:
        """(T, D) embeddings of a row; `kept`: which of its pictures' tokens it still has, None for all."""
        vlm = self.vlm
        # Before anything of the LLM runs, the look-up of embeddings included.
        self.activate()
        # The order in which `splice_index` counts the crops of distinct pictures.
        keys = list(dict.fromkeys(row.images))
        spreads = {key: features[key][1] for key in keys}
        index = splice_index(row.images, spreads, vlm.image_tokens)
        if kept is not None:
            index = index[kept]
        # A device map may put the embeddings elsewhere than the projector.
        home = vlm.device if vlm.projector is None else next(vlm.projector.parameters()).device
        self.usage.prefill_tokens += len(row.input_ids)
        return vlm.embed(
            row.input_ids.to(vlm.device),
            image_positions=row.image_positions.to(vlm.device),
            image_index=index.to(home),
            image_tokens=vlm.image_tokens,
            features=torch.cat([features[key][0] for key in keys]) if len(index) else None,
        )


def _nothing() -> None:
    """An LLM of one adapter, or of none, is always ready."""
