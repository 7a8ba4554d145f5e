"""Word alignment: before the first step, teach the projector the LLM's own vocabulary, without running the LLM.

A projector that starts random speaks noise, and through a frozen LLM it hears about its mistakes only faintly: on
easy-VQA 140 steps of captioning taught it nothing. Here the image tokens of a captioned picture, averaged, must pick
the caption's words out of the LLM's input embeddings: a softmax over cosine similarities, as predicting a picture's
bag of words from its features (Joulin et al., arXiv:1511.02251), with the embedding matrix as the classifier. Their
size is held at that of real word embeddings, so that the LLM meets vectors of the kind it knows.

Owns the loss, its small loop, and the captions it takes; leaves everything but the projector alone. One short
training, so rank 0 does it alone and the others get its projector. Refuses records that are not captions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mmit.data.image_identity import image_key
from mmit.data.sources import open_source, split_subset
from mmit.errors import ConfigError, RecordError, located
from mmit.models.partition import gathered, shape
from mmit.train.features import CachePlan, FeatureCache, compute_features

if TYPE_CHECKING:
    from mmit.data.preparation import ImagePreparation
    from mmit.models.projector_base import Projector
    from mmit.records import Record
    from mmit.train.checkpoint.model import Loaded
    from mmit.train.engines.world import World

SHARPNESS = 20.0  # factor on the cosine: 1 / temperature of the softmax
NORM_WEIGHT = 0.1  # weight of the size penalty
BATCH = 64  # captions
NEGATIVES = 4096  # random vocabulary entries that compete with the words of all captions


@dataclass(frozen=True)
class Alignment:
    """What to align with, and how long."""

    captions: str  # an mmit JSONL
    epochs: int
    lr: float
    seed: int = 0


def align_words(
    projector: Projector,
    features: torch.Tensor,
    words: Sequence[Sequence[int]],
    embeddings: torch.Tensor,
    plan: Alignment,
    *,
    alive: Callable[[], None] = lambda: None,
) -> float:
    """Train the projector in place; returns the loss of the last epoch.

    Args:
        projector: (B, N, D_v) -> (B, M, D).
        features: (P, N, D_v) of P pictures.
        words: for each picture the token ids of its caption.
        embeddings: (V, D) input embeddings of the LLM.
        plan: epochs, learning rate and seed; captions are given as `words`.
        alive: called after each step.

    Raises:
        RecordError: no picture has a caption.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    task = _Words(words, embeddings, generator)
    dtypes = {name: p.dtype for name, p in projector.named_parameters()}
    # Whatever the run's format: there are no masters here, and in bf16 small updates would be rounded away.
    projector.float().train()
    device = next(projector.parameters()).device
    optimizer = torch.optim.AdamW(projector.parameters(), lr=plan.lr, weight_decay=0.01)
    steps = plan.epochs * -(-len(words) // BATCH)
    step, last = 0, math.nan
    for _ in range(plan.epochs):
        total = 0.0
        order = torch.randperm(len(words), generator=generator)
        for chunk in order.split(BATCH):
            loss = task.loss(projector(features[chunk].to(device, torch.float32)), chunk)
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total += loss.item() * len(chunk)
            alive()
        last = total / len(words)
    projector.zero_grad()  # what is left of the last step must not go into the first of the run
    for name, parameter in projector.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return last


class _Words:
    """Picks the words of captions out of a table of embeddings.

    Args:
        words: for each of P pictures the token ids of its caption.
        embeddings: (V, D).
    """

    def __init__(self, words: Sequence[Sequence[int]], embeddings: torch.Tensor, generator: torch.Generator) -> None:
        used = sorted({w for caption in words for w in caption})
        if not used:
            raise RecordError("no caption has a word", where="align.captions", remedy="check the caption records")
        # A sample of the vocabulary stands for all of it: the words of the captions, and others to be told from.
        others = torch.randperm(len(embeddings), generator=generator)[:NEGATIVES]
        kept = torch.tensor(used)
        kept = torch.cat([kept, others[~torch.isin(others, kept)]]).to(embeddings.device)
        number = {int(w): i for i, w in enumerate(kept.tolist())}
        self._targets = [[number[w] for w in caption] for caption in words]
        self._classes = F.normalize(embeddings[kept].float(), dim=-1)
        self._size = embeddings.float().pow(2).mean().sqrt()

    def loss(self, tokens: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """Mean over words, with the size penalty; `tokens` (B, M, D) are of the pictures `chunk` (B,)."""
        logits = SHARPNESS * F.normalize(tokens.mean(1), dim=-1) @ self._classes.T
        pairs = [(i, word) for i, p in enumerate(chunk.tolist()) for word in self._targets[p]]
        rows, targets = torch.tensor(pairs, device=tokens.device).T
        # Without it nothing holds the size, since cosines do not see it.
        away = tokens.pow(2).mean(-1).sqrt() / self._size - 1
        return F.cross_entropy(logits[rows], targets) + NORM_WEIGHT * away.pow(2).mean()


def align_to_captions(
    model: Loaded,
    preparation: ImagePreparation | None,
    plan: Alignment,
    *,
    features: FeatureCache | None,
    world: World,
    begin: Callable[[str], None],
    work: Callable[[], None] = lambda: None,
) -> str:
    """Align the projector with the words of captions; all ranks come here, rank 0 trains. Returns what rank 0 found.

    A model that reads tiles is aligned on whole images: a word has no tile of its own.

    Args:
        features: of the run, used where they have all images of the captions.
        begin: receives the name of each phase, for the heartbeat. work: is called after each step, for it too.

    Raises:
        ConfigError: no projector, or one for DeepStack. RecordError: a record is not a caption.
    """
    vlm, run_dir = model.vlm, model.folder
    if vlm.projector is None or vlm.vision is None or preparation is None:
        raise ConfigError("there is no projector to align", where="align", remedy="set model.vision, or align=null")
    projector = vlm.projector
    if projector.deep:
        problem = "a projector for DeepStack gives more than word embeddings, and only these can be aligned"
        raise ConfigError(problem, where="align", remedy="set align=null, or projector kind mlp")
    with world.together():  # rank 0 converts a foreign format first, the others then find the result
        records = _captions(plan.captions, run_dir / "data") if world.main else []
    with world.together():
        records = records or _captions(plan.captions, run_dir / "data")
    words = [model.tokenizer(" " + r.turns[-1].text, add_special_tokens=False)["input_ids"] for r in records]
    keys = [image_key(r.images[0]) for r in records]
    if features is None or preparation.tiled or any(k not in features for k in keys):
        pictures = zip(keys, (r.images[0] for r in records), strict=True)
        cache = CachePlan(len(set(keys)), kind="memory", folder=run_dir / "cache")
        features = compute_features(vlm.vision, pictures, preparation.whole(), cache, world=world, begin=begin)
    seen, result = features.get(keys), ""
    begin("word alignment")
    with gathered(vlm.word_embeddings):
        ids = torch.arange(shape(vlm.word_embeddings)[0], device=vlm.device)
        # What the LLM gets for a word: some scale the table's rows inside the embedding module.
        embeddings = vlm.llm.get_input_embeddings()(ids).detach()

        def align(alive: Callable[[], None]) -> None:
            nonlocal result
            loss = align_words(projector, seen, words, embeddings, plan, alive=alive)
            result = f"word alignment: {len(records)} captions, {plan.epochs} epochs, loss {loss:.3f}"
            begin("sharing the projector")

        if not world.main:  # this far ahead: who looks at the heartbeats sees that rank 0 is waited for
            begin("sharing the projector")
        world.first(align, also=work)
    for tensor in projector.state_dict().values():
        world.share(tensor, source=0)
    return result


def check_captions(path: str) -> None:
    """Raise ConfigError where there are no captions at `path`, before features of a whole data set are computed."""
    if not os.path.exists(split_subset(path)[0]):
        remedy = "check the path, import captions to it (mmit data import), or set align=null"
        raise ConfigError("no such file", where=f"align.captions: {path}", remedy=remedy)


def _captions(path: str, cache: Path) -> list[Record]:
    with located("align.captions"):
        source = open_source(path, cache=cache)
    return [_caption(source[i]) for i in range(len(source))]


def _caption(record: Record) -> Record:
    if len(record.images) != 1 or record.turns[-1].role != "assistant":
        raise RecordError("is not a caption (one image, one answer)", where=record.where, remedy="check align.captions")
    return record
