"""Near duplicates: texts that share most of their word triples, pictures that look alike.

Texts: MinHash (Broder 1997) of the 3-word shingles, 64 functions in 16 bands of 4; two texts are near duplicates if
at least 80 % of their signatures agree, an estimate of the Jaccard similarity with a standard error of 5 points.
Pictures: difference hash of 64 bits and an 8 x 8 colour thumbnail; near duplicates differ in at most 4 bits, by 4 of
256 levels on average and by 24 anywhere, which scaling and JPEG survive and a flip, a crop or a turn does not. Takes
texts and PIL pictures, gives pairs of rows that were compared with each other, never chains of such; keeps 256 bytes
per text. Decides nothing about what to do with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from zlib import crc32

import numpy as np
import PIL.Image

FUNCTIONS, BANDS = 64, 16
SIMILAR = 0.8
SHINGLE = 3  # words
HASH_BITS, HASH_DISTANCE, COLOUR_MEAN, COLOUR_MAX = 64, 4, 4.0, 24
# The rows of a bucket are compared with the first few that are unlike each other: data made of one template would
# otherwise cost the square of its size. What is lost are pairs that are unlike all of those in all of their buckets.
MAX_MODELS = 64

# Words in UTF-8: a character of three or four bytes (Chinese, Japanese, Korean, emoji) is a word of its own.
_WORDS = re.compile(rb"[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|[a-z0-9\x80-\xdf]+")
_BATCH = 1 << 14  # shingles hashed at once
_rng = np.random.default_rng(20040915)
_FACTOR = _rng.integers(0, 1 << 63, FUNCTIONS, dtype=np.uint64) * 2 + 1
_OFFSET = _rng.integers(0, 1 << 63, FUNCTIONS, dtype=np.uint64)
_MIX = [np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]

Pairs = dict[int, int]  # row -> the first row it is nearly the same as
Same = Callable[[int, np.ndarray], np.ndarray]


class TextSignatures:
    """Collects MinHash signatures of texts, many at a time.

    `key` of `add` sets texts apart that must never be near duplicates of each other, such as questions about
    different pictures.
    """

    def __init__(self) -> None:
        self._done: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []
        self._size = 0
        self._keys: list[int] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, text: str, *, key: int = 0) -> None:
        """Take the next text."""
        found = shingles(text)
        self._waiting.append(found)
        self._keys.append(key & 0xFFFFFFFFFFFFFFFF)
        self._size += len(found)
        if self._size >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._done.append(_minhash(self._waiting))
            self._waiting, self._size = [], 0

    def pairs(self, *, first: int = 0) -> Pairs:
        """Return {row: a row it is nearly the same as}, rows numbered as they were added.

        The rows from `first` on are matched before the others, so that a row like one of them names that one.
        """
        self._flush()
        if not self._done:
            return {}
        signatures = np.concatenate(self._done)
        keys = np.array(self._keys, dtype=np.uint64)
        order = np.roll(np.arange(len(keys)), len(keys) - first)
        signatures, keys = signatures[order], keys[order]

        def same(one: int, others: np.ndarray) -> np.ndarray:
            agree: np.ndarray = (signatures[others] == signatures[one]).mean(axis=1) >= SIMILAR
            agree &= keys[others] == keys[one]
            return agree

        found: Pairs = {}
        width = FUNCTIONS // BANDS
        for band in range(BANDS):
            columns = signatures[:, band * width : (band + 1) * width].astype(np.uint64)
            code = keys.copy()
            for column in range(width):
                code = (code ^ columns[:, column]) * _MIX[column % 3] + np.uint64(column)
                code ^= code >> np.uint64(29)
            _match(code, same, found)
        return {int(order[row]): int(order[model]) for row, model in found.items()}


def shingles(text: str) -> np.ndarray:
    """Return the distinct hashes, (n,) uint64, of every three neighbouring words; of a shorter text, one hash."""
    words = _WORDS.findall(text.lower().encode("utf-8", "replace"))
    codes = np.fromiter(map(crc32, words), dtype=np.uint64, count=len(words))
    if len(codes) < SHINGLE:
        # A text of one or two words is alike only to itself, and one without any (such as "?!") by its characters.
        return np.array([crc32(b" ".join(words) or text.encode("utf-8", "replace"))], dtype=np.uint64)
    mixed: np.ndarray = codes[:-2] * _MIX[0] ^ codes[1:-1] * _MIX[1] ^ codes[2:] * _MIX[2]
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _minhash(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Return (number of texts, FUNCTIONS) uint32: the smallest value of each hash function over the shingles."""
    starts = np.cumsum([0] + [len(text) for text in texts[:-1]])
    values = np.concatenate(texts)
    out = np.empty((len(texts), FUNCTIONS), dtype=np.uint32)
    for number in range(FUNCTIONS):
        # Multiply-shift (Dietzfelbinger 1997): the high half of a product modulo 2^64.
        hashed = ((values * _FACTOR[number] + _OFFSET[number]) >> np.uint64(32)).astype(np.uint32)
        out[:, number] = np.minimum.reduceat(hashed, starts)
    return out


