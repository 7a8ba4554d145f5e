"""Captions: MiniGPT-4's cc_sbu_align, COCO captions, the samples of img2dataset shards.

The files hold pictures and captions but no instruction. What the user says is an option: nothing (the picture
alone, for aligning a projector), one instruction, or several of which each row gets one by its seed and id.
"""

from __future__ import annotations

import json
from typing import Any

from mmit.data.formats.common import (
    Format,
    Row,
    Rows,
    ask,
    file_name,
    id_of,
    json_object,
    keyed,
    object_of,
    pick,
    reply,
    rest,
    text_of,
)
from mmit.data.formats.pictures import base64_image, image_part
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, short

# The four of MiniGPT-4's prompts/alignment.txt, without its markers for the picture.
ALIGN_INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


def minigpt4_rows(path: str) -> Rows:
    """Yield the annotations of filter_cap.json."""
    yield from enumerate(_annotations(path, json_object(path, "annotations")), 1)


def minigpt4(
    row: Row,
    *,
    image_root: str = "",
    instruction: Any = ALIGN_INSTRUCTIONS,
    seed: int = 0,
    image_pattern: str = "image/{image_id}.jpg",
) -> Record:
    """MiniGPT-4's second stage: cc_sbu_align/filter_cap.json and cc_sbu_align/image/<image_id>.jpg.

    The file has captions only: MiniGPT-4 draws one of four instructions each time a row is read; here a row keeps the
    one that `seed` and its image_id give.

    Args:
        row: of {"annotations": [{"image_id": "2", "caption"}]}.
        image_root: the folder that `image_pattern` begins in.
        instruction: a text or a list of texts to draw from.
        seed: of that draw.
        image_pattern: name of an image file, with {image_id}.

    Raises:
        RecordError: a row without its keys. ConfigError: an option that cannot work.
    """
    key = _image_id(row)
    image = image_part(file_name(image_pattern, {"image_id": row["image_id"]}), image_root)
    # By the image's id and not by the row's number: a file that was filtered keeps the instruction of every picture.
    said = pick(instruction, seed=seed, key=key)
    turns = (ask(said, [image]), reply(text_of(row.get("caption"), "caption")))
    return Record(turns, id=key, meta=rest(row, "image_id", "caption"))


def coco_captions_rows(path: str) -> Rows:
    """Yield the annotations of a captions file, each with the entry of its image."""
    file = json_object(path, "images", "annotations")
    # A table, since a picture of COCO has five captions, which are not neighbours in the file.
    images = keyed(file["images"], "id", where=path)
    for number, annotation in enumerate(_annotations(path, file), 1):
        if not isinstance(annotation, dict):
            # Passed on as it is: whoever makes the record says what it should have been, with its number.
            yield number, annotation
        else:
            yield number, annotation | {"image": images.get(str(annotation.get("image_id")))}


def coco_captions(
    row: Row, *, image_root: str = "", instruction: Any = None, seed: int = 0, image_pattern: str = "{file_name}"
) -> Record:
    """COCO captions: annotations/captions_{train,val}2014.json (or 2017), one record per caption.

    The file is {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}; a picture has
    five or more captions, so that the same picture comes as often. White space around a caption is removed.

    Args:
        row: an annotation, with the entry of its picture as "image".
        image_root: the folder of the split (train2014/).
        instruction: a text or a list of texts to draw from; None leaves the question to the picture alone.
        seed: of that draw, by the caption's id.
        image_pattern: name of an image file, with {file_name} or {image_id}.

    Raises:
        RecordError: a caption of a picture that the file does not list. ConfigError: an option that cannot work.
    """
    entry = row.get("image")
    if not isinstance(entry, dict):
        problem = f"'images' has no entry for image_id {short(row.get('image_id'))}"
        raise RecordError(problem, remedy="The file is damaged or was cut: fetch it again.")
    names = {"file_name": text_of(entry.get("file_name"), "file_name"), "image_id": row["image_id"]}
    image = image_part(file_name(image_pattern, names), image_root)
    said = pick(instruction, seed=seed, key=id_of(row) or _image_id(row))
    turns = (ask(said, [image]), reply(text_of(row.get("caption"), "caption").strip()))
    return Record(turns, id=id_of(row), meta=rest(row, "caption"))


def _annotations(path: str, file: Row) -> list[Any]:
    if not isinstance(file["annotations"], list):
        raise RecordError("'annotations' is not a list", where=path, remedy="Check that this is the right file.")
    return file["annotations"]


