"""Features of a frozen vision tower, computed once and kept.

Owns the cache keyed by what decides a feature: the picture's bytes, its preparation, and the tower's fingerprint
(weights, layer, number format). Forecasts its size before writing it. Cached features are bitwise those the tower
gives, batch by batch. Each of R ranks computes every R-th batch and receives the rest, so that what is in a batch, and
with it every bit, does not depend on their number. Runs can share a folder: an image then has the bits that the first
of them computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmit.data.image_identity import image_digest
from mmit.data.preparation import ImagePreparation, grids_of
from mmit.errors import ConfigError, ImageError
from mmit.io import whole_file, write_atomic
from mmit.train.engines.world import World

if TYPE_CHECKING:
    from mmit.models.vision import VisionTower
    from mmit.records import Image

ALONE = World(0, 1, torch.device("cpu"), deepspeed=False)
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


def features_folder(vision: Any, run_dir: Path) -> Path:
    """Return where features are kept on disk: the folder that `model.vision.cache_dir` names, else the run's own."""
    shared = None if vision is None else vision.cache_dir
    return Path(shared) if shared else run_dir / "cache"


def forecast_bytes(tower: VisionTower, crops: int) -> int:
    """Bytes the cache of pictures with that many crops takes."""
    size = torch.empty((), dtype=next(tower.parameters()).dtype).element_size()
    return crops * tower.tokens * tower.dim * size


@dataclass(frozen=True)
class CachePlan:
    """What a cache is expected to hold, and where.

    Args:
        count: how many crops of distinct pictures to expect, for the forecast.
        kind: "memory", or "disk" to keep the features under `folder` for later runs.
        batch: crops that go through the tower together; by default 64, or 4,096 units of native resolution.
        max_bytes: a larger cache is refused before anything is computed.
    """

    count: int
    kind: str
    folder: Path
    batch: int | None = None
    max_bytes: int = 8 << 30

    def check(self, tower: VisionTower) -> None:
        """Raise ConfigError where the cache would be larger than `max_bytes`."""
        need = forecast_bytes(tower, self.count)
        if need > self.max_bytes:
            raise ConfigError(
                f"the features of {self.count} pictures or tiles take {need / 2**30:.1f} GiB, "
                f"the limit is {self.max_bytes / 2**30:.1f}",
                where="model.vision.cache",
                remedy="set model.vision.cache=off",
            )


def compute_features(
    tower: VisionTower,
    pictures: Iterable[tuple[Hashable, Image]],
    preparation: ImagePreparation,
    plan: CachePlan,
    *,
    world: World = ALONE,
    begin: Callable[[str], None] = lambda phase: None,
) -> FeatureCache:
    """Run the tower over every distinct picture.

    Args:
        pictures: key and picture, read one after the other; equal keys and equal bytes are computed once.
        preparation: how pictures are brought to the tower; part of the disk key.
        world: the ranks that share the work; all of them call this with the same pictures, and each gets everything.
        begin: receives the name of each phase, for the heartbeat.

    Raises:
        ConfigError: the cache would be larger than planned, or ranks do not see the same pictures.
        ImageError: a picture cannot be read.
    """
    plan.check(tower)
    dtype = next(tower.parameters()).dtype
    store = _Store(plan.folder, tower, preparation, dtype) if plan.kind == "disk" else None
    distinct = _Distinct(pictures, preparation, known=store.load(world) if store else {})
    batches = distinct.batches(plan.batch or (64 if tower.native is None else 4096))
    more = True
    while more:  # round by round, so that no rank waits for another longer than for a batch
        begin("computing features")
        # Every rank forms all batches of a round, which costs reading the files, and computes its own. So batches do
        # not depend on the number of ranks, and neither do bits: a matrix product rounds by the size of its batch.
        with world.together():
            round_ = list(islice(batches, world.size))
            seen = _compute(tower, round_[world.rank], preparation) if world.rank < len(round_) else None
        begin("sharing features")
        # Before anything is sent: ranks with other files would wait for tensors of other sizes, or keep wrong ones.
        _check_same(world, [digest for one in round_ for digest in one.digests])
        for source, one in enumerate(round_):
            features = torch.empty(sum(one.crops), tower.tokens, tower.dim, dtype=dtype)
            if source == world.rank and seen is not None:
                features = seen
            world.share(features, source=source)
            distinct.take(one, features)
        more = len(round_) == world.size
    # One tensor, so that a micro-batch's features are one lookup and not as many as it has images.
    rows = distinct.rows
    table = torch.cat(rows) if rows else torch.empty(0, tower.tokens, tower.dim, dtype=dtype)
    if store and distinct.new and world.keeper:
        store.save(dict(zip(distinct.place, rows, strict=True)), max_bytes=plan.max_bytes)
    return FeatureCache(table, distinct.number, [0, *accumulate(len(row) for row in rows)])


@dataclass
class _Batch:
    """Pictures that go through the tower together: digests, numbers of crops, and where the picture is."""

    digests: list[str] = field(default_factory=list)
    crops: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)


