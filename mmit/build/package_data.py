"""Files of installed packages, read without importing them, and images as bytes: made, and told what they are."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import PIL.Image

from mmit.errors import ConfigError, RecordError
from mmit.records import Image


def package_file(package: str, path: str, *, pip: str) -> Path:
    """Return a data file of the installed `package`, which `pip install PIP` gives. Raises ConfigError without it."""
    spec = find_spec(package)
    remedy = f"pip install {pip}"
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"needs the package {pip}", where="rows.package", remedy=remedy)
    file = Path(next(iter(spec.submodule_search_locations))) / path
    if not file.exists():
        raise ConfigError(f"the package {pip} has no {path}", where=str(file), remedy=f"{remedy} --force-reinstall")
    return file


def png(picture: PIL.Image.Image) -> Image:
    """Return a picture as an image part that holds an encoded PNG."""
    out = BytesIO()
    picture.save(out, "PNG")
    return Image(out.getvalue())


def image_format(data: bytes) -> str:
    """Return the suffix for an encoded image, such as png. Raises RecordError where its header is none."""
    try:
        with PIL.Image.open(BytesIO(data)) as picture:
            return (picture.format or "png").lower()
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for damaged headers
        raise RecordError("the image's bytes are no image", remedy="Fetch it again, or leave the row out.") from error
