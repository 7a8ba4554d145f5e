"""Pictures: from a record's image part to RGB pixels, and from any size to the size a vision encoder wants.

Paths, encoded bytes and PIL pictures go in; an RGB PIL picture, then a uint8 tensor (3, H, W) come out.
Refuses what is missing, truncated, of an unlisted format, absurdly shaped or too large, before decoding where
the header tells. Never normalises (the vision tower does), never puts a blank picture in place of a bad one.

Letters: H height, W width.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import PIL.Image
import PIL.ImageFile
from PIL.Image import Resampling, Transpose

from mmit.errors import ConfigError, ImageError, nearest
from mmit.records import Image, short

if TYPE_CHECKING:
    import torch

# The formats that data sets use. Pillow reads dozens more, each a decoder that foreign bytes could reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
INTERPOLATIONS = {
    "nearest": Resampling.NEAREST,
    "bilinear": Resampling.BILINEAR,
    "bicubic": Resampling.BICUBIC,
    "lanczos": Resampling.LANCZOS,
}
FIT_MODES = ("resize", "pad", "crop")
MIN_SIDE = 2
MAX_ASPECT = 200
LINES_AT_ONCE = 256

# EXIF tag 0x0112 -> how to turn the stored pixels upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
# What Pillow's EXIF reader is seen to raise for a damaged block.
_BROKEN_EXIF = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, struct.error)
_truncation = threading.Lock()


def load_rgb(
    image: Image,
    *,
    where: str = "",
    max_pixels: int = 50_000_000,
    background: tuple[int, int, int] = (255, 255, 255),
) -> PIL.Image.Image:
    """Decode `image` to a new, upright RGB picture; animations give their first frame.

    16-bit grey is scaled to 8 bits, colour profiles are not applied. EXIF orientation is applied; an EXIF block that
    cannot be read counts as none, as in browsers.

    Args:
        image: a file, encoded bytes or a PIL picture, which is left as it is.
        where: of the record, for the error.
        max_pixels: width times height at most. What would trigger Pillow's decompression-bomb warning is refused in
            any case.
        background: RGB from 0 to 255 behind transparent pixels.

    Raises:
        ImageError: with the place (`where` and the file), the cause and the remedy.
    """
    try:
        return _load(image, where, max_pixels, background)
    except ImageError:
        data = without_png_text(image.source)
        if data is None:
            raise
    return _load(Image(data), where, max_pixels, background)


def _load(image: Image, where: str, max_pixels: int, background: tuple[int, int, int]) -> PIL.Image.Image:
    source = image.source
    if isinstance(source, str):
        where = f"{where}: {short(source, 120)}" if where else short(source, 120)
    else:
        kind = "image bytes" if isinstance(source, bytes) else "PIL picture"
        where = f"{where}: {kind}" if where else kind
    if isinstance(source, PIL.Image.Image):
        _check_size(source, max_pixels, where)
        return _decode(source, background, where)
    with _opened(source, where) as file:
        picture = _read_header(file, where)
        _check_size(picture, max_pixels, where)
        return _decode(picture, background, where)


def image_size(image: Image, *, where: str = "") -> tuple[int, int]:
    """Return the upright (W, H) of a picture from its header alone, without decoding it.

    Equals the size of what `load_rgb` gives, but for PNGs whose EXIF block stands behind the pixels, where it cannot
    be seen without decoding. Judges neither size nor content. Raises ImageError as `load_rgb` does.
    """
    source = image.source
    if isinstance(source, str):
        where = f"{where}: {short(source, 120)}" if where else short(source, 120)
    if isinstance(source, PIL.Image.Image):
        return _upright_size(source)
    try:
        with _opened(source, where) as file:
            return _upright_size(_read_header(file, where))
    except ImageError:
        data = without_png_text(source)
        if data is None:
            raise
    return _upright_size(_read_header(BytesIO(data), where))


_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def without_png_text(source: object) -> bytes | None:
    """Return a PNG without its text chunks, None if it is no PNG or has none.

    Pillow refuses a picture whose text (a prompt, a workflow) is larger than a limit that has nothing to do with its
    pixels.
    """
    if isinstance(source, str):
        if not os.path.isfile(source):  # opening a pipe would wait for ever
            return None
        try:
            with open(source, "rb") as file:
                source = _PNG + file.read() if file.read(len(_PNG)) == _PNG else None
        except OSError:
            return None
    if not isinstance(source, bytes) or not source.startswith(_PNG):
        return None
    kept, at, found = [_PNG], len(_PNG), False
    while at + 12 <= len(source):
        end = at + 12 + int.from_bytes(source[at : at + 4], "big")
        if source[at + 4 : at + 8] in _PNG_TEXTS:
            found = True
        else:
            kept.append(source[at:end])
        at = end
    return b"".join(kept) if found else None


def _upright_size(picture: PIL.Image.Image) -> tuple[int, int]:
    try:
        # The method of the base class: a PNG's own would decode the pixels to look for EXIF behind them.
        orientation = PIL.Image.Image.getexif(picture).get(_ORIENTATION_TAG)
    except _BROKEN_EXIF:
        orientation = None
    w, h = picture.size
    return (h, w) if orientation in (5, 6, 7, 8) else (w, h)


@contextmanager
def _opened(source: str | bytes, where: str) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield BytesIO(source)
        return
    if not isinstance(source, str):
        problem = f"a {type(source).__name__} is no picture"
        raise ImageError(problem, where=where, remedy="Give a path, bytes or a PIL picture.")
    check_file(source, where)
    try:
        file = open(source, "rb")
    except OSError as error:
        raise _cannot_open(error, where) from error
    with file:
        yield file


_CHECK_PATH = "Check the path; relative paths start at the data file's folder, or at its image_root."


def check_file(path: str, where: str) -> None:
    """Raise ImageError if there is no file at `path`; opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _cannot_open(error, where) from error
    if not stat.S_ISREG(mode):  # opening a pipe or a device would wait for ever
        raise ImageError("not a file", where=where, remedy=_CHECK_PATH)


