"""From image features to image tokens: the only part between the eye and the language model.

Owns the projector kinds and their options. Goes in: features (B, N, D_v) over a grid of h x w patches; comes
out: M image tokens (B, M, D_llm), with M stated before anything runs. Knows no encoder and no language model.

B images, h x w grid, N = tokens in, M = tokens out, D_v = vision width, D_llm = language model width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmit.errors import MmitError, ModelError, nearest
from mmit.plugins import FORM, is_spec, own_class, takes_any_keyword


class Projector(nn.Module):
    """Base of all projectors: an optional LayerNorm on the features, and the check that N and D_v are right.

    Attributes: tokens_in N, tokens M, vision_dim D_v, llm_dim D_llm, grid (h, w), grid_out (rows, columns) of the
    image tokens or None where they are no grid, line_end (D_llm,) that ends a line of tokens or None.
    """

    line_end: nn.Parameter | None

    def __init__(
        self, *, vision_dim: int, llm_dim: int, grid: tuple[int, int], prefix: int, tokens: int, norm: bool
    ) -> None:
        super().__init__()
        _whole(vision_dim=vision_dim, llm_dim=llm_dim, h=grid[0], w=grid[1])
        self.vision_dim, self.llm_dim, self.grid = vision_dim, llm_dim, grid
        self.tokens_in = prefix + grid[0] * grid[1]
        self.tokens = tokens
        self.norm = nn.LayerNorm(vision_dim) if norm else nn.Identity()
        self.register_parameter("line_end", None)

    @property
    def grid_out(self) -> tuple[int, int] | None:
        """The grid of the image tokens."""
        return None

    def add_line_end(self) -> None:
        """Learn a vector that ends each line of a picture made of tiles (LLaVA-1.6's `image_newline`)."""
        self.line_end = nn.Parameter(torch.randn(self.llm_dim) / self.llm_dim**0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D_v) -> (B, M, D_llm). Raises ModelError when N or D_v is not what it was built for."""
        if features.ndim != 3 or features.shape[1:] != (self.tokens_in, self.vision_dim):
            raise ModelError(
                f"features have shape {tuple(features.shape)}, the projector takes "
                f"(B, {self.tokens_in}, {self.vision_dim}) for a grid of {self.grid[0]} x {self.grid[1]}",
                where="projector",
                remedy="build it with the vision tower's own grid, prefix and dim",
            )
        return self.project(self.norm(features))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D_v) -> (B, M, D_llm); each kind brings its own."""
        raise NotImplementedError


class MLP(Projector):
    """`depth` linear layers with GELU between them, on each token alone; M = N.

    Depth 2 is LLaVA-1.5's `mlp2x_gelu` (arXiv:2310.03744) and depth 1 its linear projector: `layers.0` and
    `layers.2` here are `mm_projector.0` and `mm_projector.2` there.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        prefix: int = 0,
        depth: int = 2,
        norm: bool = False,
    ) -> None:
        super().__init__(
            vision_dim=vision_dim,
            llm_dim=llm_dim,
            grid=grid,
            prefix=prefix,
            tokens=prefix + grid[0] * grid[1],
            norm=norm,
        )
        self.layers = mlp(vision_dim, llm_dim, depth=depth)

    @property
    def grid_out(self) -> tuple[int, int] | None:
        """The grid itself; None with a class token before it."""
        return self.grid if self.tokens == self.grid[0] * self.grid[1] else None

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D_v) -> (B, N, D_llm)."""
        return self.layers(features)


class Linear(MLP):
    """One linear layer on each token; M = N (LLaVA, arXiv:2304.08485)."""

    def __init__(
        self, *, vision_dim: int, llm_dim: int, grid: tuple[int, int], prefix: int = 0, norm: bool = False
    ) -> None:
        super().__init__(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, prefix=prefix, depth=1, norm=norm)


class FusedMLP(MLP):
    """Three linear layers with GELU between them, the first `widen` times as wide as the features; M = N.

    The projector of prismatic-vlms (arXiv:2402.07865) over fused towers: `layers.0`, `.2` and `.4` are `projector.0`,
    `.2` and `.4` there.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        prefix: int = 0,
        widen: int = 4,
        norm: bool = False,
    ) -> None:
        _whole(widen=widen)
        super().__init__(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, prefix=prefix, depth=1, norm=norm)
        wide = widen * vision_dim
        tail = mlp(wide, llm_dim, depth=2)
        self.layers = nn.Sequential(nn.Linear(vision_dim, wide), nn.GELU(), *tail)


class PixelShuffleMLP(Projector):
    """Each factor x factor block of patches becomes one token of factor^2 D_v channels, then an MLP; nothing
    is averaged away (as InternVL, arXiv:2404.16821). M = N / factor^2.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        factor: int = 2,
        depth: int = 2,
        norm: bool = False,
    ) -> None:
        _whole(factor=factor)
        _divides(
            factor,
            factor,
            grid=grid,
            what=f"pixel_shuffle_mlp with factor {factor}",
            remedy=f"valid factors: {_common_divisors(grid)}",
        )
        super().__init__(
            vision_dim=vision_dim,
            llm_dim=llm_dim,
            grid=grid,
            prefix=0,
            tokens=grid[0] * grid[1] // factor**2,
            norm=norm,
        )
        self.factor = factor
        self.layers = mlp(vision_dim * factor**2, llm_dim, depth=depth)

    @property
    def grid_out(self) -> tuple[int, int] | None:
        """The blocks."""
        return self.grid[0] // self.factor, self.grid[1] // self.factor

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D_v) -> (B, N / factor^2, D_llm)."""
        return self.layers(space_to_depth(features, self.grid, self.factor))


class AvgPoolMLP(Projector):
    """The grid is averaged down to `side` x `side` (or `tokens` of them, a square number), then an MLP."""

    def __init__(
        self,
        *,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        side: int | tuple[int, int] | None = None,
        tokens: int | None = None,
        depth: int = 2,
        norm: bool = False,
    ) -> None:
        self.out = _pooled(grid, side, tokens)
        super().__init__(
            vision_dim=vision_dim,
            llm_dim=llm_dim,
            grid=grid,
            prefix=0,
            tokens=self.out[0] * self.out[1],
            norm=norm,
        )
        self.layers = mlp(vision_dim, llm_dim, depth=depth)

    @property
    def grid_out(self) -> tuple[int, int] | None:
        """The averages."""
        return self.out

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D_v) -> (B, M, D_llm)."""
        (height, width), (rows, columns) = self.grid, self.out
        # Every output averages the same number of patches, so a reshape and a mean do it, and the backward
        # pass is deterministic, which that of adaptive pooling is not on CUDA.
        windows = features.unflatten(1, (rows, height // rows, columns, width // columns))
        return self.layers(windows.mean(dim=(2, 4)).flatten(1, 2))


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
        _whole(queries=queries, depth=depth, heads=heads)
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
        normed = self.norm_latents(latents)
        keys, values = self.kv(torch.cat([self.norm_features(features), normed], dim=1)).chunk(2, dim=-1)
        q_bhmd, k_bhsd, v_bhsd = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q(normed), keys, values)
        )
        read = F.scaled_dot_product_attention(q_bhmd, k_bhsd, v_bhsd).transpose(1, 2).flatten(2)
        latents = latents + self.proj(read)
        return latents + self.feed_forward(latents)


