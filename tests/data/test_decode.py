"""The training loader's fast decoding: the pixels and the refusals of load_rgb (fuzzed in test_shard_fuzz)."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from mmit.data.decode import load_fast
from mmit.data.images import load_rgb
from mmit.errors import ImageError
from mmit.records import Image


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_the_training_loader_gives_the_pixels_of_load_rgb(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    path = tmp_path / f"picture.{suffix}"
    PIL.Image.fromarray(pixels).save(path)
    for source in (str(path), path.read_bytes()):
        assert np.array_equal(np.array(load_fast(Image(source))), np.array(load_rgb(Image(source))))


def test_the_training_loader_names_the_file_that_is_damaged_or_missing(tmp_path):
    path = tmp_path / "picture.jpg"
    PIL.Image.new("RGB", (40, 40)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    for bad in (path, tmp_path / "nothing.jpg"):
        with pytest.raises(ImageError, match=bad.name):
            load_fast(Image(str(bad)), where="here")