def picture_hash(picture: PIL.Image.Image) -> tuple[int, bytes]:
    """Return the difference hash (is each pixel of a 9 x 8 grey picture darker than its right neighbour?) and the
    8 x 8 RGB thumbnail, 192 bytes, of an RGB picture.
    """
    grey = np.asarray(picture.convert("L").resize((9, 8), PIL.Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes()
    thumbnail = picture.resize((8, 8), PIL.Image.Resampling.BOX).tobytes()
    return int.from_bytes(bits, "big"), thumbnail


def similar_pictures(hashes: Sequence[tuple[int, bytes]]) -> Pairs:
    """Return {position: the first position it looks like} of what `picture_hash` gave."""
    if not hashes:
        return {}
    codes = np.array([code for code, _ in hashes], dtype=np.uint64)
    colours = np.frombuffer(b"".join(thumbnail for _, thumbnail in hashes), np.uint8).reshape(len(hashes), -1)

    def same(one: int, others: np.ndarray) -> np.ndarray:
        differing = np.unpackbits((codes[others] ^ codes[one]).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
        alike: np.ndarray = differing <= HASH_DISTANCE
        # Small things on a plain ground hardly change the hash, nor the mean: the largest difference tells them.
        apart = np.abs(colours[others[alike]].astype(np.int16) - colours[one])
        alike[alike] = (apart.mean(axis=1) <= COLOUR_MEAN) & (apart.max(axis=1) <= COLOUR_MAX)
        return alike

    found: Pairs = {}
    # At most 4 differing bits leave at least one of five parts of the hash untouched.
    parts = HASH_DISTANCE + 1
    width = -(-HASH_BITS // parts)
    for part in range(parts):
        mask = np.uint64((1 << width) - 1)
        _match((codes >> np.uint64(part * width)) & mask, same, found)
    return found


def _match(codes: np.ndarray, same: Same, found: Pairs) -> None:
    """Note in `found` which rows of equal code `same(row, rows) -> (n,) bool` confirms, the earliest match of each."""
    for rows in _buckets(codes):
        for _ in range(MAX_MODELS):
            if len(rows) < 2:
                break
            model, rest = int(rows[0]), rows[1:]
            alike = same(model, rest)
            for row in rest[alike].tolist():
                found[row] = min(model, found.get(row, model))
            rows = rest[~alike]


def _buckets(codes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ascending rows of every code that occurs twice or more."""
    order = np.argsort(codes, kind="stable")
    edges = np.flatnonzero(np.diff(codes[order])) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
    for number in np.flatnonzero(ends - starts > 1).tolist():
        yield order[starts[number] : ends[number]]
