"""Which format a file has, told from its name's ending and its keys, with the reason in words.

Looks at the first 1000 rows at most (a file that is one JSON object is read whole). Refuses to guess: a file whose
keys fit no format is a RecordError that lists what formats look like.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from typing import Any

from mmit.data.formats.chat import conversation_format
from mmit.data.formats.common import Format, json_object, json_rows
from mmit.data.formats.instruct import ANSWERS
from mmit.data.formats.keys import REFUSED
from mmit.data.formats.multimodal import M3IT_IMAGES, vision_flan_task
from mmit.data.formats.pictures import MARKER
from mmit.data.formats.tabular import is_parquet, is_table, table_header
from mmit.data.formats.transcripts import is_guanaco
from mmit.errors import RecordError
from mmit.records import short

_LOOKED_AT = 1000
_TEMPLATES = ("<|im_start|>", "[INST]", "<|start_header_id|>", "<start_of_turn>", "<|assistant|>")


def detect(path: str, formats: Mapping[str, Format]) -> tuple[str, str]:
    """Return (name in `formats`, the reason); RecordError if the file's keys fit none."""
    if path.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return "img2dataset", f"'{os.path.basename(path)}' is a tar of samples"
    if is_parquet(path):
        return "parquet", "the name ends in .parquet"
    if is_table(path):
        header = table_header(path)
        found = _by_keys(set(header), formats)
        # A column called instruction does not make a table the JSON of Alpaca.
        if found == "pmc_vqa":
            return found, f"the header has {_quoted(formats[found].detect)}"
        return "csv", f"a table with the columns {', '.join(map(short, header))}"
    # By content from here on: .json and .jsonl say nothing about which layout is inside.
    rows, whole = _rows(path)
    first = rows[0] if rows else {}
    if isinstance(first, RecordError):
        if path.lower().endswith((".yaml", ".yml")):
            remedy = "Name the files that stand under its data.train; mmit data check, show and stats take a mixture."
            raise RecordError("a config is no file of records", where=path, remedy=remedy)
        raise first
    # Some sets count their turns under this name of mmit's.
    if isinstance(first, dict) and isinstance(first.get("turns"), (int, float)):
        first = {key: value for key, value in first.items() if key != "turns"}
    if whole and not (isinstance(first, dict) and "conversations" in first):
        found = _by_keys(_shape(first), formats)
        if found:
            return found, f"the file is one object with {_quoted(formats[found].detect)}"
    keys = set(first) if isinstance(first, dict) else set()
    if "conversations" in keys:
        return _conversations(rows, keys)
    if encoded := [name for name in M3IT_IMAGES if name != "image" and name in keys]:
        return "m3it", f"the first row has M3IT's '{encoded[0]}'"
    if isinstance(first, dict) and is_guanaco(first):
        return "guanaco", "the first row has 'text' with ### Human: in it"
    found = _by_keys(keys, formats)
    if found:
        return found, f"the first row has {_quoted(formats[found].detect)}"
    problem = f"cannot tell the format: the first row has the keys {short(list(keys))}" if rows else "no rows"
    wrapped = _wrapped(first) if whole and isinstance(first, dict) else ""
    raise RecordError(problem, where=path, remedy=_unlearnable(keys, first) or wrapped or expected(formats))


def _wrapped(value: dict[str, Any]) -> str:
    """Say under which key of the one object the rows lie, "" if they do not."""
    names = ("data", "rows", "train", "records", "examples", "samples", "items")
    held = [key for key in names if isinstance(value.get(key), list) and value[key] and isinstance(value[key][0], dict)]
    if not held:
        return ""
    key = held[0]
    told = f"""jq '.["{key}"]' FILE > rows.json"""
    return f"If its rows lie under '{key}', write that list into a file of its own: {told}."


