"""Features of a frozen vision tower, computed once and kept.

Owns the cache keyed by what decides a feature: the picture's bytes, its preparation, and the tower's fingerprint
(weights, layer, number format). Forecasts its size before writing it and evicts nothing. Cached features are bitwise
those the tower gives, batch by batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmit.errors import ConfigError
from mmit.models.vision import VisionTower
from mmit.records import Image

LoadImage = Callable[[Image, str], torch.Tensor]
DISK_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


class FeatureCache:
    """Looks features up by image key: (N, D) each, in the tower's dtype."""

    def __init__(self, rows: torch.Tensor, number: Mapping[Hashable, int]) -> None:
        self._rows, self._number = rows, dict(number)

    def get(self, keys: Sequence[Hashable]) -> torch.Tensor:
        """Features of pictures: (U, N, D)."""
        return self._rows[[self._number[k] for k in keys]]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._number

    def __len__(self) -> int:
        return len(self._number)


def forecast_bytes(tower: VisionTower, pictures: int) -> int:
    """Bytes the cache of that many pictures takes."""
    size = torch.empty((), dtype=next(tower.parameters()).dtype).element_size()
    return pictures * tower.tokens * tower.dim * size


def _digest(image: Image) -> str:
    if isinstance(image.source, bytes):
        return hashlib.sha256(image.source).hexdigest()
    assert isinstance(image.source, str)
    return hashlib.sha256(Path(image.source).read_bytes()).hexdigest()


def compute_features(
    tower: VisionTower,
    pictures: Iterable[tuple[Hashable, Image]],
    load_image: LoadImage,
    *,
    count: int,
    kind: str,
    folder: Path,
    preparation: Mapping[str, Any],
    batch: int = 64,
    max_bytes: int = 8 << 30,
) -> FeatureCache:
    """Run the tower over every distinct picture.

    Args:
        pictures: key and picture, read one after the other; equal keys and equal bytes are computed once.
        load_image: picture, place -> (3, H, W) uint8.
        count: how many distinct pictures to expect, for the forecast.
        kind: "memory", or "disk" to keep the features under `folder` for later runs.
        preparation: how pictures are brought to the tower; part of the disk key.
        max_bytes: a larger cache is refused before anything is computed.

    Raises:
        ConfigError: the cache would be larger than `max_bytes`. ImageError: a picture cannot be read.
    """
    need = forecast_bytes(tower, count)
    if need > max_bytes:
        raise ConfigError(
            f"the features of {count} pictures take {need / 2**30:.1f} GiB, the limit is {max_bytes / 2**30:.1f}",
            where="model.vision.cache",
            remedy="set model.vision.cache=off",
        )
    first = next(tower.parameters())
    store = _Store(folder, tower, preparation, first.dtype) if kind == "disk" else None
    known = store.load() if store else {}
    number: dict[Hashable, int] = {}
    place: dict[str, int] = {}
    rows: list[torch.Tensor] = []
    waiting: list[tuple[int, torch.Tensor]] = []

    def flush() -> None:
        if waiting:
            pixels = torch.stack([p for _, p in waiting])
            for (at, _), features in zip(waiting, tower(pixels.to(first.device)).cpu(), strict=True):
                rows[at] = features
            waiting.clear()

    for key, image in pictures:
        if key in number:
            continue
        digest = _digest(image)
        if digest not in place:
            place[digest] = len(rows)
            rows.append(known.get(digest, torch.empty(0)))
            if digest not in known:
                waiting.append((place[digest], load_image(image, "")))
        number[key] = place[digest]
        if len(waiting) == batch:
            flush()
    flush()
    table = torch.stack(rows) if rows else torch.empty(0, tower.tokens, tower.dim, dtype=first.dtype)
    if store and place.keys() - known.keys():
        store.save(list(place), table)
    return FeatureCache(table, number)


class _Store:
    """`index.json` (picture digests in order) and `features.bin` in a folder named after the tower."""

    def __init__(
        self, folder: Path, tower: VisionTower, preparation: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        key = json.dumps([tower.fingerprint(), dict(preparation)], sort_keys=True)
        self.folder = folder / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.shape, self.dtype = (tower.tokens, tower.dim), dtype

    def load(self) -> dict[str, torch.Tensor]:
        index = self.folder / "index.json"
        if not index.exists():
            return {}
        digests: list[str] = json.loads(index.read_text())
        raw = np.fromfile(self.folder / "features.bin", dtype=DISK_TYPES[self.dtype])
        if raw.size != len(digests) * self.shape[0] * self.shape[1]:  # a write that was cut off: compute again
            return {}
        rows = torch.from_numpy(raw).view(self.dtype).view(len(digests), *self.shape)
        return dict(zip(digests, rows, strict=True))

    def save(self, digests: Iterable[str], rows: torch.Tensor) -> None:
        """Write features first, the index last, each through a temporary name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".features.{os.getpid()}"
        numbers = rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
        numbers.numpy().tofile(draft)
        (self.folder / "index.json").unlink(missing_ok=True)
        draft.replace(self.folder / "features.bin")
        draft = self.folder / f".index.{os.getpid()}"
        draft.write_text(json.dumps(list(digests)))
        draft.replace(self.folder / "index.json")
