"""The linter's rules about pictures: missing, unreadable, not what they say, the same again, seen in the test data.

Takes records, hands findings to a callback. Without `open_images` a picture is known by its path, or by the hash of
bytes that are in the record; with it every different picture is decoded once and compared by content, too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

from mmit.data.image_identity import image_name
from mmit.data.images import image_size, load_rgb
from mmit.data.lint.near_duplicates import picture_hash, similar_pictures
from mmit.errors import ImageError
from mmit.records import Image, Record, short

Add = Callable[[str, str, str], None]

_MAGIC = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WEBP"}
_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".bmp": "BMP", ".webp": "WEBP"}


class _Seen(NamedTuple):
    """A picture that was opened."""

    name: str
    where: str  # its first record
    test: bool
    digest: str
    looks: tuple[int, bytes]


class ImageChecks:
    """Looks at the pictures of records, each different one once; `compare` tells what only shows between them."""

    def __init__(self, add: Add, *, open_images: bool) -> None:
        self._add, self._open = add, open_images
        self._train: dict[str, str] = {}  # picture -> where it was first met
        self._test: dict[str, str] = {}
        self._seen: list[_Seen] = []
        self._bad: dict[str, tuple[str, str]] = {}

    def take(self, record: Record, *, test: bool) -> None:
        """Check a record's pictures; those of the test data are only kept for comparison."""
        known = self._test if test else self._train
        for image in record.images:
            name = image_name(image)
            if name not in known:
                known[name] = record.where
                problem = self._look(image, name, record.where, test=test)
                if problem[0]:
                    # Kept under the picture: it is decoded once, however many records show it.
                    self._bad[name] = problem
            if name in self._bad and not test:
                # Every record that shows it is unusable, so every one is told.
                self._add(self._bad[name][0], record.where, self._bad[name][1])
        if self._open and not test and len(record.images) == 1:
            self._check_stated_size(record)

    def _look(self, image: Image, name: str, where: str, *, test: bool) -> tuple[str, str]:
        path = image.source if isinstance(image.source, str) else ""
        if path and not os.path.isfile(path):
            return "missing-image", short(path, 120)
        if not self._open:
            return "", ""
        try:
            picture = load_rgb(image)
            data = _encoded(image)
        except ImageError as error:
            return "unreadable-image", f"{error.where}: {error.problem}"
        except OSError as error:
            return "unreadable-image", f"{short(path, 120)}: {error.strerror}"
        self._seen.append(_Seen(name, where, test, hashlib.sha256(data).hexdigest(), picture_hash(picture)))
        # Only where both are known: a name without an ending promises nothing.
        stated = _SUFFIXES.get(os.path.splitext(path)[1].lower())
        found = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
        if stated and found and stated != found and not test:
            self._add("image-mismatch", where, f"{short(path, 120)} is a {found} file")
        return "", ""

    def _check_stated_size(self, record: Record) -> None:
        """Compare with the width and height that many data sets note beside a picture."""
        stated = record.meta.get("width"), record.meta.get("height")
        if not all(isinstance(side, int) and side > 0 for side in stated):
            return
        if image_name(record.images[0]) in self._bad:
            return
        size = image_size(record.images[0], where=record.where)
        if stated not in (size, size[::-1]):  # data sets differ in whether EXIF orientation is counted in
            told = f"{stated[0]} x {stated[1]} by the row, {size[0]} x {size[1]} by the file"
            self._add("image-mismatch", record.where, told)

    def compare(self) -> None:
        """Tell pictures that occur twice, and those of the test data among the training data."""
        # By name first: what both sets name is told once, as the gravest of the findings, and left out of the
        # comparisons by content below.
        leaked = self._train.keys() & self._test.keys()
        for name in (name for name in self._train if name in leaked):
            self._add("test-image", self._train[name], f"{short(name, 120)} is also in {self._test[name]}")
        equal: dict[str, list[_Seen]] = {}
        for seen in self._seen:
            equal.setdefault(seen.digest, []).append(seen)
        for group in equal.values():
            self._tell(group, leaked, held_out="test-image", again="duplicate-image", relation="has the bytes of")
        # Of equal files one is compared, the test data's where there is one, so that nothing is told twice; those of
        # the test data first, so that they are the ones that others are like.
        models = [next((seen for seen in group if seen.test), group[0]) for group in equal.values()]
        models.sort(key=lambda seen: not seen.test)
        for place, model in similar_pictures([seen.looks for seen in models]).items():
            pair = [models[model], models[place]]
            self._tell(pair, leaked, held_out="test-image-near", again="near-duplicate-image", relation="looks like")

    def _tell(self, group: list[_Seen], leaked: set[str], *, held_out: str, again: str, relation: str) -> None:
        train = [seen for seen in group if not seen.test]
        other = next((seen for seen in group if seen.test), None)
        if other is None:
            rule, other, train = again, train[0], train[1:]
        else:
            rule = held_out
        for seen in train:
            if seen.name not in leaked:
                self._add(rule, seen.where, f"{_told(seen.name)} {relation} {_told(other.name)} of {other.where}")


def _told(name: str) -> str:
    return "its image" if name.startswith("sha256:") else short(name, 80)


def _encoded(image: Image) -> bytes:
    if isinstance(image.source, bytes):
        return image.source
    if isinstance(image.source, str):
        with open(image.source, "rb") as file:
            return file.read()
    return image.source.tobytes()
