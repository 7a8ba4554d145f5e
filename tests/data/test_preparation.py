"""From a picture to crops and image tokens: order as in transformers' LLaVA-NeXT, counts from the header alone."""

from __future__ import annotations

from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmit.data.preparation import LINE_END, ImagePreparation, splice_index
from mmit.errors import ConfigError, ImageError
from mmit.records import Image
from tests.examples import examples

PINPOINTS = [[8, 16], [16, 8], [16, 16], [24, 8]]


def eye(mode: str = "any_resolution", **options) -> ImagePreparation:
    tiles = options.pop("tiles", {"pinpoints": PINPOINTS} if mode == "any_resolution" else {})
    given = {"size": (8, 8), "interpolation": "bicubic", "fill": (0, 0, 0), "tokens": 16, "grid": (4, 4)}
    given["tiles"] = tiles
    return ImagePreparation(mode=mode, **{**given, **options})


def picture(width: int, height: int) -> Image:
    return Image(PIL.Image.effect_noise((width, height), 90).convert("RGB"))


@given(st.tuples(st.integers(2, 60), st.integers(2, 60)))
@settings(max_examples=examples(80), deadline=None)
def test_tokens_stand_where_transformers_puts_them(size):
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    prepared = eye()
    spread = prepared.spread(picture(*size))
    table = torch.arange(spread.crops * 16, dtype=torch.float32).view(spread.crops, 16, 1)
    vision = SimpleNamespace(image_size=8, patch_size=2)
    heights_first = [[height, width] for width, height in PINPOINTS]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=heights_first))
    (theirs,), _ = LlavaNextModel.pack_image_features(
        model, [table], torch.tensor([[size[1], size[0]]]), "default", torch.tensor([float(LINE_END)])
    )
    # Of a picture so narrow that transformers would keep nothing but line ends, mmit keeps a line.
    assume(len(set(theirs.flatten().tolist())) > 17)
    assert spread.index.tolist() == theirs.flatten().int().tolist()


@pytest.mark.parametrize("mode", ["any_resolution", "dynamic", "pad", "resize", "crop"])
@given(st.tuples(st.integers(2, 60), st.integers(2, 60)))
@settings(max_examples=examples(20), deadline=None)
def test_a_header_tells_crops_and_tokens(mode, size):
    prepared = eye(mode)
    spread = prepared.spread(picture(*size))
    pixels = prepared.pixels(picture(*size))
    assert pixels.shape == (spread.crops, 3, 8, 8) and pixels.dtype == torch.uint8
    assert spread.index.max() < spread.crops * 16
    if mode != "any_resolution":
        assert spread.index.tolist() == list(range(spread.crops * 16))


def test_a_known_size_is_believed_and_then_checked(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (30, 10)).save(path)
    prepared = eye()
    known = Image(str(tmp_path / "missing.png"), (30, 10))  # an index knows it; no file is opened
    assert torch.equal(prepared.spread(known).index, prepared.spread(Image(str(path))).index)
    with pytest.raises(ImageError, match="is 30 x 10 pixels, 10 x 30 were indexed"):
        prepared.pixels(Image(str(path), (10, 30)))


def test_slots_index_the_table_of_distinct_pictures():
    prepared = eye()
    spreads = {"wide": prepared.spread(picture(30, 10)), "small": prepared.spread(picture(6, 6))}
    index = splice_index(["small", "wide", "small"], spreads, 16)
    small, wide = spreads["small"].index, spreads["wide"].index
    rows = spreads["small"].crops * 16
    moved = torch.where(wide == LINE_END, LINE_END, wide + rows)
    assert torch.equal(index, torch.cat([small, moved, small]))
    assert len(splice_index([], {}, 16)) == 0


def test_blank_and_whole_pictures_are_one_crop():
    blank = eye("pad").blank((1, 2, 3))
    assert eye("pad").pixels(blank).flatten(2)[0, :, 0].tolist() == [1, 2, 3]
    assert eye().whole().spread(picture(30, 10)).crops == 1
    assert not eye().whole().tiled and eye("crop").whole() == eye("crop")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mode": "anyres"}, "unknown image fit mode 'anyres'"),
        ({"mode": "pad", "tiles": {"max_tiles": 4}}, "not cut into tiles"),
        ({"mode": "dynamic", "tiles": {"max_tile": 4}}, "unknown tile option 'max_tile'"),
        ({"mode": "dynamic", "tiles": {"max_tiles": 0}}, "max_tiles is 0"),
        ({"mode": "any_resolution", "tiles": {"pinpoints": [[12, 8]]}}, "no multiple of the tile"),
        ({"mode": "any_resolution", "grid": None}, "are no grid"),
        ({"mode": "dynamic", "size": (8, 16)}, "tiles are square"),
        ({"mode": "pad", "interpolation": "cubic"}, "unknown interpolation"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_any_picture(options, problem):
    with pytest.raises(ConfigError, match=problem):
        eye(**options)
