"""What every projector is: image features (B, N, D_v) over a grid of patches become M image tokens (B, M, D_llm).

Owns the base class with its check of shapes, the layers that kinds share, and the refusals of numbers that cannot
work. Knows no kind.

B images, h x w grid, N = tokens in, M = tokens out, D_v = vision width, D_llm = language model width.
"""

from __future__ import annotations

import torch
from torch import nn

from mmit.errors import ModelError


class Projector(nn.Module):
    """Base of all projectors: an optional LayerNorm on the features, and the check that N and D_v are right.

    Attributes: tokens_in N, tokens M, vision_dim D_v, llm_dim D_llm, grid (h, w), grid_out (rows, columns) of the
    image tokens or None where they are no grid, line_end (D_llm,) that ends a line of tokens or None, deep: further
    levels of D_llm channels that are added inside the language model, see `deepstack`.
    """

    line_end: nn.Parameter | None
    deep = 0

    def __init__(
        self, *, vision_dim: int, llm_dim: int, grid: tuple[int, int], prefix: int, tokens: int, norm: bool
    ) -> None:
        super().__init__()
        check_counts(vision_dim=vision_dim, llm_dim=llm_dim, h=grid[0], w=grid[1])
        self.vision_dim, self.llm_dim, self.grid = vision_dim, llm_dim, grid
        self.tokens_in = prefix + grid[0] * grid[1]
        self.tokens = tokens
        self.norm = nn.LayerNorm(vision_dim) if norm else nn.Identity()
        # Registered though there is none: a state dict then has no key for it, and `add_line_end` needs no other class.
        self.register_parameter("line_end", None)

    @property
    def grid_out(self) -> tuple[int, int] | None:
        """The grid of the image tokens."""
        return None

    def add_line_end(self) -> None:
        """Learn a vector that ends each line of a picture made of tiles (LLaVA-1.6's `image_newline`)."""
        # As transformers draws its `image_newline`, of length one; with a part for each level that is added later.
        self.line_end = nn.Parameter(torch.randn((1 + self.deep) * self.llm_dim) / self.llm_dim**0.5)

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


def mlp(dim_in: int, dim_out: int, *, depth: int) -> nn.Sequential:
    """Return Linear, then (GELU, Linear) depth - 1 times; every hidden layer has the output's width."""
    check_counts(depth=depth)
    layers: list[nn.Module] = [nn.Linear(dim_in, dim_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(dim_out, dim_out)]
    return nn.Sequential(*layers)


def space_to_depth(features: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """(B, h*w, D) -> (B, (h/f)*(w/f), f*f*D): a block's patches row by row, each with its channels."""
    height, width = grid
    # Known limit: other implementations order the channels of a block otherwise. Weights of theirs fit only after their
    # columns are moved.
    blocks = features.unflatten(1, (height // factor, factor, width // factor, factor))
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def check_counts(**values: int) -> None:
    """Refuse numbers that are not whole and from 1 up."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{name} is {value!r}", where="projector", remedy="it must be a whole number from 1 up")


def divides(rows: int, columns: int, *, grid: tuple[int, int], what: str, remedy: str) -> None:
    """Refuse a grid that these do not divide.

    Args:
        rows, columns: what must divide the sides of the grid.
        grid: (h, w) patches.
        what: the option as the user wrote it. remedy: values that work.

    Raises:
        ModelError: with the grid.
    """
    if grid[0] % rows or grid[1] % columns:
        raise ModelError(
            f"{what} does not divide the grid of {grid[0]} x {grid[1]} patches",
            where="projector",
            remedy=remedy,
        )


def divisors(number: int) -> list[int]:
    """Return the whole numbers that divide this one."""
    return [value for value in range(1, number + 1) if number % value == 0]


def common_divisors(grid: tuple[int, int]) -> list[int]:
    """Return the whole numbers that divide both sides."""
    return [value for value in divisors(grid[0]) if grid[1] % value == 0]
