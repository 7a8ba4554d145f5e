"""Boxes and points: written into the text where it says <bbox>, read where the text has them, or refused.

The layout is ms-swift's: "<ref-object>" and "<bbox>" in the text, and beside it `objects: {"ref": [...], "bbox":
[[x1, y1, x2, y2] or [x, y]], "bbox_type": "real" | "norm1", "image_id": [...]}`, or a list of objects of one box each
("caption", "bbox", "bbox_type", "image"). The keys bbox, bboxes, boxes, box, points and point hold boxes likewise, one
or a list. They become text, "[x1, y1, x2, y2]", in shares of the upright picture (norm1: 0.000 to 1.000, norm1000: 0 to
1000), or what a family of models was trained on, with its control tokens (TOKENS); a tokenizer without them refuses the
record later. Pixels are read and never written: a model sees the picture at another size. Boxes that the text itself
has, as <box>(x1,y1),(x2,y2)</box>, are read as such where the option `boxes` is given or the format defines them.

Shares hold for every preparation that keeps the whole picture; of a padded one they are shares of the picture, not of
the padding. One that cuts (fit crop) refuses records with boxes, which WRITTEN in their meta marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmit.data.images import image_size
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Part, Record, Text, Turn, short

OPTIONS = {
    "boxes": "how boxes are written into the text: as numbers (norm1, norm1000) or with tokens (qwen2_vl, qwen_vl, "
    "internvl); without it rows with boxes are refused",
    "boxes_in": "what the file's numbers are: pixels, norm1 or norm1000; objects may say it by bbox_type",
}
WRITTEN = "boxes_written"
PLACE, NAME = "<bbox>", "<ref-object>"
_PLACES = re.compile(f"({PLACE}|{NAME})")
# Layouts with control tokens: of a box, of the name of what is in it.
_QWEN2, _QWEN = ("<|box_start|>", "<|box_end|>"), ("<box>", "</box>")
_REF2, _REF = ("<|object_ref_start|>", "<|object_ref_end|>"), ("<ref>", "</ref>")
TOKENS = {"qwen2_vl": (_QWEN2, _REF2), "qwen_vl": (_QWEN, _REF), "internvl": (_QWEN, _REF)}
WAYS = ("norm1", "norm1000", *TOKENS)
# Boxes in a text, always of 0 to 1000: Qwen's (x1,y1),(x2,y2) or (x,y); InternVL's [[x1, y1, x2, y2], ...].
_PAIR = r"\(\s*\d+\s*,\s*\d+\s*\)"
_FOUR = r"\[\s*\d+\s*(?:,\s*\d+\s*){3}\]"
_BOX = rf"(?:{_PAIR}(?:\s*,\s*{_PAIR})?|\[\s*{_FOUR}(?:\s*,\s*{_FOUR})*\s*\])"
_SPELT = re.compile(
    rf"(?:<ref>([^<>\n]*)</ref>|<\|object_ref_start\|>([^<>\n]*)<\|object_ref_end\|>)?"
    rf"(?:<box>\s*({_BOX})\s*</box>|<\|box_start\|>\s*({_BOX})\s*<\|box_end\|>)"
)
# Sure names of boxes, whatever they hold; the others are read as boxes if they hold lists of 2 or 4 numbers.
_SURE, _MAYBE = ("bbox", "bboxes", "bbox_2d"), ("boxes", "box", "points", "point")
_OF_ONE = ("bbox", "bbox_2d", "box", "box_2d")  # keys of a box in a list of objects
_UNITS = {"pixels": None, "norm1": 1, "norm1000": 1000}
_TYPES = {"real": "pixels", "norm1": "norm1", "norm1000": "norm1000", "norm_1": "norm1", "norm_1000": "norm1000"}
Box = tuple[float, ...]


def with_boxes(record: Record, *, boxes: str | None = None, boxes_in: str | None = None) -> Record:
    """Write the boxes that the record's meta holds into its text.

    Args:
        boxes, boxes_in: see OPTIONS.

    Raises:
        ConfigError: another value of these. RecordError: boxes that have no place, no unit or no picture.
    """
    check_options(boxes, boxes_in)
    if boxes is not None:
        record = _read_spelt(record)
    held = {key: told for key, value in record.meta.items() if (told := _held(key, value)) is not None}
    if not held:
        return record
    if len(held) > 1:
        raise RecordError(f"boxes stand in {' and '.join(held)}", remedy="Keep one of these keys.")
    key, objects = next(iter(held.items()))
    found = [_box(value, key) for value in objects["bbox"]]
    names = objects.get("ref") or []
    how = _check_places(record, key, found, names, boxes)
    unit = _unit(key, objects, boxes_in)
    sizes = _sizes(record, key, objects, len(found)) if unit == "pixels" else [(1, 1)] * len(found)
    shares = [_shares(box, unit, size, key) for box, size in zip(found, sizes, strict=True)]
    # Iterators over the whole record: boxes are given in the order of their places, thoughts before texts in each turn.
    written = {PLACE: iter([_written(share, how) for share in shares]), NAME: iter(names)}
    turns = tuple(_filled_turn(turn, written, how) for turn in record.turns)
    meta = {name: value for name, value in record.meta.items() if name != key} | {WRITTEN: how}
    return replace(record, turns=turns, meta=meta)


def _check_places(record: Record, key: str, found: Sequence[Box], names: Any, boxes: str | None) -> str:
    """Refuse boxes that have no place of their own in the text, or no way to be written; returns that way."""
    if record.rejected is not None and _PLACES.search(record.rejected.text):
        problem = "the rejected answer has a place for a box, and which box it is cannot be told"
        raise RecordError(problem, remedy="Write the boxes of compared answers as text.")
    texts = [text for turn in record.turns for text in (turn.thinking or "", turn.text)]
    marks = [mark for text in texts for mark in _PLACES.findall(text)]
    if PLACE not in marks:
        remedy = f"Write {PLACE} where each belongs, or remove the key if they are not to be learnt."
        raise RecordError(f"'{key}' holds {_count(found)}, and the text no {PLACE}", remedy=remedy)
    if boxes is None:
        remedy = (
            f"Give the option boxes={', '.join(WAYS[:-1])} or {WAYS[-1]} (--option of `mmit data import` and "
            "`mmit data index`, or `options` of a source), or remove the key."
        )
        raise RecordError(f"'{key}' holds {_count(found)}, and nothing says how to write them", remedy=remedy)
    for mark, items in ((PLACE, found), (NAME, names)):
        if not isinstance(items, list) or marks.count(mark) != len(items):
            count = len(items) if isinstance(items, list) else 0
            problem = f"the text has {marks.count(mark)} {mark}, and '{key}' {count} of them"
            raise RecordError(problem, remedy=f"Write one {mark} for each.")
    if bad := [name for name in names if not isinstance(name, str)]:
        raise RecordError(f"ref of '{key}' holds '{short(bad[0])}', not text", remedy="Write it as a JSON string.")
    return boxes


def _filled_turn(turn: Turn, written: Mapping[str, Iterator[str]], boxes: str) -> Turn:
    """A turn with names and boxes in their places."""
    thinking = turn.thinking
    if thinking is not None and _PLACES.search(thinking):
        if boxes in TOKENS:
            remedy = "Give boxes=norm1000 or norm1, which write numbers alone, or keep boxes out of thoughts."
            raise RecordError("a thought has a box, and its tokens stand in text alone", remedy=remedy)
        thinking = "".join(text for text, _ in _filled(thinking, written, boxes))
    parts: list[Part] = []
    for part in turn.parts:
        if isinstance(part, Image) or part.token or not _PLACES.search(part.text):
            parts.append(part)
        else:
            parts += [replace(part, text=text, token=own) for text, own in _filled(part.text, written, boxes)]
    return replace(turn, thinking=thinking, parts=tuple(parts))


def spelt(shares: Box) -> str:
    """Return a box (left, top, right, bottom), in shares of the image, as letters that `with_boxes` reads."""
    return f"{_QWEN[0]}{_written(shares, 'qwen_vl')}{_QWEN[1]}"


def spelt_box(record: Record) -> str:
    """Return the first box that a text of a record has as letters, "" if none does."""
    for turn in record.turns:
        for text in (turn.thinking or "", *(part.text for part in turn.parts if isinstance(part, Text))):
            if "box" in text and (found := _SPELT.search(text)):
                return found.group()
    return ""


def refuse_spelt(record: Record) -> None:
    """Raise RecordError for boxes in the text of a format that defines them."""
    # Letters would be learned as letters: of another family's coordinates, which this model was never taught, or in
    # pixels of a size it never sees.
    if found := spelt_box(record):
        remedy = f"Give the option boxes={', '.join(WAYS[:-1])} or {WAYS[-1]}: the model's own tokens, or numbers."
        raise RecordError(f"the text has the box {short(found, 60)}, and nothing says how to write it", remedy=remedy)


def _read_spelt(record: Record) -> Record:
    """Take the boxes out of the texts: <bbox> and <ref-object> in their places, the numbers in `objects`."""
    if not spelt_box(record):
        return record
    if beside := [key for key, value in record.meta.items() if _held(key, value) is not None]:
        problem = f"boxes stand in the text and in '{beside[0]}'"
        raise RecordError(problem, remedy="Keep one of them.")
    boxes: list[list[int]] = []
    names: list[str] = []

    def taken(found: re.Match[str]) -> str:
        numbers = [int(n) for n in re.findall(r"\d+", found[3] or found[4])]
        # A mark may hold a point, of two numbers, or several boxes of four.
        step = 2 if len(numbers) == 2 else 4
        new = [numbers[at : at + step] for at in range(0, len(numbers), step)]
        boxes.extend(new)
        name = found[2] if found[1] is None else found[1]
        if name is not None:
            names.append(name)
        return (NAME if name is not None else "") + PLACE * len(new)

    turns = []
    for turn in record.turns:
        thinking = None if turn.thinking is None else _SPELT.sub(taken, turn.thinking)
        parts = [
            p if isinstance(p, Image) or p.token else replace(p, text=_SPELT.sub(taken, p.text)) for p in turn.parts
        ]
        turns.append(replace(turn, thinking=thinking, parts=tuple(parts)))
    # From here on as if the row had stated them beside the text: one path writes boxes, however they came.
    held = {"bbox": boxes, "ref": names, "bbox_type": "norm1000", "image_id": [0] * len(boxes)}
    return replace(record, turns=tuple(turns), meta={**record.meta, "objects": held})


def _filled(text: str, written: Mapping[str, Iterator[str]], boxes: str) -> list[tuple[str, bool]]:
    """Put names and boxes into their places: (text, whether it is a control token) pairs."""
    pairs: list[tuple[str, bool]] = []
    for part in _PLACES.split(text):
        if part not in written:
            pairs.append((part, False))
            continue
        opening, closing = TOKENS[boxes][part == NAME] if boxes in TOKENS else ("", "")
        pairs += [(opening, True), (next(written[part]), False), (closing, True)]
    # Numbers alone stay one text, so that a row is tokenised the same whether its boxes were text before or not.
    if boxes not in TOKENS:
        return [("".join(part for part, _ in pairs), False)]
    return [(part, own) for part, own in pairs if part]


def check_options(boxes: Any = None, boxes_in: Any = None) -> None:
    """Raise ConfigError for a value that is none of OPTIONS."""
    if boxes == "pixels":
        remedy = "A model sees the picture at another size: write norm1 or norm1000; boxes_in=pixels reads pixels."
        raise ConfigError("option boxes is 'pixels'", remedy=remedy)
    for name, value, valid in (("boxes", boxes, WAYS), ("boxes_in", boxes_in, tuple(_UNITS))):
        if value is not None and value not in valid:
            raise ConfigError(f"option {name} is '{short(value)}'", remedy=nearest(str(value), valid))


def holds_boxes(key: str, value: Any) -> bool:
    """Tell whether a key and its value are boxes or points."""
    try:
        return _held(key, value) is not None
    except RecordError:
        # Wrong boxes are boxes: whoever asks keeps the row from being learned as plain text, and the error is raised
        # where it is read.
        return True


def _held(key: str, value: Any) -> dict[str, Any] | None:
    """Return {"bbox": [...], ...} of a key that holds boxes, None of any other."""
    if key not in (*_SURE, *_MAYBE, "objects") or value is None or value in ("", [], {}):
        return None
    if isinstance(value, str):  # a cell of a table
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {"bbox": [value]} if key in _SURE else None
    if key == "objects":
        if isinstance(value, list) and any(isinstance(item, Mapping) and _one(item) is not None for item in value):
            value = _columns(value)
        if not isinstance(value, Mapping) or not value.get("bbox"):
            return None
        boxes = value["bbox"]
        return {**value, "bbox": [boxes] if _numbers(boxes) or not isinstance(boxes, list) else boxes}
    # One box may stand without the list around it.
    items = value if isinstance(value, list) and value and not _numbers(value) else [value]
    items = [[p["x"], p["y"]] if isinstance(p, Mapping) and p.keys() >= {"x", "y"} else p for p in items]
    # A name such as `points` may as well be a score: it holds boxes only where every value has the shape of one.
    return {"bbox": items} if key in _SURE or all(_numbers(item, (2, 4)) for item in items) else None


def _columns(items: list[Any]) -> dict[str, Any]:
    """Turn ms-swift's older [{"caption", "bbox", "bbox_type", "image"}, ...] into its newer object of lists."""
    example = '[{"caption": "...", "bbox": [x1, y1, x2, y2], "bbox_type": "real", "image": 0}]'
    if bad := [item for item in items if not isinstance(item, Mapping) or _one(item) is None]:
        problem = f"'objects' holds '{short(bad[0])}', which has no bbox"
        raise RecordError(problem, remedy=f"Write objects as {example}.")
    types = [item.get("bbox_type") for item in items]
    # The newer layout has one type for all of a row. Converting some of them here would change numbers that nobody
    # asked to change.
    if any(kind != types[0] for kind in types):
        problem = f"'objects' holds boxes of several types: {short(types)}"
        raise RecordError(problem, remedy="Give all boxes of a row the same bbox_type.")
    found: dict[str, Any] = {"bbox": [_one(item) for item in items], "bbox_type": types[0]}
    for ours, theirs in (("ref", ("caption", "ref", "label")), ("image_id", ("image", "image_id"))):
        values = [next((item[name] for name in theirs if item.get(name) is not None), None) for item in items]
        if any(value is not None for value in values):
            found[ours] = values
    return found


