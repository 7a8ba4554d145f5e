"""Features of a frozen vision tower, computed once and kept.

Owns the cache keyed by what decides a feature: the picture's bytes, its preparation, and the tower's fingerprint
(weights, layer, number format). Forecasts its size before writing it and evicts nothing. Cached features are bitwise
those the tower gives, batch by batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from mmit.data.preparation import ImagePreparation
from mmit.errors import ConfigError
from mmit.models.vision import VisionTower
from mmit.records import Image

DISK_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


class FeatureCache:
    """Looks features up by image key: (C, N, D) for the C crops of each, in the tower's dtype.

    Args:
        rows: (crops of all pictures, N, D). number: image key -> picture. first: (pictures + 1,) where the crops of
            each picture begin, and the end.
    """

    def __init__(self, rows: torch.Tensor, number: Mapping[Hashable, int], first: Sequence[int]) -> None:
        self._rows, self._number, self._first = rows, dict(number), list(first)

    def get(self, keys: Sequence[Hashable]) -> torch.Tensor:
        """Features of pictures, crop after crop: (sum of C, N, D)."""
        pictures = [self._number[k] for k in keys]
        return self._rows[[row for p in pictures for row in range(self._first[p], self._first[p + 1])]]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._number

    def __len__(self) -> int:
        return len(self._number)


def forecast_bytes(tower: VisionTower, crops: int) -> int:
    """Bytes the cache of pictures with that many crops takes."""
    size = torch.empty((), dtype=next(tower.parameters()).dtype).element_size()
    return crops * tower.tokens * tower.dim * size


def _digest(image: Image) -> str:
    if isinstance(image.source, bytes):
        return hashlib.sha256(image.source).hexdigest()
    assert isinstance(image.source, str)
    return hashlib.sha256(Path(image.source).read_bytes()).hexdigest()


def compute_features(
    tower: VisionTower,
    pictures: Iterable[tuple[Hashable, Image]],
    preparation: ImagePreparation,
    *,
    count: int,
    kind: str,
    folder: Path,
    batch: int = 64,
    max_bytes: int = 8 << 30,
) -> FeatureCache:
    """Run the tower over every distinct picture.

    Args:
        pictures: key and picture, read one after the other; equal keys and equal bytes are computed once.
        preparation: how pictures are brought to the tower; part of the disk key.
        count: how many crops of distinct pictures to expect, for the forecast.
        kind: "memory", or "disk" to keep the features under `folder` for later runs.
        max_bytes: a larger cache is refused before anything is computed.

    Raises:
        ConfigError: the cache would be larger than `max_bytes`. ImageError: a picture cannot be read.
    """
    need = forecast_bytes(tower, count)
    if need > max_bytes:
        raise ConfigError(
            f"the features of {count} pictures or tiles take {need / 2**30:.1f} GiB, "
            f"the limit is {max_bytes / 2**30:.1f}",
            where="model.vision.cache",
            remedy="set model.vision.cache=off",
        )
    first = next(tower.parameters())
    store = _Store(folder, tower, preparation, first.dtype) if kind == "disk" else None
    known = store.load() if store else {}
    number: dict[Hashable, int] = {}
    place: dict[str, int] = {}
    rows: list[torch.Tensor] = []  # (C, N, D) each
    waiting: list[tuple[int, torch.Tensor]] = []

    def flush() -> None:
        if waiting:
            pixels = torch.cat([p for _, p in waiting])
            features = tower(pixels.to(first.device)).cpu().split([len(p) for _, p in waiting])
            for (at, _), seen in zip(waiting, features, strict=True):
                rows[at] = seen
            waiting.clear()

    for key, image in pictures:
        if key in number:
            continue
        digest = _digest(image)
        if digest not in place:
            place[digest] = len(rows)
            rows.append(known.get(digest, torch.empty(0)))
            if digest not in known:
                waiting.append((place[digest], preparation.pixels(image)))
        number[key] = place[digest]
        if sum(len(crops) for _, crops in waiting) >= batch:
            flush()
    flush()
    crops = [len(row) for row in rows]
    table = torch.cat(rows) if rows else torch.empty(0, tower.tokens, tower.dim, dtype=first.dtype)
    if store and place.keys() - known.keys():
        store.save(dict(zip(place, crops, strict=True)), table)
    return FeatureCache(table, number, [0, *accumulate(crops)])


class _Store:
    """`index.json` (digest -> crops, in order) and `features.bin` in a folder named after the tower."""

    def __init__(
        self, folder: Path, tower: VisionTower, preparation: ImagePreparation, dtype: torch.dtype
    ) -> None:
        key = json.dumps([tower.fingerprint(), asdict(preparation)], sort_keys=True)
        self.folder = folder / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.shape, self.dtype = (tower.tokens, tower.dim), dtype

    def load(self) -> dict[str, torch.Tensor]:
        index = self.folder / "index.json"
        if not index.exists():
            return {}
        crops: dict[str, int] = json.loads(index.read_text())
        raw = np.fromfile(self.folder / "features.bin", dtype=DISK_TYPES[self.dtype])
        count = sum(crops.values())
        if raw.size != count * self.shape[0] * self.shape[1]:  # a write that was cut off: compute again
            return {}
        rows = torch.from_numpy(raw).view(self.dtype).view(count, *self.shape)
        return dict(zip(crops, rows.split(list(crops.values())), strict=True))

    def save(self, crops: Mapping[str, int], rows: torch.Tensor) -> None:
        """Write features first, the index last, each through a temporary name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".features.{os.getpid()}"
        numbers = rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
        numbers.numpy().tofile(draft)
        (self.folder / "index.json").unlink(missing_ok=True)
        draft.replace(self.folder / "features.bin")
        draft = self.folder / f".index.{os.getpid()}"
        draft.write_text(json.dumps(dict(crops)))
        draft.replace(self.folder / "index.json")
