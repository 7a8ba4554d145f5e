"""MIMIC-IT, Otter's in-context instruction data: pairs that refer to pictures and to each other.

Takes an instruction file and the file or folder of its pictures; gives one Record per pair, with the pairs it refers
to as earlier turns or as a note in the meta. Refuses references to pairs or pictures that do not exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmit.data.formats.common import (
    Format,
    Row,
    Rows,
    ask,
    count_of,
    file_name,
    json_object,
    object_of,
    one_of,
    reply,
    rest,
    text_of,
)
from mmit.data.formats.pictures import base64_image, image_part
from mmit.data.formats.tabular import parquet_rows
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Turn, short

_SUFFIX = "_instructions"


def mimicit_rows(path: str, *, images: str | None = None, train: str | None = None) -> Rows:
    """Yield the pairs of <TASK>_instructions.json, each with the file's other pairs and the table of pictures.

    The whole file and, if pictures are stored in a JSON or parquet file, all of them in base64 are held in memory.
    """
    pairs = object_of(json_object(path, "data")["data"], "data", where=path)
    # Text-only tasks have no picture file, and must not need one.
    table = _pictures(path, images) if _shows_pictures(pairs) else {}
    chosen = json_object(train) if train else None
    for number, key in enumerate(pairs if chosen is None else chosen, 1):
        # By reference: each row holds the whole table of pairs, which is one object for all of them.
        yield (
            number,
            {
                "id": key,
                "pairs": pairs,
                "pictures": table,
                "related": None if chosen is None else chosen[key],
            },
        )


def mimicit(
    row: Row,
    *,
    image_root: str = "",
    relations: str = "turns",
    max_related: int | None = None,
    image_pattern: str = "{image_id}.jpg",
) -> Record:
    """Otter's MIMIC-IT: <TASK>_instructions.json, pictures in <TASK>.json or <TASK>.parquet.

    The instruction file is {"meta", "data": {id: {"instruction", "answer", "image_ids": [...], "rel_ins_ids": [...]}}};
    <TASK>_train.json, {id: [related ids]}, replaces rel_ins_ids and says which pairs are trained on. Pictures are
    {image_id: base64}, in parquet a column `base64` under the index image_id. meta["rel_ins_ids"] keeps the relation.
    A conversation's later pair contains the earlier ones as turns: give the _train.json to take each conversation once.
    Pairs without pictures are text-only; the frames of a video are that many pictures.

    Args:
        row: {"id", "pairs": all pairs by id, "related": ids or None, "pictures"}.
        image_root: where the pictures' folder starts, if they are files.
        relations: "turns" puts the related pairs first, in their order, each showing its pictures unless the pair
            before showed the same ones: an in-context example where the pictures differ, a conversation where they are
            the same. "meta" only notes them.
        max_related: take only so many related pairs; None for all.
        image_pattern: where pictures are a folder, the name of an image file with {image_id}.

    Raises:
        RecordError: a related id or a picture that is not there. ConfigError: an option that cannot work.
    """
    one_of(relations, "relations", ("turns", "meta"))
    pairs, key = object_of(row.get("pairs"), "pairs"), text_of(row.get("id"), "the id")
    own = _pair(pairs, key)
    related = row.get("related")
    related = (own.get("rel_ins_ids") or []) if related is None else related
    if not isinstance(related, list) or not all(isinstance(name, str) for name in related):
        raise RecordError(f"rel_ins_ids is {short(related)}", remedy="It must be a list of the ids of other pairs.")
    before = related if max_related is None else related[: count_of(max_related, "max_related")]
    # The question would come after its own answer.
    if key in before:
        raise RecordError("the pair is related to itself", remedy="Remove its id from rel_ins_ids.")
    turns: list[Turn] = []
    last: list[str] = []
    for name in [*(before if relations == "turns" else []), key]:
        pair = _pair(pairs, name)
        ids = _image_ids(pair, name)
        # A conversation about one picture shows it once; an in-context example of another picture shows its own.
        shown = [] if turns and ids == last else ids
        images = [_image(picture, row["pictures"], image_root, pattern=image_pattern) for picture in shown]
        turns += [
            ask(text_of(pair.get("instruction"), f"instruction of {name}").strip(), images),
            reply(text_of(pair.get("answer"), f"answer of {name}").strip()),
        ]
        last = ids
    meta = rest(own, "instruction", "answer", "image_ids", "rel_ins_ids")
    return Record(tuple(turns), id=key, meta=meta | {"rel_ins_ids": related})


def _pair(pairs: Row, name: str) -> Row:
    if name not in pairs:
        problem = f"the file has no pair '{short(name)}'"
        raise RecordError(problem, remedy="Take rel_ins_ids and the _train.json from the same release as the file.")
    return object_of(pairs[name], f"pair {short(name)}")


def _image_ids(pair: Row, name: str) -> list[str]:
    ids = pair.get("image_ids") or []
    if not isinstance(ids, list) or not all(isinstance(picture, str) for picture in ids):
        raise RecordError(f"image_ids of {name} is {short(ids)}", remedy="It must be a list of image ids.")
    return ids


def _image(name: str, pictures: Mapping[str, Any] | str, root: str, *, pattern: str) -> Image:
    # A folder is a text here, and a table a mapping: pictures of a folder are not read before they are needed.
    if isinstance(pictures, str):
        return image_part(file_name(pattern, {"image_id": name}), pictures or root)
    if name not in pictures:
        problem = f"there is no picture '{short(name)}' among the {len(pictures)} of the image file"
        raise RecordError(problem, remedy="Give the option images: the image file of the same task and release.")
    return base64_image(pictures[name], f"picture {short(name)}")


def _shows_pictures(pairs: Row) -> bool:
    return any(isinstance(pair, dict) and pair.get("image_ids") for pair in pairs.values())


def _pictures(path: str, images: str | None) -> Row | str:
    """Return {image_id: base64}, or the folder that holds the pictures as files."""
    place = Path(images) if images else next(_beside(Path(path)), None)
    if place is None or not place.exists():
        problem = f"pairs refer to pictures, and {short(str(place), 120) if place else 'no image file'} is there"
        problem = problem if place is None else f"there is no image file or folder {short(str(place), 120)}"
        remedy = "Give the option images: <TASK>.json, <TASK>.parquet or a folder of <image_id>.jpg files."
        raise ConfigError(problem, where=path, remedy=remedy)
    if place.is_dir():
        return str(place)
    if place.suffix == ".parquet":
        return dict(_parquet_pictures(str(place)))
    return json_object(str(place))


def _beside(path: Path) -> Iterator[Path]:
    """Yield the image files that the official layout puts beside an instruction file, best first."""
    task = path.stem.removesuffix(_SUFFIX)
    if task != path.stem:
        names = (f"{task}.parquet", f"{task}.json", f"{task}_images.parquet", f"{task}_images.json")
        yield from (found for found in (path.with_name(name) for name in names) if os.path.isfile(found))


def _parquet_pictures(path: str) -> Iterator[tuple[str, str]]:
    for number, row in parquet_rows(path):
        # pandas stores an index without a name as __index_level_0__.
        key = next((row[name] for name in ("__index_level_0__", "image_id", "id") if name in row), None)
        if not isinstance(key, str) or "base64" not in row:
            problem = f"row {number} has the columns {', '.join(row)}"
            raise ConfigError(problem, where=path, remedy="It needs base64, and the image id as index or image_id.")
        yield key, row["base64"]


FORMATS = {
    "mimicit": Format(
        "Otter's MIMIC-IT (<TASK>_instructions.json), in-context relations kept",
        mimicit,
        mimicit_rows,
        options={
            "relations": '"turns" (default: related pairs come as earlier turns) or "meta" (only noted)',
            "max_related": "how many related pairs at most, default all",
            "image_pattern": 'where images is a folder: name of an image file, default "{image_id}.jpg"',
        },
        file_options={
            "images": "the file or folder of the pictures, default <TASK>.parquet or <TASK>.json beside the file",
            "train": "<TASK>_train.json: which pairs to take, and what each is related to",
        },
        detect=("data.instruction", "data.answer"),
    ),
}