def _cannot_open(error: OSError | ValueError, where: str) -> ImageError:
    cause = getattr(error, "strerror", None) or "not a valid path"
    return ImageError(f"cannot open the image: {cause}", where=where, remedy=_CHECK_PATH)


def _read_header(file: BinaryIO, where: str) -> PIL.Image.Image:
    names = ", ".join(FORMATS)
    try:
        return PIL.Image.open(file, formats=FORMATS)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise _too_large(short(str(error), 150), where) from error
    except PIL.UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(8)
        problem = f"not a {names} picture (it begins with {head!r})" if head else "the image is empty"
        remedy = f"Convert it to one of {names}, or fetch it again if it is damaged."
        raise ImageError(problem, where=where, remedy=remedy) from error
    except Exception as error:
        # Pillow's plugins raise whatever a malformed header leads to (struct.error, KeyError, ...).
        raise _damaged(error, where) from error


def _check_size(picture: PIL.Image.Image, max_pixels: int, where: str) -> None:
    """Judge the header's size, before any pixel is decoded."""
    w, h = picture.size
    if PIL.Image.MAX_IMAGE_PIXELS is not None:
        max_pixels = min(max_pixels, PIL.Image.MAX_IMAGE_PIXELS)
    if w * h > max_pixels:
        raise _too_large(f"{w} x {h} pixels are more than the {max_pixels:,} allowed", where)
    if min(w, h) < MIN_SIDE:
        remedy = "Check how the picture was made, or leave the record out."
        problem = f"{w} x {h} pixels: each side needs at least {MIN_SIDE}"
        raise ImageError(problem, where=where, remedy=remedy)
    if max(w, h) > MAX_ASPECT * min(w, h):
        remedy = "Crop or split the picture, or leave the record out."
        problem = f"{w} x {h} pixels: one side is over {MAX_ASPECT} times the other"
        raise ImageError(problem, where=where, remedy=remedy)


def _too_large(problem: str, where: str) -> ImageError:
    remedy = "Scale the picture down, or raise max_pixels if its origin is trusted."
    return ImageError(problem, where=where, remedy=remedy)


def _damaged(error: Exception, where: str) -> ImageError:
    cause = short(str(error) or type(error).__name__)
    remedy = "The file is damaged or cut short: fetch it again, or leave the record out."
    return ImageError(f"cannot decode: {cause}", where=where, remedy=remedy)


def _decode(picture: PIL.Image.Image, background: tuple[int, int, int], where: str) -> PIL.Image.Image:
    try:
        with _no_truncation():
            picture.load()
        rgb = _to_rgb(picture, background, where)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(error, where) from error
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG)
    except _BROKEN_EXIF:
        orientation = None
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # it holds the EXIF block, which would turn the picture once more when it is loaded again
    return rgb


@contextmanager
def _no_truncation() -> Iterator[None]:
    """Make a truncated file an error even where another library has told Pillow to fill in grey."""
    if not PIL.ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _truncation:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True


