"""Scenes: what captions and boxes say of an image, for a teacher that does not see it.

In: rows as in LLaVA's caps_boxes files (`captions`, `instances: [{category, bbox}]`), rows of a package whose image has
one box, or mmit records whose meta holds `captions` and `boxes` or `objects`. Out: scenes whose boxes are shares of the
image, or the reason why a row is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmit.build.annotated import Dropped
from mmit.build.rows import NO_IMAGE
from mmit.data.images import image_size
from mmit.errors import ConfigError, ImageError, RecordError, nearest
from mmit.records import Image, Record, read_jsonl

MISSING = "the image file is missing"
FIELDS = {"image": "image", "captions": "captions", "boxes": "instances", "box": "box", "category": "category"}
_NAMES = ("category", "label", "ref", "name", "caption")


@dataclass(frozen=True)
class Box:
    """One object: its name, and left, top, right, bottom as shares of the image, each from 0 to 1."""

    name: str
    at: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """An image and what is known of it; `facts` are attributes that answers can be checked against."""

    id: str
    image: Image
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]
    facts: Mapping[str, str]
    source: str
    row: int | None
    licence: str | None


def scenes_of_rows(
    rows: Iterable[tuple[int, dict[str, Any] | RecordError]],
    fields: Mapping[str, Any],
    *,
    source: str,
    licence: str | None,
    facts: Sequence[str] = (),
) -> Iterator[Scene | Dropped]:
    """Yield the scenes of rows.

    Args:
        fields: names of the fields of `image`, `captions`, `boxes`, `box` (one box) and `category` (its name, or a list
            of fields that make it).
        facts: fields that hold attributes of the image.

    Raises:
        ConfigError: the first row lacks a field that is named.
    """
    names: dict[str, Any] = FIELDS | dict(fields)
    known = False
    for number, row in rows:
        if isinstance(row, RecordError):
            gone = row.problem.startswith(NO_IMAGE)
            yield _dropped(source, number, MISSING if gone else "the row cannot be read", row.problem)
            continue
        if not known:
            for name in [names["image"], *(v for v in fields.values() if isinstance(v, str)), *facts]:
                if name not in row:
                    raise ConfigError(
                        f"the rows have no field '{name}'", where="fields", remedy=nearest(name, list(row))
                    )
            known = True
        held = {key: row.get(names[key]) for key in ("image", "captions", "boxes")}
        if held["boxes"] is None and row.get(names["box"]) is not None:
            parts = names["category"] if isinstance(names["category"], list) else [names["category"]]
            called = " ".join(str(row[part]) for part in parts if row.get(part))
            held["boxes"] = [{"category": called, "bbox": row[names["box"]]}]
        facts_ = {name: str(row[name]) for name in facts if row.get(name) is not None}
        own = row.get("licence") if isinstance(row.get("licence"), str) else licence
        place = (str(row.get("id", number)), source, number, own)
        yield _scene(held["image"], held["captions"], held["boxes"], facts_, place)


def scenes_of_records(path: str, *, facts: Sequence[str] = ()) -> Iterator[Scene | Dropped]:
    """Yield the scenes of records: the first image, and what meta says of it."""
    bad: list[RecordError] = []
    for record in read_jsonl(path, on_bad=bad.append):
        yield _of_record(record, facts)
    for error in bad:
        yield Dropped("conversations", error.where, "", "the row cannot be read", error.problem)


def _of_record(record: Record, facts: Sequence[str]) -> Scene | Dropped:
    boxes = record.meta.get("boxes") or record.meta.get("instances")
    objects = record.meta.get("objects")
    if boxes is None and isinstance(objects, Mapping):  # ms-swift's columns
        pairs = zip(objects.get("ref") or [], objects.get("bbox") or [], strict=False)
        boxes = [{"ref": name, "bbox": box} for name, box in pairs]
    facts_ = {name: str(record.meta[name]) for name in facts if record.meta.get(name) is not None}
    image = next(iter(record.images), None)
    place = (record.id or str(record.row), record.source, record.row, record.licence)
    return _scene(image, record.meta.get("captions"), boxes if boxes is not None else objects, facts_, place)


def _scene(
    image: Any, captions: Any, boxes: Any, facts: Mapping[str, str], place: tuple[str, str, int | None, str | None]
) -> Scene | Dropped:
    name, source, number, licence = place
    if not isinstance(image, Image):
        return _dropped(source, number, "the row has no image", repr(image))
    if isinstance(image.source, str) and not os.path.isfile(image.source):
        return _dropped(source, number, MISSING, image.source)
    texts = [captions] if isinstance(captions, str) else list(captions or [])
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return _dropped(source, number, "a caption is no text", repr(captions))
    try:
        found = tuple(_box(box, image) for box in boxes or ())
    except (RecordError, ImageError) as error:
        return _dropped(source, number, error.problem, repr(boxes))
    if not texts and not found:
        return _dropped(source, number, "neither captions nor boxes", "")
    return Scene(name, image, tuple(" ".join(t.split()) for t in texts), found, facts, source, number, licence)


def _box(box: Any, image: Image) -> Box:
    name = next((box[key] for key in _NAMES if box.get(key)), None) if isinstance(box, Mapping) else None
    at = box.get("bbox", box.get("box")) if isinstance(box, Mapping) else None
    numbers = isinstance(at, (list, tuple)) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in at
    )
    if not isinstance(name, str) or not isinstance(at, (list, tuple)) or not numbers or len(at) != 4:
        raise RecordError("a box is not {category, bbox: [left, top, right, bottom]}")
    if max(at) > 1:  # pixels
        width, height = image_size(image)
        at = [at[0] / width, at[1] / height, at[2] / width, at[3] / height]
    left, top, right, bottom = (float(value) for value in at)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise RecordError("a box lies outside the image or is empty")
    return Box(name, (left, top, right, bottom))


def _dropped(source: str, row: int | None, reason: str, text: str) -> Dropped:
    return Dropped("conversations", f"{source}:{row}", "", reason, text[:500])
