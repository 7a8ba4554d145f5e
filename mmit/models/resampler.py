"""The Perceiver resampler: learned queries read the image features by cross-attention.

B images, N = tokens in, M = queries, D_v = vision width, D_llm = language model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmit.errors import ModelError
from mmit.models.projector_base import Projector, check_counts


class Resampler(Projector):
    """A fixed number of learned queries that read the features by cross-attention (Perceiver resampler of
    Flamingo, arXiv:2204.14198). M = queries.

    As in Flamingo keys and values are the features and the queries together. Unlike there, each place of the
    grid has a learned embedding, because attention alone cannot tell where a convolutional feature lies.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        prefix: int = 0,
        queries: int = 64,
        depth: int = 2,
        heads: int = 8,
        norm: bool = False,
    ) -> None:
        check_counts(queries=queries, depth=depth, heads=heads)
        if vision_dim % heads:
            raise ModelError(
                f"{heads} heads do not divide the vision width {vision_dim}",
                where="resampler",
                remedy=f"valid heads: {[h for h in range(1, 33) if vision_dim % h == 0]}",
            )
        super().__init__(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, prefix=prefix, tokens=queries, norm=norm)
        self.queries = nn.Parameter(torch.randn(queries, vision_dim) * 0.02)
        self.places = nn.Parameter(torch.randn(self.tokens_in, vision_dim) * 0.02)
        self.blocks = nn.ModuleList(ResamplerBlock(vision_dim, heads=heads) for _ in range(depth))
        self.final_norm = nn.LayerNorm(vision_dim)
        self.out = nn.Linear(vision_dim, llm_dim)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D_v) -> (B, queries, D_llm)."""
        features = features + self.places
        # A view: the same start for each picture, and one gradient that adds up over all of them.
        latents = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            latents = block(latents, features)
        return self.out(self.final_norm(latents))


class ResamplerBlock(nn.Module):
    """Cross-attention of latents to features and latents, then a feed-forward layer; both pre-norm."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * dim, dim, bias=False),
        )

    def forward(self, latents: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(B, M, D_v), (B, N, D_v) -> (B, M, D_v)."""
        # Latents are among the keys as in Flamingo: a query can take over what others have gathered.
        normed = self.norm_latents(latents)
        keys, values = self.kv(torch.cat([self.norm_features(features), normed], dim=1)).chunk(2, dim=-1)
        q_bhmd, k_bhsd, v_bhsd = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q(normed), keys, values)
        )
        read = F.scaled_dot_product_attention(q_bhmd, k_bhsd, v_bhsd).transpose(1, 2).flatten(2)
        latents = latents + self.proj(read)
        return latents + self.feed_forward(latents)
