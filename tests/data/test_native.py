"""Pictures at their own size: the layout that a header gives is the one of each model's own image processor."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.image_utils import ChannelDimension
from transformers.models.kimi_k25.image_processing_kimi_k25 import navit_resize
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from mmit.data.native import layout
from mmit.data.preparation import ImagePreparation, grids_of
from mmit.errors import ConfigError, ImageError
from mmit.records import Image

QWEN = {"rule": "qwen", "patch": 14, "merge": 2, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
QWEN3 = {"rule": "qwen", "patch": 16, "merge": 2, "min_pixels": 256 * 256, "max_pixels": 1024 * 1024}
NAFLEX = {"rule": "naflex", "patch": 16, "merge": 1, "max_pixels": 256 * 256}
MOONVIT = {"rule": "moonvit", "patch": 14, "merge": 2, "max_pixels": 4096 * 196, "max_side": 128}
PIXTRAL = {"rule": "pixtral", "patch": 14, "merge": 2, "max_edge": 1540}


def published(size: tuple[int, int], options: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of units, by the arithmetic of transformers' image processor."""
    (width, height), unit = size, options["patch"] * options["merge"]
    if options["rule"] == "qwen":
        limits = {"min_pixels": options["min_pixels"], "max_pixels": options["max_pixels"]}
        rows, columns = smart_resize(height, width, factor=unit, **limits)
    elif options["rule"] == "naflex":
        most = options["max_pixels"] // unit**2
        rows, columns = get_image_size_for_max_num_patches(height, width, unit, most)
    elif options["rule"] == "pixtral":
        picture = torch.empty(3, height, width, device="meta")
        rows, columns = get_resize_output_image_size(picture, options["max_edge"], unit, ChannelDimension.FIRST)
    else:
        most = options["max_pixels"] // options["patch"] ** 2
        _, (rows, columns) = navit_resize(height, width, options["patch"], options["merge"], most, options["max_side"])
    return rows // unit, columns // unit


def sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Small, large and narrow pictures, none longer than 200 times its short side."""
    draw = random.Random(seed)
    found = []
    while len(found) < count:
        size = (int(2 ** draw.uniform(1, 13)), int(2 ** draw.uniform(1, 13)))
        if max(size) <= 200 * min(size):
            found.append(size)
    return found


@pytest.mark.parametrize(
    "options", [QWEN, QWEN3, NAFLEX, MOONVIT, PIXTRAL], ids=["qwen2.5", "qwen3", "naflex", "moonvit", "pixtral"]
)
def test_ten_thousand_sizes_are_laid_out_as_the_processor_does(options: dict[str, Any]) -> None:
    for size in sizes(10_000):
        assert layout(size, options).grid == published(size, options), size


def noise(width: int, height: int) -> PIL.Image.Image:
    draw = np.random.default_rng(width * 7 + height)
    return PIL.Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("options", [QWEN, NAFLEX, MOONVIT, PIXTRAL], ids=["qwen", "naflex", "moonvit", "pixtral"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_spread_counts_what_the_pixels_hold(options: dict[str, Any], tokens: int) -> None:
    unit = options["patch"] * options["merge"]
    grid = (2, 2) if tokens == 4 else None
    common: dict[str, Any] = {"mode": "native", "interpolation": "bicubic", "fill": (0, 0, 0), "native": options}
    preparation = ImagePreparation((unit, unit), tokens=tokens, grid=grid, **common)
    for size in [*sizes(8, seed=3), (300, 2000)]:
        if max(size) > 3000 or min(size) < 2:
            continue
        picture = Image(noise(*size))
        spread, pixels = preparation.spread(picture), preparation.pixels(picture)
        rows, columns = layout(size, options).grid
        assert pixels.shape == (spread.crops, 3, unit, unit) and pixels.dtype == torch.uint8
        assert spread.grid == (rows, columns) and spread.crops == rows * columns
        assert sorted(spread.index.tolist()) == list(range(spread.crops * tokens))
        if tokens == 4:  # read row by row of the picture, although they come unit by unit
            places = torch.arange(rows * 2 * columns * 2).view(rows, 2, columns, 2).transpose(1, 2).flatten()
            assert (spread.index[places] == torch.arange(len(places))).all()


def test_units_are_the_picture_cut_and_a_rest_is_black() -> None:
    options = MOONVIT | {"patch": 4, "merge": 2}
    common: dict[str, Any] = {"mode": "native", "interpolation": "bicubic", "fill": (0, 0, 0), "native": options}
    preparation = ImagePreparation((8, 8), tokens=1, **common)
    picture = noise(20, 11)
    units = preparation.pixels(Image(picture)).view(2, 3, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 16, 24)
    assert (units[:, :11, :20] == torch.from_numpy(np.array(picture)).permute(2, 0, 1)).all()
    assert not units[:, 11:].any() and not units[:, :, 20:].any()


def test_grids_of_pictures_of_one_size_are_none() -> None:
    plain = ImagePreparation((8, 8), "resize", "bicubic", (0, 0, 0), tokens=4)
    assert grids_of([plain.spread(Image(noise(9, 9)))]) is None and grids_of([]) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rule": "qwen4"}, "unknown rule"),
        ({"pixels": 3}, "unknown option 'pixels'"),
        ({"max_pixels": 100}, "at least one unit"),
        ({"min_pixels": 10**9}, "min <= max"),
        ({"max_pixels": 1e6}, "whole number"),
    ],
)
def test_limits_that_cannot_be_are_refused(change: dict[str, Any], told: str) -> None:
    common: dict[str, Any] = {"mode": "native", "interpolation": "bicubic", "fill": (0, 0, 0)}
    with pytest.raises(ConfigError, match=told):
        ImagePreparation((28, 28), tokens=1, native=QWEN | change, **common)


def test_an_absurdly_long_picture_is_refused_by_its_header() -> None:
    with pytest.raises(ImageError, match="200 times"):
        layout((10_000, 20), QWEN)
