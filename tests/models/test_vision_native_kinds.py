"""Attention of pictures of several sizes in one call: batches of like length, each picture by itself."""

from __future__ import annotations

import torch

from mmit.models.vision_native_kinds import _apart, batches


def test_naflex_pictures_of_like_length_share_a_call() -> None:
    lengths = (6, 100, 90, 6, 79, 5)
    found = batches(lengths)
    assert [tuple(tokens.shape) for tokens, _ in found] == [(2, 100), (1, 79), (3, 6)]
    seen = torch.cat([tokens[real] if real is not None else tokens.flatten() for tokens, real in found])
    assert sorted(seen.tolist()) == list(range(sum(lengths)))
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, sum(lengths), 4, generator=draw).requires_grad_() for _ in range(3))
    out, _ = _apart(torch.nn.Identity(), q, k, v, torch.tensor(lengths), scaling=0.5)
    parts = zip(*(x.split(list(lengths), 2) for x in (q, k, v)), strict=True)
    each = [torch.nn.functional.scaled_dot_product_attention(*part, scale=0.5) for part in parts]
    wanted = torch.cat(each, 2).transpose(1, 2)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
    factors = torch.randn(wanted.shape, generator=draw)
    for mine, theirs in zip(*(torch.autograd.grad((x * factors).sum(), (q, k, v)) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