def _to_rgb(picture: PIL.Image.Image, background: tuple[int, int, int], where: str) -> PIL.Image.Image:
    if picture.mode.startswith("I;16"):
        picture = _eight_bits(picture)
    if picture.mode in ("I", "F"):
        remedy = "Scale the pixels to 0..255 yourself and make an L or RGB picture of them."
        raise ImageError(f"mode {picture.mode} does not state its range", where=where, remedy=remedy)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    key = picture.info.get("transparency")
    if picture.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # A 16-bit PNG: Pillow halves the pixels' depth but not the transparent colour's.
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    # Pillow converts La (grey premultiplied by alpha) to nothing but LA.
    rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    canvas = PIL.Image.new("RGBA", rgba.size, (*background, 255))
    canvas.alpha_composite(rgba)
    return canvas.convert("RGB")


def _eight_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Scale 16-bit grey to L or LA; Pillow's own conversion clips at 255 and leaves mostly white."""
    grey_HW = np.asarray(picture).astype(np.uint32)
    light = PIL.Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8))
    key = picture.info.get("transparency")
    if key is None:
        return light
    alpha = PIL.Image.fromarray(np.where(grey_HW == key, 0, 255).astype(np.uint8))
    return PIL.Image.merge("LA", (light, alpha))


def fit(
    picture: PIL.Image.Image,
    size: tuple[int, int],
    *,
    mode: Literal["resize", "pad", "crop"] = "resize",
    interpolation: str = "bicubic",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> torch.Tensor:
    """Bring an RGB picture to a size.

    Args:
        picture: RGB. size: (H, W) in pixels.
        mode: "resize" stretches. "pad" centres the picture on a canvas that has the shape of `size`, then scales:
            LLaVA's expand2square and resize, to the last bit. "crop" scales to cover and cuts the centre out, rounding
            as the processors of transformers do (LLaVA's `square`; torchvision's CenterCrop may lie a pixel beside).
        interpolation: a name of INTERPOLATIONS.
        fill: RGB of the canvas.

    Returns:
        (3, H, W) uint8, contiguous.

    Raises:
        ConfigError: wrong options. ImageError: the picture is not RGB.
    """
    if mode not in FIT_MODES:
        raise ConfigError(f"unknown image fit mode '{mode}'", remedy=nearest(str(mode), FIT_MODES))
    if interpolation not in INTERPOLATIONS:
        remedy = nearest(str(interpolation), INTERPOLATIONS)
        raise ConfigError(f"unknown interpolation '{interpolation}'", remedy=remedy)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ConfigError(f"size {size} is not two positive whole numbers", remedy="Write it as (H, W).")
    if picture.mode != "RGB":
        raise ImageError(f"fit takes RGB, not {picture.mode}", remedy="Load the picture with load_rgb.")
    resample = INTERPOLATIONS[interpolation]
    if mode == "resize":
        out = picture.resize((size[1], size[0]), resample)
    elif mode == "pad":
        out = _pad(picture, size, resample, fill=fill)
    else:
        out = _crop(picture, size, resample)
    return to_tensor(out)


def to_tensor(picture: PIL.Image.Image) -> torch.Tensor:
    """(3, H, W) uint8, contiguous, of an RGB picture."""
    import torch

    # One copy, by numpy: torch takes three times as long to put channels first.
    return torch.from_numpy(np.array(np.asarray(picture).transpose(2, 0, 1), order="C"))


def _pad(
    picture: PIL.Image.Image, size: tuple[int, int], resample: Resampling, *, fill: tuple[int, int, int]
) -> PIL.Image.Image:
    (H, W), (w, h) = size, picture.size
    # The padded picture has the shape of `size`, and is never made: a 200:1 strip would need 200 times its memory.
    cw, ch = (w, max(h, round(w * H / W))) if w * H >= h * W else (max(w, round(h * W / H)), h)
    left, top = (cw - w) // 2, (ch - h) // 2
    # Pillow resizes across and then down. Across, each line stands for itself, so lines can be taken a few at a time,
    # and lines of padding stay what they are.
    narrow = PIL.Image.new("RGB", (W, ch), fill)
    if cw == w:  # nothing is padded across
        narrow.paste(picture.resize((W, h), resample), (0, top))
        return narrow.resize((W, H), resample)
    for y in range(0, h, LINES_AT_ONCE):
        n = min(LINES_AT_ONCE, h - y)
        lines = PIL.Image.new("RGB", (cw, n), fill)
        lines.paste(picture.crop((0, y, w, y + n)), (left, 0))
        narrow.paste(lines.resize((W, n), resample), (0, top + y))
    return narrow.resize((W, H), resample)


def _crop(picture: PIL.Image.Image, size: tuple[int, int], resample: Resampling) -> PIL.Image.Image:
    (H, W), (w, h) = size, picture.size
    # Integers, since a float may leave the side that has to fit exactly one pixel short.
    cover = (W, h * W // w) if W * h >= H * w else (w * H // h, H)
    left, top = (cover[0] - W) // 2, (cover[1] - H) // 2
    return picture.resize(cover, resample).crop((left, top, left + W, top + H))
