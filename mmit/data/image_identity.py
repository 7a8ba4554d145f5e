"""What identifies an image: its name (no file is opened), a key within one process, the digest of its content.

Owns the answers to "is this the same image?". Two files with the same content have two names and one digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from mmit.errors import ImageError

if TYPE_CHECKING:
    from mmit.records import Image


@lru_cache(maxsize=1 << 16)
def _absolute(path: str) -> str:
    return os.path.abspath(path)


def image_name(image: Image) -> str:
    """Return the absolute path of an image, or "sha256:..." of one that has no file. Opens nothing."""
    return _absolute(image.source) if isinstance(image.source, str) else inside_name(image)


def inside_name(image: Image) -> str:
    """Return "sha256:..." of an image without a file: of its encoded bytes, or of mode, size and pixels."""
    source = image.source
    assert not isinstance(source, str), "an image with a file is named by its path"
    if not isinstance(source, bytes):
        # With mode and size: a picture and its transpose may have the same bytes.
        source = f"{source.mode} {source.size} ".encode() + source.tobytes()
    return f"sha256:{hashlib.sha256(source).hexdigest()}"


def image_key(image: Image) -> Hashable:
    """Return a key for one process: the path as given, the hash of the bytes, or the identity of a PIL object."""
    if isinstance(image.source, str):
        return image.source
    if isinstance(image.source, bytes):
        return inside_name(image)
    # Hashing the pixels of every image of a conversation would cost more than it saves.
    return ("pil", id(image.source))


def image_digest(image: Image, *, remedy: str = "Check the path.") -> str:
    """Return the SHA-256 of an image's content: its file's bytes, or those of its PNG. Raises ImageError."""
    source = image.source
    if isinstance(source, str):
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}", where=str(image.source), remedy=remedy) from None
    elif not isinstance(source, bytes):
        out = BytesIO()
        # PNG keeps every pixel. Known limit: its bytes may differ between versions of Pillow, so the digest of a PIL
        # picture holds within one of them.
        source.save(out, "PNG")
        source = out.getvalue()
    return hashlib.sha256(source).hexdigest()
