"""From image features to image tokens: the only part between vision encoder and language model.

Owns the projector kinds and their options. Goes in: features (B, N, D_v) over a grid of h x w patches; comes
out: M image tokens (B, M, D_llm), with M stated before anything runs. Knows no encoder and no language model.

B images, h x w grid, N = tokens in, M = tokens out, D_v = vision width, D_llm = language model width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.projector_base import Projector, check_counts, common_divisors, divides, divisors, mlp, space_to_depth
from mmit.models.resampler import Resampler
from mmit.plugins import FORM, calling, is_spec, own_class, takes_any_keyword


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
        check_counts(widen=widen)
        super().__init__(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, prefix=prefix, depth=1, norm=norm)
        self.widen, wide = widen, widen * vision_dim
        # Replaces the layer that MLP made, whose first width is the features' own.
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
        check_counts(factor=factor)
        divides(
            factor,
            factor,
            grid=grid,
            what=f"pixel_shuffle_mlp with factor {factor}",
            remedy=f"valid factors: {common_divisors(grid)}",
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


class DeepStackMLP(Projector):
    """An MLP for each of several encoder layers whose features are joined; the last gives the image tokens, the others
    the levels that are added after the first layers of the language model (DeepStack, arXiv:2406.04334, in the order
    of Qwen3-VL, arXiv:2511.21631). M = N.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        llm_dim: int,
        grid: tuple[int, int],
        prefix: int = 0,
        levels: int,
        depth: int = 2,
        norm: bool = False,
    ) -> None:
        check_counts(levels=levels)
        if levels < 2 or vision_dim % levels:
            raise ModelError(
                f"the features are {vision_dim} wide, and levels is {levels}",
                where="projector deepstack_mlp",
                remedy="list two or more layers in model.vision.layer, and set levels to their number",
            )
        tokens = prefix + grid[0] * grid[1]
        super().__init__(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, prefix=prefix, tokens=tokens, norm=norm)
        # The base reads it: who splices tokens expects the levels behind the image tokens, in the same tensor.
        self.deep = levels - 1
        self.levels = nn.ModuleList(mlp(vision_dim // levels, llm_dim, depth=depth) for _ in range(levels))

    @property
    def grid_out(self) -> tuple[int, int] | None:
        """The grid itself; None with a class token before it."""
        return self.grid if self.tokens == self.grid[0] * self.grid[1] else None

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D_v) -> (B, N, levels * D_llm): image tokens, then what is added after layer 1, 2, ..."""
        *inner, last = features.chunk(len(self.levels), dim=-1)
        # The projector of the last layer comes first: it makes the image tokens themselves.
        first, *others = self.levels
        parts = [first(last), *(layer(part) for layer, part in zip(others, inner, strict=True))]
        return torch.cat(parts, dim=-1)


SIZES = ("vision_dim", "llm_dim", "grid")  # what every projector is made with
PROJECTORS: dict[str, type[Projector]] = {
    "linear": Linear,
    "mlp": MLP,
    "fused_mlp": FusedMLP,
    "pixel_shuffle_mlp": PixelShuffleMLP,
    "avg_pool_mlp": AvgPoolMLP,
    "resampler": Resampler,
    "deepstack_mlp": DeepStackMLP,
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
    made = _class_of(kind)
    given = _checked(kind, made, options, prefix)

    def build() -> Projector:
        if is_spec(kind):
            projector = _own(kind, made, vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, **given)
        else:
            projector = made(vision_dim=vision_dim, llm_dim=llm_dim, grid=grid, **given)
        if line_end:
            projector.add_line_end()
        return projector

    if generator is None:
        return build()
    # torch's initialisers draw from the global state only, so that is set from the generator and put back.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _class_of(kind: str) -> Any:
    """The class of a kind, the user's own included. Raises ModelError for an unknown one."""
    if is_spec(kind):
        return own_class(kind, Projector, keywords=SIZES, methods=("project", "forward"), where="kind")
    if kind not in PROJECTORS:
        raise ModelError(f"unknown projector '{kind}'", remedy=f"{nearest(kind, PROJECTORS)}, or {FORM} of your own")
    return PROJECTORS[kind]


def _checked(kind: str, made: Any, options: dict[str, Any], prefix: int) -> dict[str, Any]:
    """The options of a class, with `prefix` where it has a place for one.

    What a class takes stands in its signature and nowhere else, so that a new projector needs no second list.
    """
    # Contract: `prefix` among the arguments says that a kind keeps a class token. A kind that reshapes the grid leaves
    # it out, and a tower with such a token is then refused.
    valid = set(inspect.signature(made).parameters) - set(SIZES)
    for name in options:
        if name not in valid - {"prefix"} and not takes_any_keyword(made):
            raise ModelError(
                f"unknown option '{name}'",
                where=f"projector {kind}",
                remedy=nearest(name, valid - {"prefix"}),
            )
    if "prefix" in valid:
        return {**options, "prefix": prefix}
    if prefix:
        raise ModelError(
            "a CLS token has no place in the grid that this projector reshapes",
            where=f"projector {kind}",
            remedy="read the tower with select: patch",
        )
    return options


def _own(kind: str, made: Any, *, vision_dim: int, llm_dim: int, **given: Any) -> Projector:
    """Make a projector of the user's own, and see that zeros (1, N, D_v) become (1, M, D_llm) with M as it states."""
    where = f"projector {kind}"
    remedy = f"it is made with {', '.join(SIZES)} and its options, and called with (B, N, {vision_dim})"
    with calling("", where=where, remedy=remedy, kind=ModelError):
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
        # Tried once before hours of training: a count of tokens that is stated wrong would shift every later token of
        # every row.
        training, device = projector.training, next(projector.parameters()).device
        with torch.no_grad():
            out = projector.eval()(torch.zeros(1, projector.tokens_in, vision_dim, device=device))
        projector.train(training)
    # All levels lie side by side in the last dimension, so a projector with levels gives that many times the width.
    shape = tuple(getattr(out, "shape", ()))
    if shape != (1, projector.tokens, (1 + projector.deep) * llm_dim):
        raise ModelError(
            f"gives {shape or type(out).__name__} for one picture, and states {projector.tokens} tokens",
            where=where,
            remedy=f"return (B, {projector.tokens}, {llm_dim}), or pass the right tokens to super().__init__",
        )
    return projector


def _pooled(grid: tuple[int, int], side: int | tuple[int, int] | None, tokens: int | None) -> tuple[int, int]:
    """Return the rows and columns that are left after pooling."""
    where = "projector avg_pool_mlp"
    if (side is None) == (tokens is None):
        raise ModelError(
            "give either side or tokens",
            where=where,
            remedy=f"side: one of {common_divisors(grid)}, or tokens: its square",
        )
    if tokens is not None:
        check_counts(tokens=tokens)
        # Only squares: which of several shapes with as many tokens is meant cannot be told.
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
    check_counts(rows=rows, columns=columns)
    if grid[0] % rows or grid[1] % columns:
        raise ModelError(
            f"{rows} x {columns} does not divide the grid of {grid[0]} x {grid[1]}",
            where=where,
            remedy=f"valid rows: {divisors(grid[0])}; valid columns: {divisors(grid[1])}",
        )
    return rows, columns
