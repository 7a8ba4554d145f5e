"""Decoding at full speed: encoded bytes to an RGB tensor, without a PIL picture between where none is needed.

Plain JPEGs, most of every data set, go through torchvision's libjpeg-turbo binding, which gives Pillow's pixels and
skips two copies; everything else goes through mmit.data.images. Refuses what load_rgb refuses, before decoding.
"""

from __future__ import annotations

import os
import struct

import numpy as np
import PIL.Image
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from mmit.data.images import MAX_ASPECT, MIN_SIDE, load_rgb
from mmit.records import Image

# Frame headers of baseline, extended and progressive Huffman JPEGs; the other SOFs are lossless or arithmetic.
_FRAMES = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
MAX_PIXELS = 50_000_000
_APP1, _SCAN = 0xE1, 0xDA
_ORIENTATION_TAG = 0x0112
# What Pillow's EXIF reader is seen to raise for a damaged block.
_BROKEN_EXIF = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, struct.error)


def decode_rgb(data: bytes, *, where: str = "", max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode a picture to uint8 (3, H, W), the pixels of `load_rgb`; the memory layout is (H, W, 3).

    Raises ImageError as load_rgb does.
    """
    if data[:2] == b"\xff\xd8" and _is_plain_jpeg(data, max_pixels):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
        # Damaged in some way: load_rgb decides, so that both ways refuse the same files with the same words.
    picture = load_rgb(Image(data), where=where, max_pixels=max_pixels)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def load_fast(image: Image, *, where: str = "") -> PIL.Image.Image:
    """`load_rgb` for the training loader: the same pixels and refusals, plain JPEGs decoded faster."""
    source = image.source
    if isinstance(source, str):
        if not source.lower().endswith((".jpg", ".jpeg")) or not os.path.isfile(source):
            return load_rgb(image, where=where)
        with open(source, "rb") as file:
            data = file.read()
        if data[:2] == b"\xff\xd8" and _is_plain_jpeg(data, MAX_PIXELS) and (pixels := _decode_jpeg(data)) is not None:
            return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return load_rgb(image, where=where)  # its error names the file
    if isinstance(source, bytes):
        return PIL.Image.fromarray(decode_rgb(source, where=where).permute(1, 2, 0).numpy())
    return load_rgb(image, where=where)


def _decode_jpeg(data: bytes) -> torch.Tensor | None:
    # A copy, since torch warns of bytes that cannot be written to.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        pixels: torch.Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB)
        return pixels
    except RuntimeError:
        return None


def _is_plain_jpeg(data: bytes, max_pixels: int) -> bool:
    """Say whether a JPEG is 8-bit colour or grey, of a decent size, and with nothing that would turn it.

    Every segment up to the pixels must be in its place: libjpeg would find its way over garbage, Pillow refuses it.
    """
    at, exif, frame = 2, False, False
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            small, large = min(height, width), max(height, width)
            decent = small >= MIN_SIDE and large <= MAX_ASPECT * small and small * large <= max_pixels
            if frame or not decent or data[at + 4] != 8 or data[at + 9] not in (1, 3):
                return False
            frame = True
        elif marker == _SCAN:
            return frame
        elif marker in _OTHER_FRAMES:
            return False
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _APP1:
            words = data[at + 4 : end]
            # A second EXIF block continues the first; XMP may state the orientation too.
            if exif or b"Orientation" in words:
                return False
            if words.startswith(b"Exif\0\0"):
                exif = True
                if not _upright(words):
                    return False
        at = end
    return False


def _upright(block: bytes) -> bool:
    exif = PIL.Image.Exif()
    try:
        exif.load(block)
        return exif.get(_ORIENTATION_TAG) in (None, 1)
    except _BROKEN_EXIF:
        return False