def _one(item: Mapping[str, Any]) -> Any:
    """The box of one object, under any of its names."""
    return next((item[key] for key in _OF_ONE if item.get(key) is not None), None)


def _numbers(value: Any, lengths: Sequence[int] = ()) -> bool:
    if not isinstance(value, (list, tuple)) or not value or (lengths and len(value) not in lengths):
        return False
    return all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value)


def _box(value: Any, key: str) -> Box:
    if not _numbers(value, (2, 4)):
        problem = f"'{key}' holds '{short(value)}', which is no box and no point"
        raise RecordError(problem, remedy="Write [x1, y1, x2, y2], or [x, y].")
    # COCO's [left, top, width, height] has the same shape. It cannot be told apart where the numbers happen to grow, so
    # the remedy says which layout is meant.
    if len(value) == 4 and not (value[0] <= value[2] and value[1] <= value[3]):
        problem = f"'{key}' holds {short(value)}, whose second corner lies left of the first or above it"
        raise RecordError(problem, remedy="Write [x1, y1, x2, y2]: left, top, right, bottom; no widths.")
    return tuple(float(n) for n in value)


def _unit(key: str, objects: Mapping[str, Any], given: str | None) -> str:
    # ms-swift's default is pixels, but only for its own key `objects`; elsewhere a guess would scale boxes wrongly
    # without a trace.
    stated = objects.get("bbox_type") or ("real" if key == "objects" and given is None else None)
    if stated is not None and stated not in _TYPES:
        remedy = f"Write one of {', '.join(_TYPES)}."
        raise RecordError(f"bbox_type of '{key}' is '{short(stated)}'", remedy=remedy)
    unit = _TYPES[stated] if stated is not None else given
    if unit is None:
        remedy = "Say it with the option boxes_in: pixels, norm1 or norm1000."
        raise RecordError(f"nothing says what the numbers of '{key}' are", remedy=remedy)
    if given not in (None, unit):
        remedy = "Leave the option out, or correct the row."
        raise RecordError(f"bbox_type of '{key}' is '{stated}', and the option boxes_in {given}", remedy=remedy)
    return unit


