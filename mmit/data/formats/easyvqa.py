"""The easy-VQA package (coloured shapes, 64 x 64 pixels, MIT licence) as records.

Reads the data files of the installed `easy-vqa` package without importing it, keeps its own train/test split,
and makes one record per image: all its questions in turn, or one caption derived from the answers. Never
opens a picture.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Record, Text, Turn, short

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
LICENCE = "MIT"
COLOURS = frozenset(["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"])
SHAPES = frozenset(["circle", "rectangle", "triangle"])
_REMEDY = "Install the package: pip install easy-vqa (or give package_dir, the folder that holds its data/)."


@dataclass(frozen=True, slots=True)
class _Picture:
    """One image with its questions; `row` is the position of the first in questions.json, from 1."""

    number: int
    path: str
    row: int
    pairs: list[tuple[str, str]]


def easy_vqa(split: str, package_dir: str | os.PathLike[str] | None = None) -> Iterator[Record]:
    """Return one multi-turn record per image of "train" or "test"; the image opens the first user turn.

    meta["answer_types"] gives for each question "yes/no", "shape" or "color". Raises ConfigError for another
    split, RecordError if the package is missing or its data is not as expected.
    """
    pictures = read_pictures(split, package_dir)
    return (_questions_record(split, picture) for picture in pictures)


def easy_vqa_captions(
    split: str,
    package_dir: str | os.PathLike[str] | None = None,
    *,
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[Record]:
    """Return one caption record per image: the user shows the image, the assistant says "a blue rectangle".

    The caption states what the split's own answers imply, "a blue shape" or "a rectangle" if only one fact
    is known. Images with neither are left out: each one's id goes to `on_skip`, their number to the log.
    Meant for aligning a projector on "train"; captions of "test" would leak the test's answers into training.
    Raises what `easy_vqa` does, and RecordError if answers contradict each other.
    """
    pictures = read_pictures(split, package_dir)
    return _caption_records(split, pictures, on_skip)


def _questions_record(split: str, picture: _Picture) -> Record:
    turns: list[Turn] = []
    for question, answer in picture.pairs:
        # Shown once: all questions are about the same picture, and its tokens would be run again for each.
        image = () if turns else (Image(picture.path),)
        turns += [Turn("user", (*image, Text(question))), Turn("assistant", (Text(answer),))]
    types = [answer_type(answer) for _, answer in picture.pairs]
    return _record(split, picture, turns, meta={"answer_types": types})


def _caption_records(split: str, pictures: list[_Picture], on_skip: Callable[[str], None] | None) -> Iterator[Record]:
    skipped = 0
    for picture in pictures:
        caption = _caption(picture)
        if caption:
            turns = [Turn("user", (Image(picture.path),)), Turn("assistant", (Text(caption),))]
            yield _record(split, picture, turns, meta={})
            continue
        skipped += 1
        if on_skip:
            on_skip(_id(split, picture))
    if skipped:
        log.warning("easy-vqa/%s: %d of %d images have no caption", split, skipped, len(pictures))


def _record(split: str, picture: _Picture, turns: list[Turn], *, meta: dict[str, Any]) -> Record:
    name, source = _id(split, picture), f"easy-vqa/{split}"
    return Record(tuple(turns), id=name, source=source, row=picture.row, licence=LICENCE, meta=meta)


def _id(split: str, picture: _Picture) -> str:
    return f"easy-vqa/{split}/{picture.number}"


def answer_type(answer: str) -> str:
    """Return "yes/no", "shape" or "color" for one of easy-VQA's thirteen answers; RecordError for another."""
    if answer in ("yes", "no"):
        return "yes/no"
    if answer in SHAPES:
        return "shape"
    if answer in COLOURS:
        return "color"
    raise RecordError(f"'{short(answer)}' is none of easy-VQA's answers", remedy=_REMEDY)


def _caption(picture: _Picture) -> str:
    """Collect what the answers imply about the one shape of the picture; "" if nothing."""
    known: set[str] = set()
    for question, answer in picture.pairs:
        words = set(question.lower().rstrip("?").split())
        if answer_type(answer) == "yes/no":
            # "is there not a blue shape?" - "no": there is one.
            denied = not words.isdisjoint({"no", "not"})
            # Only what is affirmed is known: a shape that is not blue may have any of seven other colours.
            if (answer == "yes") != denied:
                known |= words
        else:
            known |= words | {answer}
    colours, shapes = known & COLOURS, known & SHAPES
    # Each picture holds one shape, so two colours are a fault of the data or of the reading above, and no caption.
    if len(colours) > 1 or len(shapes) > 1:
        raise RecordError(
            f"the answers contradict each other: {', '.join(sorted(colours | shapes))}",
            where=f"image {picture.number}",
            remedy=_REMEDY,
        )
    if not colours and not shapes:
        return ""
    return " ".join(["a", *colours, *(shapes or {"shape"})])


_ROW = [str, str, int]


def read_pictures(split: str, package_dir: str | os.PathLike[str] | None) -> list[_Picture]:
    """Read questions.json, a list of [question, answer, image number], grouped by image in order."""
    if split not in SPLITS:
        raise ConfigError(f"easy-vqa has no split '{split}'", remedy=nearest(split, SPLITS))
    folder = _package_folder() if package_dir is None else Path(package_dir)
    path = folder / "data" / split / "questions.json"
    try:
        rows = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecordError(f"cannot read: {error.strerror}", where=str(path), remedy=_REMEDY) from error
    except ValueError as error:
        raise RecordError(f"not JSON: {short(str(error))}", where=str(path), remedy=_REMEDY) from error
    found: dict[int, _Picture] = {}
    images = str(path.parent / "images")
    for row, item in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(item, list) or [*map(type, item)] != _ROW:
            problem = "found something other than [question, answer, image number]"
            raise RecordError(problem, where=f"{path}:{row}", remedy=_REMEDY)
        question, answer, number = item
        if (picture := found.get(number)) is None:  # several questions are about one image
            picture = found[number] = _Picture(number, f"{images}{os.sep}{number}.png", row, [])
        picture.pairs.append((question, answer))
    return list(found.values())


def _package_folder() -> Path:
    spec = find_spec("easy_vqa")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise RecordError("the package easy-vqa is not installed", where="easy_vqa", remedy=_REMEDY)
    return Path(places[0])
