"""Pictures in foreign rows: paths, URLs, encoded bytes, parts of messages, and the markers of their places.

"<image>" and its relatives are markers only in rows that have pictures: elsewhere they are text, for the linter to
report. Opens no picture and downloads none.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit

from mmit.errors import RecordError
from mmit.records import Image, Part, Text, Turn, image_at, short

MARKER = "<image>"
_MARKER = re.compile(re.escape(MARKER))
# Markers of other model families -> what stands for one picture; a group holds the picture's number, from 1.
FOREIGN: dict[str, re.Pattern[str]] = {
    "<ImageHere>": re.compile(r"(?:<Img>)?<ImageHere>(?:</Img>)?"),
    "<|image_1|>": re.compile(r"<\|image_(\d{1,3})\|>"),
    "<image_1>": re.compile(r"<image[_ ]?(\d{1,3})>"),
    "<|vision_start|><|image_pad|><|vision_end|>": re.compile(
        r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|(?:<\|image_pad\|>)+"
    ),
    "<IMG_CONTEXT>": re.compile(r"<img>(?:<IMG_CONTEXT>)+</img>|(?:<IMG_CONTEXT>)+"),
    "<image_placeholder>": re.compile(r"<image_placeholder>"),
    "<|image|>": re.compile(r"<\|image\|>"),
    "<start_of_image>": re.compile(r"<start_of_image>"),
    "<image_soft_token>": re.compile(r"(?:<image_soft_token>)+"),
    "<|begin_of_image|>": re.compile(r"<\|begin_of_image\|>(?:<\|image\|>)*<\|end_of_image\|>"),
}
# Qwen-VL writes the path itself between the marks.
IMG_PATH = re.compile(r"<img>([^<>\n]{1,1024})</img>")
_HOLDS = ("image", "url", "path", "base64")
_PARTS = (
    'A part is {"type": "text", "text"}, {"type": "image", "image" | "url" | "path" | "base64"} or '
    '{"type": "image_url", "image_url": {"url"}}.'
)


def foreign_marker(text: str) -> str:
    """Return the first marker of another family in a text that is to be learnt as letters, "" if there is none."""
    # Learned as letters such a marker would be spelt by tokens that the model never sees where a picture stands, and
    # the row would have no picture.
    for pattern in (*FOREIGN.values(), IMG_PATH):
        if found := pattern.search(text):
            return found.group()
    return ""


def image_at_url(url: str, what: str = "", *, root: str = "") -> Image:
    """The picture at a path, a file:// URL or a base64 data: URL; `what` names its place. Raises RecordError."""
    name = f"{what} has " if what else "has "
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not marked as base64")
            # Strict: without `validate` characters that are no base64 are skipped, and a damaged picture decodes to
            # another one.
            return Image(base64.b64decode(data, validate=True))
        except ValueError as error:
            remedy = "Write data:image/png;base64, and the picture's bytes in base64."
            raise RecordError(f"{name}a broken data: URL: {error}", remedy=remedy) from error
    if url.startswith("file://"):
        url = _file_url(url, name)
    return image_at(url, root)


def _file_url(url: str, name: str) -> str:
    remedy = "Write file:/// and the absolute path."
    try:
        split = urlsplit(url)
    except ValueError as error:
        raise RecordError(f"{name}a broken file:// URL: {error}", remedy=remedy) from error
    # A file on another host would be opened as one of the same name here.
    if split.netloc not in ("", "localhost"):
        raise RecordError(f"{name}a file:// URL of the host '{short(split.netloc)}'", remedy=remedy)
    return unquote(split.path)


def image_part(value: Any, root: str, what: str = "") -> Image:
    """Return the image of a path or URL, of encoded bytes, of a picture, or of parquet's {"bytes", "path"}."""
    # Both keys and no others, as Hugging Face datasets store an image; an object with more is somebody's own and must
    # be read by a mapping.
    if isinstance(value, dict) and {"bytes", "path"} & value.keys() and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return image_at_url(value, what, root=root)
    return image_at(value, root) if value is None else Image(value)


def base64_image(value: Any, what: str) -> Image:
    """Decode base64 in either alphabet, with or without padding and line breaks, as data sets write it."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is '{short(value)}', not text", remedy="Write it as a JSON string.")
    # Data sets use both alphabets and drop the padding; which of them was meant cannot change the bytes.
    text = "".join(value.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise RecordError(f"{what} is not base64", remedy="Encode the picture's bytes with base64.") from error
    if not data:
        raise RecordError(f"{what} is an empty picture", remedy="Put the picture in, or leave the row out.")
    return Image(data)


def content_part(part: Any, root: str, number: int, beside: Iterator[Image]) -> Part:
    """Read one part of a message's content list.

    Args:
        part: a text, or an object with a `type`. root: folder of relative paths. number: of the message, for errors.
        beside: the pictures of the row; an image part that names none takes the next.

    Raises:
        RecordError: a part of another type, or one whose value is of another kind.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "text":
        problem = f"text of message {number} is '{short(part.get('text'))}', not text"
        raise RecordError(problem, remedy="Write it as a JSON string.")
    if kind == "image":
        return _image_of(part, root, number, beside)
    if kind in ("image_url", "input_image"):
        value = part.get("image_url")
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str):
            problem = f"image_url of message {number} is '{short(url)}', not text"
            raise RecordError(problem, remedy=_PARTS)
        return image_at_url(url, f"message {number}", root=root)
    remedy = "mmit reads text and pictures: leave the row out." if kind in ("video", "audio") else _PARTS
    raise RecordError(f"message {number} has a part of type '{short(kind)}'", remedy=remedy)


