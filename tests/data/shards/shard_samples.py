"""Tiny tars and records for the tests of shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image

from mmit.errors import RecordError
from mmit.records import Record


def picture(
    seed: int, size: tuple[int, int] = (12, 8), *, format: str = "JPEG", orientation: int | None = None
) -> bytes:
    """Encode noise; `size` is (width, height) as stored."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out, exif = io.BytesIO(), PIL.Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    PIL.Image.fromarray(pixels).save(out, format, **({"exif": exif} if orientation else {}))
    return out.getvalue()


def records(number: int, *, start: int = 0) -> list[Record]:
    """Records without, with one, and with two pictures, in several formats."""
    formats = ("JPEG", "PNG", "WEBP")
    return [
        Record.triple(
            f"question {i}",
            f"answer {i} é",
            images=[picture(i * 2 + n, format=formats[(i + n) % 3]) for n in range(i % 3)],
            id=f"r{i}",
            source=("web", "books")[i % 2],
            row=i + 1,
            licence="CC0",
            meta={"n": i},
        )
        for i in range(start, start + number)
    ]


def tar_bytes(members: Iterable[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar with these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> str:
    """Write a tar, return its path."""
    path.write_bytes(tar_bytes(members, format=format))
    return str(path)


class Collected(list[RecordError]):
    """An `on_bad` that keeps what it is given."""

    def __call__(self, error: RecordError) -> None:
        self.append(error)