def _unlearnable(keys: set[str], row: Any) -> str:
    """Say why rows with these keys are nothing to learn answers from, "" if that cannot be told."""
    if found := sorted(keys & REFUSED.keys()):
        kind, remedy = REFUSED[found[0]]
        return f"'{found[0]}' is {kind}. {remedy}"
    if "segments" in keys:
        return "'segments' is text cut for another template: write messages, whose turns may have a weight."
    if "text" in keys and any(mark in str(row["text"]) for mark in _TEMPLATES):
        return "'text' is a conversation written with a model's chat template: import the set that it was made from."
    if keys <= {"text", "id", "meta", "url", "timestamp", "source"} and "text" in keys:
        return "'text' alone is text for pre-training: there is no question and no answer."
    return ""


def expected(formats: Mapping[str, Format]) -> str:
    """Say what each format looks like, for the error of a file that fits none."""
    told = [f"{_quoted(entry.detect)} ({name})" for name, entry in formats.items() if entry.detect]
    return (
        "Name the format if you know it, or import as json with a mapping (columns=instruction=KEY,output=KEY), or a "
        "list of turns as chat (turns=KEY, role=KEY, content=KEY, roles=person=user,bot=assistant). "
        f"Known are 'conversations' (llava, sharegpt), {', '.join(told)}."
    )


def _rows(path: str) -> tuple[list[Any], bool]:
    """Return the first rows and whether the file is one JSON object, which then is the only row."""
    rows = [row for _, row in islice(json_rows(path), _LOOKED_AT)]
    if rows and isinstance(rows[0], RecordError):
        # Not JSONL from its first line on: an object written over several lines, or no JSON at all.
        try:
            return [json_object(path)], True
        except RecordError:
            return rows, False
    return rows, len(rows) == 1 and isinstance(rows[0], dict)


def _shape(value: Any) -> set[str]:
    """Return the keys of an object, and under "key.inner" those of the first object in each of its values.

    A value may be a list of objects or a mapping of them; "*.inner" are the keys of a value that is an object.
    """
    if not isinstance(value, dict):
        return set()
    keys = set(value)
    # A hundred of them: a file keyed by picture ids may have a million, all alike.
    for key, inner in islice(value.items(), 100):
        items = inner if isinstance(inner, list) else list(inner.values())[:1] if isinstance(inner, dict) else []
        if items and isinstance(items[0], dict):
            keys |= {f"{key}.{name}" for name in items[0]}
        if isinstance(inner, dict):
            keys |= {f"*.{name}" for name in inner}
    return keys


def _by_keys(keys: set[str], formats: Mapping[str, Format]) -> str:
    """Return the format that asks for the most of the keys, "" if none has all of its own."""
    fits = [name for name, entry in formats.items() if entry.detect and keys.issuperset(entry.detect)]
    if fits == ["instructions"] and keys.intersection(ANSWERS):
        return ""  # some other set of instructions, whose answers would be lost
    # Most keys win: instruction and output alone are Alpaca's, with inputs beside them M3IT's.
    return max(fits, key=lambda name: len(formats[name].detect), default="")


def _quoted(keys: tuple[str, ...]) -> str:
    names = [f"'{key}'" for key in keys]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _conversations(rows: list[Any], keys: set[str]) -> tuple[str, str]:
    """Tell the formats with 'conversations' apart, by speakers, images and the ids of all rows looked at."""
    if {"task_type", "src_image"} & keys:
        return "lamm", "rows have 'conversations' and LAMM's 'task_type' or 'src_image'"
    dicts = [row for row in rows if isinstance(row, dict)]
    name, reason = conversation_format(rows)
    if name != "llava":
        return name, reason
    pictured = [row for row in dicts if "image" in row or "images" in row]
    if any(str(row.get("id")).startswith("allava_") for row in pictured):
        return "allava", "rows are LLaVA's, with ids that begin with allava_"
    if any(vision_flan_task(row)[0] for row in pictured):
        return "vision_flan", "rows are LLaVA's, with Vision-Flan's dataset+task in 'task_name' or 'id'"
    # LLaVA's own files never have a marker without a picture. ALLaVA's rows of text do, and there it stays text.
    quoting = [row for row in dicts if row not in pictured and MARKER in str(row.get("conversations"))]
    if quoting:
        return "allava", f"rows are LLaVA's, and {len(quoting)} without 'image' have {MARKER} in their text"
    return name, reason
