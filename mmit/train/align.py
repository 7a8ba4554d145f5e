"""Word alignment: before the first step, teach the projector the LLM's own vocabulary, without running the LLM.

A projector that starts random speaks noise, and through a frozen LLM it hears about its mistakes only faintly: on
easy-VQA 140 steps of captioning taught it nothing. Here the image tokens of a captioned picture, averaged, must pick
the caption's words out of the LLM's input embeddings: a softmax over cosine similarities, as predicting a picture's
bag of words from its features (Joulin et al., arXiv:1511.02251), with the embedding matrix as the classifier. Their
size is held at that of real word embeddings, so that the LLM meets vectors of the kind it knows.

Owns the loss and its small loop. Takes features and token ids; leaves everything but the projector alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mmit.errors import RecordError

if TYPE_CHECKING:
    from mmit.models.projector_base import Projector

SHARPNESS = 20.0  # factor on the cosine: 1 / temperature of the softmax
NORM_WEIGHT = 0.1  # weight of the size penalty


def align_words(  # noqa: PLR0913
    projector: Projector,
    features: torch.Tensor,
    words: Sequence[Sequence[int]],
    embeddings: torch.Tensor,
    *,
    epochs: int,
    lr: float,
    batch: int = 64,
    negatives: int = 4096,
    seed: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> float:
    """Train the projector in place; returns the loss of the last epoch.

    Args:
        projector: (B, N, D_v) -> (B, M, D).
        features: (P, N, D_v) of P pictures.
        words: for each picture the token ids of its caption.
        embeddings: (V, D) input embeddings of the LLM.
        negatives: random vocabulary entries that compete with the words of all captions.
        alive: called after each step.

    Raises:
        RecordError: no picture has a caption.
    """
    used = sorted({w for caption in words for w in caption})
    if not used:
        raise RecordError("no caption has a word", where="align.captions", remedy="check the caption records")
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(len(embeddings), generator=generator)[:negatives]
    kept = torch.tensor(used)
    kept = torch.cat([kept, others[~torch.isin(others, kept)]]).to(embeddings.device)
    number = {int(w): i for i, w in enumerate(kept.tolist())}
    classes = F.normalize(embeddings[kept].float(), dim=-1)
    size = embeddings.float().pow(2).mean().sqrt()

    dtypes = {name: p.dtype for name, p in projector.named_parameters()}
    projector.float().train()
    device = next(projector.parameters()).device
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * -(-len(words) // batch)
    step, last = 0, math.nan
    for _ in range(epochs):
        total = 0.0
        order = torch.randperm(len(words), generator=generator)
        for chunk in order.split(batch):
            tokens = projector(features[chunk].to(device, torch.float32))
            logits = SHARPNESS * F.normalize(tokens.mean(1), dim=-1) @ classes.T
            pairs = [(i, number[w]) for i, p in enumerate(chunk.tolist()) for w in words[p]]
            rows, targets = torch.tensor(pairs, device=device).T
            away = tokens.pow(2).mean(-1).sqrt() / size - 1
            loss = F.cross_entropy(logits[rows], targets) + NORM_WEIGHT * away.pow(2).mean()
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
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