def _image_of(part: Mapping[str, Any], root: str, number: int, beside: Iterator[Image]) -> Image:
    held = {key: part[key] for key in _HOLDS if part.get(key) is not None}
    source = part.get("source")
    if isinstance(source, Mapping):  # as Anthropic's API writes it
        named = {"base64": source.get("data"), "url": source.get("url")}
        held |= {key: value for key, value in named.items() if value is not None}
    if len(held) > 1:
        problem = f"an image part of message {number} holds {len(held)} pictures: {', '.join(held)}"
        raise RecordError(problem, remedy="Keep one of them.")
    if held:
        key, value = next(iter(held.items()))
        what = f"message {number}"
        return base64_image(value, f"an image part of {what}") if key == "base64" else image_part(value, root, what)
    # In reading order over the whole row: parts without a picture and the list beside them were written together.
    found = next(beside, None)
    if found is None:
        remedy = f"Put the picture into the part, or one for each part into images. {_PARTS}"
        raise RecordError(f"message {number} has an image part without a picture", remedy=remedy)
    return found


def place_images(dialogue: Sequence[Turn], images: Sequence[Image] | None, *, front: bool = False) -> tuple[Turn, ...]:
    """Turn the markers of a dialogue into its images; without images they stay text.

    Every marker becomes its image at that place. One image without a marker opens the first user turn. With `front`,
    LLaVA's rule holds for a single image: it opens its turn, whose text is stripped. Raises RecordError where markers
    and images differ in number.
    """
    if not images:
        return tuple(dialogue)
    texts = [turn.text for turn in dialogue]
    pattern, name = _marker_of(texts)
    counts = [len(pattern.findall(text)) for text in texts]
    for number, turn in enumerate(dialogue, 1):
        if counts[number - 1] and (turn.role == "system" or (front and turn.role != "user")):
            remedy = "A system turn shows no image" if turn.role == "system" else "Only a human turn shows images"
            raise RecordError(f"turn {number} ({turn.role}) has {name}", remedy=f"{remedy}: move or remove the marker.")
    count = sum(counts)
    # LLaVA's own rule. With several pictures nobody could tell where each belongs.
    if count == 0 and len(images) == 1:
        return images_first(dialogue, images, strip=front)
    if count != len(images):
        remedy = f"Write one {name} per image where it belongs, or correct the list of images."
        raise RecordError(f"the text has {count} {name} but the row {len(images)} images", remedy=remedy)
    left = iter(_in_order(dialogue, images, pattern))
    turns = []
    for turn, markers in zip(dialogue, counts, strict=True):
        if not markers:
            turns.append(turn)
        elif front and len(images) == 1:
            turns.append(_with(turn, [next(left), Text(pattern.sub("", turn.text).strip())]))
        else:
            turns.append(_with(turn, _split(turn, pattern, left)))
    return tuple(turns)


def _marker_of(texts: Sequence[str]) -> tuple[re.Pattern[str], str]:
    """Return the marker that the texts use: "<image>" unless they have only those of another family."""
    text = "\n".join(texts)
    # Only where the common marker is missing: beside it, another family's marker is text that somebody quotes.
    if MARKER not in text:
        for name, pattern in FOREIGN.items():
            if pattern.search(text):
                return pattern, name
    return _MARKER, MARKER


def _in_order(dialogue: Sequence[Turn], images: Sequence[Image], pattern: re.Pattern[str]) -> Sequence[Image]:
    """Return the images as their markers ask for them, by number where markers are numbered."""
    if not pattern.groups:
        return images
    asked = [int(number) for turn in dialogue for number in pattern.findall(turn.text)]
    # Numbered markers may come in any order, and each picture must be asked for once.
    if sorted(asked) != list(range(1, len(images) + 1)):
        problem = f"the markers have the numbers {short(asked)}, but the row {len(images)} images"
        raise RecordError(problem, remedy="Number them from 1, each picture once.")
    return [images[number - 1] for number in asked]


def _split(turn: Turn, pattern: re.Pattern[str], left: Iterator[Image]) -> list[Part]:
    parts: list[Part] = []
    for part in turn.parts:
        if isinstance(part, Image):
            parts.append(part)
            continue
        end = 0
        for found in pattern.finditer(part.text):
            parts += [replace(part, text=part.text[end : found.start()]), next(left)]
            end = found.end()
        parts.append(replace(part, text=part.text[end:]))
    return parts


def images_first(dialogue: Sequence[Turn], images: Sequence[Image], *, strip: bool = False) -> tuple[Turn, ...]:
    """Let the images open the first user turn, whatever the text says; `strip` its text as LLaVA does."""
    turns, left = [], list(images)
    for turn in dialogue:
        if turn.role == "user" and left:
            said: Sequence[Part] = [Text(turn.text.strip())] if strip else turn.parts
            turn, left = _with(turn, [*left, *said]), []
        turns.append(turn)
    return tuple(turns)


def place_paths(dialogue: Sequence[Turn], root: str) -> tuple[Turn, ...]:
    """Read Qwen-VL's "<img>path</img>": each becomes the picture at that path, in that place."""
    turns = []
    for turn in dialogue:
        paths = iter([image_at_url(path.strip(), root=root) for path in IMG_PATH.findall(turn.text)])
        turns.append(_with(turn, _split(turn, IMG_PATH, paths)) if IMG_PATH.search(turn.text) else turn)
    return tuple(turns)


def _with(turn: Turn, parts: Sequence[Part]) -> Turn:
    """The turn with these parts, without empty texts."""
    kept = tuple(p for p in parts if not (isinstance(p, Text) and not p.text))
    return replace(turn, parts=kept or tuple(parts[:1]))
