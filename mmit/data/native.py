"""Pictures at their own size: what a vision encoder of native resolution makes of a width and a height.

Owns the published rules by which such encoders bring a picture to whole patches: Qwen-VL's, SigLIP 2 NaFlex's,
MoonViT's and Pixtral's. In: (W, H) in pixels and the rule's options. Out: a `NativeLayout`: the size the picture is
scaled to and its grid of units. A header is enough. Knows no model; never cuts content away.

A unit is a block of `merge` x `merge` patches, the least that the encoder or the projector keeps together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mmit.data.images import MAX_ASPECT
from mmit.errors import ConfigError, ImageError, nearest

Size = tuple[int, int]  # (W, H)


@dataclass(frozen=True, slots=True)
class NativeLayout:
    """How one picture is laid out.

    Attributes:
        scaled: (H, W) in pixels the picture is scaled to.
        grid: (rows, columns) of units; where they are larger than `scaled`, the rest below and right is black.
    """

    scaled: tuple[int, int]
    grid: tuple[int, int]

    @property
    def units(self) -> int:
        """Units of the picture."""
        return self.grid[0] * self.grid[1]


def qwen(size: Size, *, unit: int, patch: int, min_pixels: int, max_pixels: int) -> NativeLayout:
    """Qwen2-VL's `smart_resize` (arXiv:2409.12191): the nearest multiples of a unit, within a range of areas.

    Args:
        size: (W, H) in pixels.
        unit: pixels of a unit's side, a whole number of patches. patch: pixels of a patch's side.
        min_pixels, max_pixels: of the scaled picture.
    """
    width, height = size
    # Python's round, to even at halves, as transformers has it.
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit * unit > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        # Down, so that the area stays below the limit; and up below, so that it stays above the least.
        rows = max(1, math.floor(height / shrink / unit))
        columns = max(1, math.floor(width / shrink / unit))
    elif rows * columns * unit * unit < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / unit), math.ceil(width * grow / unit)
    return NativeLayout((rows * unit, columns * unit), (rows, columns))


def naflex(size: Size, *, unit: int, patch: int, max_pixels: int) -> NativeLayout:
    """SigLIP 2 NaFlex (arXiv:2502.14786): the largest scale, found by bisection, whose units fit into the area.

    Args:
        size: (W, H) in pixels.
        unit: pixels of a unit's side, a whole number of patches. patch: pixels of a patch's side.
        max_pixels: of the scaled picture.
    """
    width, height = size
    most = max_pixels // unit**2

    def units(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / unit)), max(1, math.ceil(width * scale / unit))

    # The bounds and the tolerance of the published code: another search would end at another grid for some sizes.
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = units(middle)
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    rows, columns = units(low)
    return NativeLayout((rows * unit, columns * unit), (rows, columns))


def moonvit(size: Size, *, unit: int, patch: int, max_pixels: int, max_side: int = 512) -> NativeLayout:
    """MoonViT (arXiv:2504.07491): never enlarged; black is added up to whole units.

    Args:
        size: (W, H) in pixels.
        unit: pixels of a unit's side, a whole number of patches. patch: pixels of a patch's side.
        max_pixels: of the scaled picture. max_side: patches of a side at most.
    """
    width, height = size
    # Whole patches are counted before the scale and pixels are cut after it, as the published code does.
    count = max(1.0, height // patch) * max(1.0, width // patch)
    limit = max_side * patch
    # Three limits and the smallest scale of them: the area, and each side by itself.
    scale = min(1.0, math.sqrt(max_pixels // patch**2 / count), limit / height, limit / width)
    scaled = tuple(min(max(1, int(side * scale)), limit) for side in (height, width))
    return NativeLayout((scaled[0], scaled[1]), (-(-scaled[0] // unit), -(-scaled[1] // unit)))


def pixtral(size: Size, *, unit: int, patch: int, max_edge: int) -> NativeLayout:
    """Pixtral (arXiv:2410.07073): never enlarged but to whole units.

    Args:
        size: (W, H) in pixels.
        unit: pixels of a unit's side, a whole number of patches. patch: pixels of a patch's side.
        max_edge: pixels of the longer side at most.
    """
    width, height = size
    ratio = max(width, height) / max_edge
    # Down to whole pixels before whole units are counted: the other order would give another grid for some sizes.
    if ratio > 1:
        width, height = max(1, math.floor(width / ratio)), max(1, math.floor(height / ratio))
    rows, columns = -(-height // unit), -(-width // unit)
    return NativeLayout((rows * unit, columns * unit), (rows, columns))


RULES: dict[str, Callable[..., NativeLayout]] = {"qwen": qwen, "naflex": naflex, "moonvit": moonvit, "pixtral": pixtral}
# What a rule takes besides a size.
LIMITS = {
    "qwen": ("min_pixels", "max_pixels"),
    "naflex": ("max_pixels",),
    "moonvit": ("max_pixels", "max_side"),
    "pixtral": ("max_edge",),
}


def check_native(options: Mapping[str, Any]) -> None:
    """Check {"rule", "patch", "merge", limits}, before any picture is read. Raises ConfigError."""
    where = "model.vision.native"
    rule = str(options.get("rule"))
    if rule not in RULES:
        raise ConfigError(f"unknown rule '{rule}'", where=where, remedy=nearest(rule, RULES))
    valid = ("rule", "patch", "merge", *LIMITS[rule])
    for name, value in options.items():
        if name not in valid:
            raise ConfigError(f"unknown option '{name}'", where=where, remedy=nearest(name, valid[2:]))
        if name != "rule" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} is {value!r}", where=where, remedy="Give a whole number, 1 or more.")
    unit = options["patch"] * options["merge"]
    if rule == "pixtral":
        if options["max_edge"] < unit:
            problem, remedy = f"max_edge is {options['max_edge']}", f"Allow at least one unit, {unit} pixels."
            raise ConfigError(problem, where=where, remedy=remedy)
        return
    least, most = options.get("min_pixels", 0), options["max_pixels"]
    if most < unit**2 or least > most:
        problem = f"max_pixels is {most}" + (f" and min_pixels {least}" if least else "")
        raise ConfigError(problem, where=where, remedy=f"Allow at least one unit, {unit**2} pixels, and min <= max.")


def layout(size: Size, options: Mapping[str, Any], *, where: str = "") -> NativeLayout:
    """Lay out a picture of (W, H) pixels. Raises ImageError for one that is absurdly long."""
    if min(size) < 1 or max(size) > MAX_ASPECT * min(size):
        problem = f"is {size[0]} x {size[1]} pixels, longer than {MAX_ASPECT} times its short side"
        raise ImageError(problem, where=where, remedy="Cut the picture into parts.")
    return _layout(size, tuple(sorted(options.items())))


@lru_cache(maxsize=65536)
def _layout(size: Size, options: tuple[tuple[str, Any], ...]) -> NativeLayout:
    given = dict(options)
    patch = given["patch"]
    limits = {name: given[name] for name in LIMITS[given["rule"]] if name in given}
    return RULES[given["rule"]](size, unit=patch * given["merge"], patch=patch, **limits)
