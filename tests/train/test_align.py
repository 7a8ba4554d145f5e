"""Word alignment learns, leaves the rest alone, and is a function of its seed."""

from __future__ import annotations

import pytest
import torch

from mmit.errors import RecordError
from mmit.models.projectors import build_projector
from mmit.train import align
from mmit.train.align import Alignment, align_words


def setting(dtype=torch.float32):
    torch.manual_seed(0)
    embeddings = torch.randn(40, 16) * 0.1
    kinds = torch.arange(60) % 3
    features = torch.nn.functional.one_hot(kinds, 8).float()[:, None].repeat(1, 4, 1) + 0.1 * torch.randn(60, 4, 8)
    words = [[5 + int(k), 20 + int(k)] for k in kinds]
    projector = build_projector("mlp", vision_dim=8, llm_dim=16, grid=(2, 2)).to(dtype)
    return projector, features, words, embeddings


def test_the_words_of_a_picture_become_its_nearest_embeddings(monkeypatch):
    monkeypatch.setattr(align, "BATCH", 16)
    projector, features, words, embeddings = setting()
    before = embeddings.clone()
    align_words(projector, features, words, embeddings, Alignment("", epochs=40, lr=1e-2))
    pooled = torch.nn.functional.normalize(projector(features).mean(1), dim=-1)
    nearest = (pooled @ torch.nn.functional.normalize(embeddings, dim=-1).T).topk(2).indices
    assert [sorted(n) for n in nearest.tolist()] == [sorted(w) for w in words]
    size = projector(features).pow(2).mean().sqrt() / embeddings.pow(2).mean().sqrt()
    assert 0.5 < size < 2
    assert torch.equal(embeddings, before)


def test_no_gradient_is_left_for_the_first_step_of_the_run():
    projector, features, words, embeddings = setting()
    align_words(projector, features, words, embeddings, Alignment("", epochs=1, lr=1e-2))
    assert all(p.grad is None for p in projector.parameters())


def test_same_seed_same_projector_and_number_formats_are_kept():
    results = []
    for _ in range(2):
        projector, features, words, embeddings = setting(torch.bfloat16)
        align_words(projector, features, words, embeddings, Alignment("", epochs=2, lr=1e-2, seed=3))
        assert all(p.dtype == torch.bfloat16 for p in projector.parameters())
        results.append([p.detach().clone() for p in projector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_captions_without_words_are_refused():
    projector, features, _, embeddings = setting()
    with pytest.raises(RecordError, match="no caption has a word"):
        align_words(projector, features, [[]] * 60, embeddings, Alignment("", epochs=1, lr=1e-2))