def _sizes(record: Record, key: str, objects: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
    """The (width, height) of each box's picture, from the picture's header."""
    which = objects.get("image_id") or ([0] * count if len(record.images) == 1 else [])
    if len(which) != count or not all(isinstance(n, int) and 0 <= n < len(record.images) for n in which):
        problem = f"'{key}' does not say in which of the row's {len(record.images)} pictures its boxes are"
        raise RecordError(problem, remedy='Write objects with "image_id": a number from 0 for each box.')
    return [record.images[n].size or image_size(record.images[n]) for n in which]


def _shares(box: Box, unit: str, size: tuple[int, int], key: str) -> Box:
    """Coordinates as shares of width and height."""
    whole = [float(_UNITS[unit] or size[at % 2]) for at in range(len(box))]
    shares = tuple(n / w for n, w in zip(box, whole, strict=True))
    shown = f"a picture of {size[0]} x {size[1]} pixels" if unit == "pixels" else f"0 to {_UNITS[unit]}"
    if not all(0 <= n <= 1 for n in shares):
        problem = f"'{key}' holds {short(list(box))}, which lies outside {shown}"
        raise RecordError(problem, remedy="Correct the box, or say what its numbers are with the option boxes_in.")
    # Shares that are read as pixels all lie in the upper left corner of the picture, inside every limit: nothing else
    # would notice.
    if unit != "norm1" and all(n <= 1 for n in box) and any(0 < n < 1 for n in box):
        problem = f"'{key}' holds {short(list(box))}, which are shares and no {unit}"
        raise RecordError(problem, remedy="Say what its numbers are with bbox_type or the option boxes_in.")
    return shares


def _written(shares: Box, how: str) -> str:
    texts = [f"{n:.3f}" if how == "norm1" else str(round(n * 1000)) for n in shares]
    if how in ("qwen2_vl", "qwen_vl"):
        return ",".join(f"({x},{y})" for x, y in zip(texts[::2], texts[1::2], strict=True))
    return f"[{', '.join(texts)}]" if how != "internvl" else f"[[{', '.join(texts)}]]"


def _count(boxes: Sequence[Box]) -> str:
    return f"{len(boxes)} box{'' if len(boxes) == 1 else 'es'}"