class _Distinct:
    """Goes through pictures once, gives equal ones one place, and puts those whose features are not known in batches.

    Attributes:
        number: key -> place. place: digest -> place. rows: (C, N, D) at each place. new: some were not known.
    """

    def __init__(
        self,
        pictures: Iterable[tuple[Hashable, Image]],
        preparation: ImagePreparation,
        *,
        known: Mapping[str, torch.Tensor],
    ) -> None:
        self._pictures, self._preparation, self._known = pictures, preparation, known
        self.number: dict[Hashable, int] = {}
        self.place: dict[str, int] = {}
        self.rows: list[torch.Tensor] = []
        self.new = False

    def batches(self, crops: int) -> Iterator[_Batch]:
        """Batches of at least so many crops, and the rest. Raises ImageError."""
        batch = _Batch()
        for key, image in self._pictures:
            # By key first, which is cheap (a path); by contents then, which needs the bytes.
            if key in self.number:
                continue
            digest = image_digest(image, remedy="check the path and data.train.N.image_root")
            if digest not in self.place:
                self.place[digest] = len(self.rows)
                # A place at once, filled by `take`: a picture that comes again before its batch is computed finds it.
                self.rows.append(self._known.get(digest, torch.empty(0)))
                if digest not in self._known:
                    self.new = True
                    batch.digests.append(digest)
                    batch.crops.append(self._preparation.spread(image).crops)
                    batch.images.append(image)
            self.number[key] = self.place[digest]
            if sum(batch.crops) >= crops:
                yield batch
                batch = _Batch()
        if batch.digests:
            yield batch

    def take(self, batch: _Batch, features: torch.Tensor) -> None:
        """Keep the (sum of crops, N, D) features of a batch."""
        for digest, seen in zip(batch.digests, features.split(batch.crops), strict=True):
            self.rows[self.place[digest]] = seen


def _compute(tower: VisionTower, batch: _Batch, preparation: ImagePreparation) -> torch.Tensor:
    """(sum of crops, N, D). Raises ImageError."""
    pixels = []
    spreads = [preparation.spread(image) for image in batch.images]
    for image, crops in zip(batch.images, batch.crops, strict=True):
        found = preparation.pixels(image)
        if len(found) != crops:
            where = image.source if isinstance(image.source, str) else "a picture"
            raise ImageError(
                f"decodes to {len(found)} tiles, its header told {crops}",
                where=where,
                remedy="write the picture again without EXIF rotation",
            )
        pixels.append(found)
    seen = torch.cat(pixels).to(next(tower.parameters()).device)
    return tower(seen, grids_of(spreads)).cpu().contiguous()


def _check_same(world: World, digests: Sequence[str]) -> None:
    mine = _checksum(" ".join(digests))
    if any(theirs != [mine] for theirs in world.gather(mine)):
        raise ConfigError(
            "ranks do not see the same pictures",
            where="data.train",
            remedy="every node needs the same files under the same paths; copy them, or use a shared folder",
        )


def _checksum(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class _Store:
    """Features on disk, in a folder named after the tower: `index.json` names the file that holds them, and which.

    Runs may share the folder, also at once: a file of features never changes under its name, and the index is replaced
    as a whole. Of two runs that write at the same time one is kept; the other's features are computed again next time.
    """

    def __init__(self, folder: Path, tower: VisionTower, preparation: ImagePreparation, dtype: torch.dtype) -> None:
        # Everything that decides a bit: weights and constants, how a picture is prepared, code of the user's own.
        key = json.dumps([tower.fingerprint(), asdict(preparation), *tower.own_code], sort_keys=True)
        self.folder = folder / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.shape, self.dtype = (tower.tokens, tower.dim), dtype

    def load(self, world: World) -> dict[str, torch.Tensor]:
        """What was kept, where every rank finds the same: nodes that share no folder may have lost it one by one."""
        known = self._read()
        mine = _checksum(json.dumps({digest: len(rows) for digest, rows in known.items()}))
        return known if all(theirs == [mine] for theirs in world.gather(mine)) else {}

    def _read(self) -> dict[str, torch.Tensor]:
        index = self._index()
        crops: dict[str, int] = index.get("crops", {})
        try:
            raw = np.fromfile(self.folder / index.get("file", ""), dtype=DISK_TYPES[self.dtype])
        except OSError:  # nothing is there yet, or another run has just put a newer file in its place
            return {}
        count = sum(crops.values())
        if raw.size != count * self.shape[0] * self.shape[1]:
            return {}
        rows = torch.from_numpy(raw).view(self.dtype).view(count, *self.shape)
        return dict(zip(crops, rows.split(list(crops.values())), strict=True))

    def _index(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / "index.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and {"file", "crops"} <= found.keys() else {}

    def save(self, rows: Mapping[str, torch.Tensor], *, max_bytes: int) -> None:
        """Write these features beside those that other runs kept, as far as all of them take no more than `max_bytes`.

        Features first, the index last, then the file that it named before is removed; nodes that share the folder
        write the same at once.
        """
        others = {digest: kept for digest, kept in self._read().items() if digest not in rows}
        size = sum(kept.nbytes for part in (others, rows) for kept in part.values())
        every = {**others, **rows} if size <= max_bytes else dict(rows)
        crops = {digest: len(kept) for digest, kept in every.items()}
        table = torch.cat(list(every.values()))
        # numpy has no bfloat16: its bits travel as integers.
        numbers = table.view(torch.int16) if table.dtype == torch.bfloat16 else table
        # Named by what is in it, so that a reader of the old index never finds a file of other contents under its name.
        before, name = self._index().get("file"), f"features-{_checksum(json.dumps(crops)):014x}.bin"
        with whole_file(self.folder / name) as file:
            file.write(numbers.contiguous().numpy().data)
        write_atomic(self.folder / "index.json", json.dumps({"file": name, "crops": crops}))
        if before not in (None, name):
            (self.folder / str(before)).unlink(missing_ok=True)
