"""Tiles: hand-computed cases, agreement with transformers, and what must hold for every size."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.images import image_size, load_rgb
from mmit.data.tiles import PINPOINTS, Tiling, any_resolution, best_canvas, crops, dynamic_tiles
from mmit.errors import ConfigError, ImageError
from mmit.records import Image
from tests.examples import examples

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((300, 600), (336, 672)),
        ((600, 300), (672, 336)),
        ((640, 480), (672, 672)),  # 640 x 480 kept whole; 672 x 336 would keep 448 x 336
        ((2000, 500), (1008, 336)),
        ((100, 100), (336, 672)),  # kept whole by every canvas: the smallest one, the first among equals
        ((1000, 1000), (672, 672)),
    ],
)
def test_canvas_by_hand(size, canvas):
    assert best_canvas(size, PINPOINTS) == canvas


@pytest.mark.parametrize(
    ("size", "grid", "kept", "tokens"),
    [
        # 2 x 2 tiles of 24 x 24 features: 48 x 48, of which 36 rows show the picture; 36 x (48 + 1) + 576.
        ((640, 480), (2, 2), (6, 0, 36, 48), 2340),
        # Square on a square canvas: nothing is padding; 48 x 49 + 576.
        ((1000, 1000), (2, 2), (0, 0, 48, 48), 2928),
        # 24 x 72 features; 500 / 2000 x 72 = 18 rows: 18 x 73 + 576.
        ((2000, 500), (1, 3), (3, 0, 18, 72), 1890),
    ],
)
def test_any_resolution_by_hand(size, grid, kept, tokens):
    tiling = any_resolution(size)
    assert (tiling.grid, tiling.kept, tiling.tokens, tiling.thumbnail) == (grid, kept, tokens, "first")


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        ((800, 800), (2, 2), 5 * 256),  # 1:1 in 1, 4 and 9 tiles; 4 tiles of 448 are less than twice the picture
        ((400, 400), (1, 1), 256),  # 4 tiles would be more than twice its pixels
        ((1344, 448), (1, 3), 4 * 256),
        ((448, 5376), (12, 1), 13 * 256),
    ],
)
def test_dynamic_tiles_by_hand(size, grid, tokens):
    tiling = dynamic_tiles(size)
    assert (tiling.grid, tiling.tokens) == (grid, tokens)
    assert tiling.thumbnail == (None if grid == (1, 1) else "last")


def test_options_change_the_count_as_they_say():
    assert any_resolution((640, 480), thumbnail=False).tokens == 36 * 49
    assert any_resolution((640, 480), line_ends=False).tokens == 36 * 48 + 576
    assert any_resolution((640, 480), unpad=False).tokens == 48 * 49 + 576
    assert any_resolution((640, 480), features=12).tokens == 18 * 25 + 144
    assert dynamic_tiles((800, 800), thumbnail=False).tokens == 4 * 256
    assert dynamic_tiles((800, 800), max_tiles=3).grid == (1, 1)
    assert dynamic_tiles((800, 800), min_tiles=9).grid == (3, 3)


@given(SIZES)
@settings(max_examples=examples(300), deadline=None)
def test_same_grids_as_transformers(size):
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    W, H = size
    height, width = select_best_resolution((H, W), [(h, w) for w, h in PINPOINTS])
    assert best_canvas(size, PINPOINTS) == (width, height)
    columns, rows = get_optimal_tiled_canvas((H, W), (448, 448), 1, 12)
    assert dynamic_tiles(size).grid == (rows, columns)


@given(SIZES)
@settings(max_examples=examples(300), deadline=None)
def test_same_token_counts_as_transformers(size):
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    tiling = any_resolution(size)
    (rows, columns), (W, H) = tiling.grid, size
    features = LlavaNextProcessor._get_unpadded_features(None, H, W, 24, 24, rows, columns)
    if features[0]:  # of a thread-like picture transformers keeps nothing
        assert tiling.tokens == sum(features) + 576
    else:
        assert tiling.kept[2] * tiling.kept[3] > 0


@given(SIZES)
@settings(max_examples=examples(200), deadline=None)
def test_invariants(size):
    for tiling in (any_resolution(size), dynamic_tiles(size)):
        assert tiling.canvas == (tiling.grid[1] * tiling.tile, tiling.grid[0] * tiling.tile)
        assert 1 <= tiling.grid[0] * tiling.grid[1] <= 12 and tiling.tokens > 0
    turned = any_resolution(size[::-1])
    assert turned.canvas == any_resolution(size).canvas[::-1] or size[0] * size[1] <= 336 * 672
    whole = any_resolution(size, unpad=False, line_ends=False)
    assert whole.tokens == whole.crops * 576
    assert any_resolution(size, line_ends=False).tokens <= whole.tokens


@given(st.tuples(st.integers(1, 120), st.integers(1, 120)))
@settings(max_examples=examples(30), deadline=None)
def test_crops_match_the_plan(size):
    picture = PIL.Image.new("RGB", size, (200, 100, 50))
    pinpoints = [(8, 16), (16, 8), (16, 16)]
    for tiling in (any_resolution(size, tile=8, features=2, pinpoints=pinpoints), dynamic_tiles(size, tile=8)):
        pieces = crops(picture, tiling)
        assert len(pieces) == tiling.crops and {piece.size for piece in pieces} == {(8, 8)}


def test_tiles_join_to_the_picture():
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise)
    tiling = dynamic_tiles(picture.size, tile=8, max_tiles=6)
    *tiles, thumbnail = [np.asarray(piece) for piece in crops(picture, tiling)]
    assert tiling.grid == (2, 3) and thumbnail.shape == (8, 8, 3)
    joined = np.concatenate([np.concatenate(tiles[row * 3 : row * 3 + 3], axis=1) for row in range(2)])
    assert (joined == noise).all()  # the canvas has the picture's size, so resizing changes nothing


def test_padding_is_where_the_plan_says():
    picture = PIL.Image.new("RGB", (64, 48), (255, 255, 255))
    tiling = any_resolution(picture.size, tile=32, features=4, pinpoints=[(64, 64)])
    whole, *tiles = [np.asarray(piece) for piece in crops(picture, tiling, fill=(9, 9, 9))]
    joined = np.concatenate([np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)])
    assert (whole == 255).all() and (joined[:8] == 9).all() and (joined[-8:] == 9).all() and (joined[8:56] == 255).all()
    assert tiling.kept == (1, 0, 6, 8)  # 8 pixels of a side are one feature


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_header_gives_the_upright_size(orientation, format):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    PIL.Image.new("RGB", (30, 20)).save(out, format, exif=exif)
    image = Image(out.getvalue())
    assert image_size(image) == load_rgb(image).size == ((20, 30) if orientation in (6, 8) else (30, 20))


def test_the_header_is_enough(tmp_path):
    out = io.BytesIO()
    PIL.Image.new("RGB", (640, 480)).save(out, "PNG")
    (tmp_path / "cut.png").write_bytes(out.getvalue()[:200])
    assert any_resolution(image_size(Image(str(tmp_path / "cut.png")))).tokens == 2340
    with pytest.raises(ImageError, match="cannot open"):
        image_size(Image(str(tmp_path / "gone.png")), where="row 1")
    assert image_size(Image(PIL.Image.new("L", (3, 4)))) == (3, 4)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="no multiple of the tile"):
        any_resolution((10, 10), tile=300)
    with pytest.raises(ConfigError, match="two positive"):
        dynamic_tiles((0, 10))
    with pytest.raises(ConfigError, match="no canvases"):
        any_resolution((10, 10), pinpoints=())
    with pytest.raises(ConfigError, match="min_tiles"):
        dynamic_tiles((10, 10), min_tiles=4, max_tiles=3)
    with pytest.raises(ConfigError, match="features is 0"):
        any_resolution((10, 10), features=0)
    with pytest.raises(ImageError, match="RGB"):
        crops(PIL.Image.new("L", (10, 10)), dynamic_tiles((10, 10)))


@pytest.mark.parametrize(("size", "shown"), [((101, 300), (114, 336)), ((300, 101), (336, 114)), ((1, 1000), (1, 336))])
def test_sides_are_rounded_up(size, shown):
    """As LLaVA does: 101 * 336 / 300 = 113.12 pixels are 114, and no side is lost."""
    (crop,) = crops(PIL.Image.new("RGB", size, (255, 255, 255)), Tiling(336, (1, 1), None, "pad", 1))
    left, top, right, bottom = crop.getbbox()
    assert (right - left, bottom - top) == shown