SIZES = ("vision_dim", "llm_dim", "grid")  # what every projector is made with
PROJECTORS: dict[str, type[Projector]] = {
    "linear": Linear,
    "mlp": MLP,
    "fused_mlp": FusedMLP,
    "pixel_shuffle_mlp": PixelShuffleMLP,
    "avg_pool_mlp": AvgPoolMLP,
    "resampler": Resampler,
}


def build_projector(
    kind: str,
    *,
    vision_dim: int,
    llm_dim: int,
    grid: tuple[int, int],
    prefix: int = 0,
    line_end: bool = False,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Projector:
    """Build a projector in float32.

    Args:
        kind: a key of PROJECTORS, or `module:Name` of a Projector of the user's own.
        vision_dim: D_v, the vision tower's `dim`.
        llm_dim: D_llm, the width of the language model's embeddings.
        grid: (h, w), the vision tower's `grid`.
        prefix: tokens in front of the grid (the tower's `prefix`); the kinds that reshape the grid take none.
        line_end: learn a vector that ends a line of tokens, for pictures made of tiles.
        generator: source of the initial weights; the global random state is then left as it was. Without it,
            they follow `torch.manual_seed`.
        options: of the kind; `norm: true` puts a LayerNorm in front of any of them.

    Raises:
        ModelError: unknown kind or option (with the nearest valid one), or a grid the kind cannot divide; a class of
            the user's own whose tokens are not those it states. ConfigError: it cannot be imported, or is no Projector.
    """
    if is_spec(kind):
        made: Any = own_class(kind, Projector, keywords=SIZES, methods=("project", "forward"), where="kind")
    elif kind in PROJECTORS:
        made = PROJECTORS[kind]
    else:
        raise ModelError(f"unknown projector '{kind}'", remedy=f"{nearest(kind, PROJECTORS)}, or {FORM} of your own")
    valid = set(inspect.signature(made).parameters) - set(SIZES)
    for name in options:
        if name not in valid - {"prefix"} and not takes_any_keyword(made):
            raise ModelError(
                f"unknown option '{name}'",
                where=f"projector {kind}",
                remedy=nearest(name, valid - {"prefix"}),
            )
    if "prefix" in valid:
        options["prefix"] = prefix
    elif prefix:
        raise ModelError(
            "a CLS token has no place in the grid that this projector reshapes",
            where=f"projector {kind}",
            remedy="read the tower with select: patch",
        )

    def build() -> Projector:
        if is_spec(kind):
            projector = _own(kind, made, vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, **options)
        else:
            projector = made(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, **options)
        if line_end:
            projector.add_line_end()
        return projector

    if generator is None:
        return build()
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _own(kind: str, made: Any, *, vision_dim: int, llm_dim: int, **given: Any) -> Projector:
    """Make a projector of the user's own, and see that zeros (1, N, D_v) become (1, M, D_llm) with M as it states."""
    where = f"projector {kind}"
    try:
        projector: Projector = made(vision_dim=vision_dim, llm_dim=llm_dim, **given)
        stated = (getattr(projector, "tokens", None), getattr(projector, "tokens_in", None))
        if not all(isinstance(count, int) and count > 0 for count in stated):
            raise ModelError(
                "does not state how many tokens it takes and gives",
                where=where,
                remedy="call super().__init__(vision_dim=, llm_dim=, grid=, prefix=, tokens=, norm=) in its __init__",
            )
        if not any(True for _ in projector.parameters()):
            raise ModelError("has no parameters", where=where, remedy="end it with a layer that gives llm_dim channels")
        training, device = projector.training, next(projector.parameters()).device
        with torch.no_grad():
            out = projector.eval()(torch.zeros(1, projector.tokens_in, vision_dim, device=device))
        projector.train(training)
    except MmitError:
        raise
    except Exception as error:
        problem = f"raised {type(error).__name__}: {error}"
        remedy = f"it is made with {', '.join(SIZES)} and its options, and called with (B, N, {vision_dim})"
        raise ModelError(problem, where=where, remedy=remedy) from error
    shape = tuple(getattr(out, "shape", ()))
    if shape != (1, projector.tokens, llm_dim):
        raise ModelError(
            f"gives {shape or type(out).__name__} for one picture, and states {projector.tokens} tokens",
            where=where,
            remedy=f"return (B, {projector.tokens}, {llm_dim}), or pass the right tokens to super().__init__",
        )
    return projector


def mlp(dim_in: int, dim_out: int, *, depth: int) -> nn.Sequential:
    """Return Linear, then (GELU, Linear) depth - 1 times; every hidden layer has the output's width."""
    _whole(depth=depth)
    layers: list[nn.Module] = [nn.Linear(dim_in, dim_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(dim_out, dim_out)]
    return nn.Sequential(*layers)


def space_to_depth(features: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """(B, h*w, D) -> (B, (h/f)*(w/f), f*f*D): a block's patches row by row, each with its channels."""
    height, width = grid
    blocks = features.unflatten(1, (height // factor, factor, width // factor, factor))
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def _pooled(grid: tuple[int, int], side: int | tuple[int, int] | None, tokens: int | None) -> tuple[int, int]:
    """Return the rows and columns that are left after pooling."""
    where = "projector avg_pool_mlp"
    if (side is None) == (tokens is None):
        raise ModelError(
            "give either side or tokens",
            where=where,
            remedy=f"side: one of {_common_divisors(grid)}, or tokens: its square",
        )
    if tokens is not None:
        _whole(tokens=tokens)
        root = round(tokens**0.5)
        if root**2 != tokens:
            raise ModelError(
                f"{tokens} tokens are not a square",
                where=where,
                remedy=f"nearest: {root**2}; or give side: [rows, columns]",
            )
        side = root
    sides = (side, side) if isinstance(side, int) else tuple(side or ())
    if len(sides) != 2:
        raise ModelError(f"side is {side!r}", where=where, remedy="give one number, or [rows, columns]")
    rows, columns = sides
    _whole(rows=rows, columns=columns)
    if grid[0] % rows or grid[1] % columns:
        raise ModelError(
            f"{rows} x {columns} does not divide the grid of {grid[0]} x {grid[1]}",
            where=where,
            remedy=f"valid rows: {_divisors(grid[0])}; valid columns: {_divisors(grid[1])}",
        )
    return rows, columns


def _whole(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{name} is {value!r}", where="projector", remedy="it must be a whole number from 1 up")


def _divides(rows: int, columns: int, *, grid: tuple[int, int], what: str, remedy: str) -> None:
    if grid[0] % rows or grid[1] % columns:
        raise ModelError(
            f"{what} does not divide the grid of {grid[0]} x {grid[1]} patches",
            where="projector",
            remedy=remedy,
        )


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _common_divisors(grid: tuple[int, int]) -> list[int]:
    return [value for value in _divisors(grid[0]) if grid[1] % value == 0]