def _image_id(row: Row) -> str:
    if not isinstance(row.get("image_id"), (str, int)) or row["image_id"] == "":
        problem = f"image_id is '{short(row.get('image_id'))}'"
        raise RecordError(problem, remedy="Give the image's number or name.")
    return str(row["image_id"])


_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


def img2dataset(row: Row, *, image_root: str = "", instruction: Any = None, seed: int = 0) -> Record:
    """Make a record of one sample of an img2dataset shard: {"__key__", "jpg": bytes, "txt": bytes, "json": bytes}.

    The keys are the extensions of the sample's files; the picture is in one of jpg, jpeg, png, webp, gif, bmp, as
    bytes. The caption is the `txt` file, or "caption" in the `json` file, whose other facts (url, width, sha256, ...)
    stay in the meta.

    Args:
        row: the sample.
        image_root: not read: the sample holds its picture.
        instruction: a text or a list of texts to draw from; None leaves the question to the picture alone.
        seed: of that draw, by the sample's key.

    Raises:
        RecordError: a sample without picture or caption, or one whose status says that its download failed.
    """
    key = text_of(row.get("__key__", ""), "__key__")
    facts = _facts(row.get("json"))
    # img2dataset writes a row for every download, those that failed among them.
    if facts.get("status") not in (None, "success"):
        problem = f"the download of the picture ended as '{short(facts['status'])}'"
        raise RecordError(problem, remedy="Leave the sample out.")
    found = [name for name in _PICTURES if row.get(name) is not None]
    # With two pictures nothing says which of them the caption is of.
    if len(found) != 1:
        problem = f"the sample has {len(found)} pictures" + (f": {', '.join(found)}" if found else "")
        raise RecordError(problem, remedy=f"It needs one file of {', '.join(_PICTURES)}.")
    value = row[found[0]]
    image = Image(bytes(value)) if isinstance(value, (bytes, bytearray)) else base64_image(value, found[0])
    # The text beside the picture is what img2dataset was told to keep as the caption; the JSON may hold another one.
    caption = row.get("txt", facts.get("caption"))
    if isinstance(caption, bytes):
        caption = _utf8(caption, "txt")
    said = pick(instruction, seed=seed, key=key)
    meta = {name: value for name, value in facts.items() if name not in ("caption", "key", "status")}
    return Record((ask(said, [image]), reply(text_of(caption, "the caption").strip())), id=key, meta=meta)


def _facts(value: Any) -> Row:
    if value is None or isinstance(value, dict):
        return value or {}
    try:
        return object_of(json.loads(_utf8(value, "json") if isinstance(value, bytes) else value), "json")
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"json is not JSON: {short(str(error))}", remedy="Fetch the shard again.") from error


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{what} is not UTF-8", remedy="Write the caption as UTF-8 text.") from error


def img2dataset_rows(path: str) -> Rows:
    """Refuse: shards are read through their index, not row by row."""
    problem = "an img2dataset shard is a tar, which this importer does not open"
    raise ConfigError(problem, where=path, remedy="Index it: mmit data index SHARDS.")


INSTRUCTION = "what the user says beside the picture: one text, or a list of which each row gets one"
SEED = "which instruction a row gets, default 0"
FORMATS = {
    "minigpt4": Format(
        "MiniGPT-4's cc_sbu_align (filter_cap.json)",
        minigpt4,
        minigpt4_rows,
        options={
            "instruction": f"{INSTRUCTION}; default the four of MiniGPT-4",
            "seed": SEED,
            "image_pattern": 'name of an image file, default "image/{image_id}.jpg"',
        },
        detect=("annotations.caption", "annotations.image_id"),
    ),
    "coco_captions": Format(
        "COCO captions (captions_train2014.json)",
        coco_captions,
        coco_captions_rows,
        options={
            "instruction": f"{INSTRUCTION}; default nothing",
            "seed": SEED,
            "image_pattern": 'name of an image file, default "{file_name}"; also {image_id}',
        },
        detect=("annotations.caption", "annotations.image_id", "images.file_name"),
    ),
    "img2dataset": Format(
        "the samples of img2dataset shards (pictures with captions in tars)",
        img2dataset,
        img2dataset_rows,
        options={"instruction": f"{INSTRUCTION}; default nothing", "seed": SEED},
    ),
}
