"""The table of keys that carry meaning beside the text: how each is read, or why it is refused.

One table for every importer, shards included. An importer reads what its layout defines; what it leaves in the meta
is looked up here: a key that changes what is shown or learnt is read into the record or refuses the row, everything
else stays in the meta and is counted, so that it can be reported. A key of a turn is judged with the turn's role.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmit.data.formats.boxes import WRITTEN, holds_boxes
from mmit.errors import RecordError
from mmit.record_rules import json_problem, weight_problem
from mmit.records import Part, Record, Text, Turn, short

Row = dict[str, Any]

# Keys of a row -> what they are read as.
ROW_KEYS: dict[str, str] = {
    **dict.fromkeys(("system", "system_prompt", "system_message", "system_instruction"), "system"),
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought", "Complex_CoT"), "thinking"),
    **dict.fromkeys(("weight", "loss_weight", "sample_weight"), "weight"),
    **dict.fromkeys(("train", "trainable"), "train"),
    **dict.fromkeys(("template_args", "chat_template_kwargs"), "template_args"),
    "enable_thinking": "enable_thinking",
}
# Keys of a turn -> what they are read as. A number or a flag sets the weight of the turn's text.
TURN_KEYS: dict[str, str] = {
    **dict.fromkeys(("weight", "loss_weight", "loss_scale", "loss", "train", "trainable", "do_train"), "weight"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), "thinking"),
    **dict.fromkeys(("tool_calls", "function_call"), "tool_calls"),
    "train_detail": "spans",
    "name": "name",
    "tool_call_id": "tool_call_id",
}
_VIDEO = "mmit reads pictures, not video: leave the row out, or give frames as images."
_AUDIO = "mmit reads pictures, not sound: leave the row out."
_PAIR = "A pair stands beside the turns, as chosen and rejected of the row."
_NAMED = "Name it image or images, or import the file as json with columns=image=KEY."
_TOKENS = "Token ids belong to one tokenizer: import the text they were made of."
_MASK = "Say what is learnt with weight (0 or more) or train (true, false)."
PICTURE_KEYS = ("image_path", "image_paths", "image_file", "image_files", "img", "img_path", "image_url", "image_urls")
# Keys of a row or turn that are refused unless empty -> (what it is, remedy).
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("video", "videos", "video_path", "video_url"), ("a video", _VIDEO)),
    **dict.fromkeys(("audio", "audios", "audio_path", "speech"), ("sound", _AUDIO)),
    **dict.fromkeys(
        (
            *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_answer", "rejected_images"),
            *("rejected_output", "negative_messages", "negative_output", "negative_response", "positive_messages"),
            *("preferred_output", "non_preferred_output", "rejected_conversations"),
        ),
        ("half of a preference pair", _PAIR),
    ),
    **dict.fromkeys(PICTURE_KEYS, ("a picture that this format does not read", _NAMED)),
    **dict.fromkeys(("input_ids", "labels", "token_ids"), ("tokens, not text", _TOKENS)),
    **dict.fromkeys(
        ("mask", "loss_mask", "masked", "is_masked", "ignore", "ignore_loss", "no_loss"),
        ("a loss mask that can be read in two ways", _MASK),
    ),
}
# Marks of an answer; those of a row are read by `preferences.py`, those of a turn refused where they say it is bad.
MARKS = ("label", "kto_tag", "desirable", "is_desirable", "is_correct", "is_preferred", "preferred")
BAD_MARKS = ("undesirable", "negative", "bad", "rejected", "wrong", "false")
FLAGS = frozenset(MARKS) - {"label"}  # 0 says no; a label of 0 may be a class
UNSHOWN = "Write the choices into the question, or make instructions of the rows by a template: mmit build annotated."
_WHOLE = "Put it beside the turns: objects or bbox of the row, with <bbox> where it belongs in the text."
# Keys of a row with the choices of its question, and an answer that can only point at one of them.
CHOICES = ("choices", "options")
_POINTER = re.compile(r"\(?([A-Za-z]|\d{1,2})\)?[.:]?")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
# Keys of a part of a content list that say what it is or hold it.
_PART_KEYS = ("type", "text", "image", "url", "path", "base64", "source", "image_url", "index")
_UNLEARN = "Its verdict stands beside the turns, as label of the row: true or false, for train.objective.kind=kto."
# Made by importers or identical with another key of the record; not reported.
_KNOWN = ("source", "row", "licence", "turn_keys", "dropped_leading_turn", "references", WRITTEN)


def with_meaning(record: Record) -> Record:
    """Read the keys that the importer left in the meta; raise RecordError for those that cannot be expressed.

    Boxes are read by `boxes.with_boxes`, once the pictures are in their places.
    """
    meta = dict(record.meta)
    for key in [*meta]:
        value = meta[key]
        if not (key in PICTURE_KEYS and record.images):  # the picture is there, and this tells where it came from
            _refuse(key, value, f"'{key}'")
        if key not in ROW_KEYS:
            continue
        del meta[key]
        if not _empty(value):
            record = _READ[ROW_KEYS[key]](record, key, value)
    _check_choices(record, meta)
    _check_storable(meta)
    return record if meta == record.meta else replace(record, meta=meta)


def kept_keys(record: Record) -> Counter[str]:
    """Count what stays in the meta of a record unread: keys of the row, and "turns: KEY" of its turns."""
    kept = Counter(key for key, value in record.meta.items() if key not in _KNOWN and not _empty(value))
    turns = record.meta.get("turn_keys")
    if isinstance(turns, list):
        names = {key for keys in turns if isinstance(keys, Mapping) for key in keys if not _empty(keys[key])}
        kept.update(f"turns: {key}" for key in names)
    return kept


def told(kept: Mapping[str, int], most: int = 12) -> str:
    """Say what was kept: "context (812 rows), score (3)"."""
    ordered = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
    names = [f"{short(key, 40)} ({count:,} row{'' if count == 1 else 's'})" for key, count in ordered[:most]]
    return ", ".join(names) + (f" and {len(kept) - most} more keys" if len(kept) > most else "")


def turn_extras(turn: Row, role: str, number: int, used: tuple[str, ...]) -> tuple[dict[str, Any], Row]:
    """Read the keys of a turn beside its speaker and text.

    Args:
        turn: the foreign object. role: of ours. number: of the turn from 1, for messages.
        used: keys that hold speaker and text.

    Returns:
        arguments of Turn ("spans" among them are the (start, end, weight) of its text), and keys that stay in the meta.

    Raises:
        RecordError: what cannot be expressed, naming the turn.
    """
    found: dict[str, Any] = {}
    left: Row = {}
    # Nearly every turn of a data set; the rest of this function would look at nothing.
    if len(turn) == 2 and used[0] in turn and used[1] in turn:
        return found, left
    names: dict[str, str] = {}
    for key, value in turn.items():
        if key in used:
            continue
        _refuse(key, value, f"turn {number} ({role}) has '{key}':")
        if holds_boxes(key, value):
            raise RecordError(f"turn {number} ({role}) has '{key}', a box of its own", remedy=_WHOLE)
        if key in ("image", "images") and not _empty(value):
            remedy = "List the pictures beside the turns, in images, in the order of their places."
            raise RecordError(f"turn {number} ({role}) has '{key}', pictures of its own", remedy=remedy)
        meaning = TURN_KEYS.get(key)
        if meaning is None or (meaning == "name" and role != "tool"):
            left[key] = value
            continue
        # An empty thought is a statement about thinking; other empty values are none.
        if value is None or (meaning != "thinking" and _empty(value)):
            continue
        read = _turn_value(key, meaning, value, role=role, number=number)
        # The same said twice is no contradiction: files keep old keys beside new ones.
        if meaning in found and found[meaning] != read:
            problem = f"turn {number} ({role}) has {names[meaning]} and {key}, which contradict each other"
            raise RecordError(problem, remedy="Keep one of them.")
        found[meaning], names[meaning] = read, key
    return found, left


def part_extras(part: Mapping[str, Any], role: str, number: int) -> tuple[float | None, Row]:
    """Read the keys of a part of a content list beside its kind and content: (its weight, keys that are left)."""
    weight: float | None = None
    left: Row = {}
    for key, value in part.items():
        if key in _PART_KEYS or _empty(value):
            continue
        what = f"a part of turn {number} ({role}) has '{key}':"
        _refuse(key, value, what)
        if holds_boxes(key, value):
            raise RecordError(f"{what} a box of its own", remedy=_WHOLE)
        if TURN_KEYS.get(key) == "weight":
            weight = _weight(value, what.removesuffix(":"))
        else:
            left[f"{short(part.get('type'), 20)} part: {key}"] = value
    return weight, left


def with_spans(text: str, spans: list[tuple[int, int, float]], *, number: int) -> tuple[Part, ...]:
    """Cut a text at the spans that axolotl's train_detail states; they must cover it."""
    parts: list[Part] = []
    at = 0
    # Offsets are inclusive in the file, and every character must be covered: what is not named would get a weight that
    # nobody chose.
    for start, end, weight in sorted(spans):
        if start != at or end > len(text) or end <= start:
            problem = f"turn {number}: train_detail says nothing, or two things, about characters {min(at, start)} on"
            if end > len(text) or end <= start:
                problem = f"turn {number}: train_detail has {start} to {end - 1}, but the text {len(text)} characters"
            raise RecordError(problem, remedy="State every character once, from begin_offset to end_offset inclusive.")
        parts.append(Text(text[start:end], weight))
        at = end
    if at < len(text):
        problem = f"turn {number}: train_detail says nothing about characters {at} to {len(text) - 1}"
        raise RecordError(problem, remedy="State every character once, from begin_offset to end_offset inclusive.")
    return tuple(parts)


def tools_of(value: Any, what: str) -> tuple[Mapping[str, Any], ...]:
    """Read the schemas of tools: a list of objects, or the JSON text of one."""
    value = _parsed(value)
    # Tables have no objects, so sets in parquet keep tools as JSON text.
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        problem = f"{what} is '{short(value)}', not a list of tools"
        raise RecordError(problem, remedy='Write [{"type": "function", "function": {"name", "parameters"}}].')
    return tuple(_schema(tool) for tool in tools)


def _schema(tool: Row) -> Row:
    """A tool as OpenAI describes it; Anthropic has `input_schema` for the parameters of a function."""
    if not isinstance(tool.get("input_schema"), Mapping) or "function" in tool or "parameters" in tool:
        return tool
    others = {key: value for key, value in tool.items() if key != "input_schema"}
    return {"type": "function", "function": {**others, "parameters": tool["input_schema"]}}


def calls_of(value: Any, what: str) -> tuple[Row, ...]:
    """Read tool calls: {"name", "arguments"} or {"function": ...}, one or a list, or the JSON text of them."""
    value = _parsed(value)
    calls = [value] if isinstance(value, Mapping) else value
    read = []
    for call in calls if isinstance(calls, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problem = f"{what} is '{short(call)}', not a call"
            raise RecordError(problem, remedy='Write {"name": "...", "arguments": {...}}, or a list of such calls.')
        plain = {key: item for key, item in function.items() if item is not None and key in ("name", "arguments")}
        read.append({"type": "function", "function": plain} | ({"id": call["id"]} if call.get("id") else {}))
    return tuple(read)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict, tuple)) and len(value) == 0)


def _refuse(key: str, value: Any, what: str) -> None:
    if key in REFUSED and not _empty(value) and value is not False:
        kind, remedy = REFUSED[key]
        raise RecordError(f"{what} {'' if what.endswith(':') else 'is '}{kind}", remedy=remedy)
    # A good mark is read elsewhere and harmless; a bad one must not pass unread into plain tuning.
    no = value is False or (key in FLAGS and value == 0)
    if key in MARKS and (no or (isinstance(value, str) and value.strip().lower() in BAD_MARKS)):
        word = what.removesuffix(":")
        raise RecordError(f"{word} is {short(value)}: a mark that the answer is bad", remedy=_UNLEARN)


def _weight(value: Any, what: str) -> float:
    weight = float(value) if isinstance(value, bool) else value
    problem, remedy = weight_problem(weight)
    if problem:
        raise RecordError(f"{what} has {problem}", remedy=remedy)
    return float(weight)


def _turn_value(key: str, meaning: str, value: Any, *, role: str, number: int) -> Any:
    what = f"turn {number} ({role}): {key}"
    if meaning == "weight":
        return _weight(value, what)
    if meaning == "spans":
        return _spans(value, what)
    owner = "tool" if meaning in ("name", "tool_call_id") else "assistant"
    if role != owner and not _empty(value):
        raise RecordError(f"turn {number} ({role}) has {key}", remedy=f"Only the {owner}'s turns have {key}.")
    if meaning == "tool_calls":
        return calls_of(value, what)
    if not isinstance(value, str):
        raise RecordError(f"{what} is '{short(value)}', not text", remedy="Write it as a JSON string.")
    return value


def _spans(value: Any, what: str) -> list[tuple[int, int, float]]:
    items = value if isinstance(value, list) else [value]
    spans = []
    for item in items:
        keys = ("begin_offset", "end_offset", "train")
        if not isinstance(item, Mapping) or any(key not in item for key in keys):
            raise RecordError(f"{what} has '{short(item)}'", remedy=f"Each entry needs {', '.join(keys)}.")
        start, end = item["begin_offset"], item["end_offset"]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (start, end)):
            raise RecordError(f"{what} has '{short(item)}'", remedy="Offsets are whole numbers, 0 or more.")
        spans.append((start, end + 1, _weight(item["train"], what)))
    return spans


# --- keys of a row: (record, key, value) -> record ----------------------------------------------------------------


def _system(record: Record, key: str, value: Any) -> Record:
    if not isinstance(value, str):
        raise RecordError(f"'{key}' is '{short(value)}', not text", remedy="Write it as a JSON string.")
    if record.turns and record.turns[0].role == "system":
        # Some exports write the system text in both places.
        if record.turns[0].text == value:
            return record
        raise RecordError(f"the row has a system turn and another text in '{key}'", remedy="Keep one of them.")
    return replace(record, turns=(Turn("system", (Text(value),)), *record.turns))


def _tools(record: Record, key: str, value: Any) -> Record:
    return replace(record, tools=(*record.tools, *tools_of(value, f"'{key}'")))


def _thinking(record: Record, key: str, value: Any) -> Record:
    answers = [number for number, turn in enumerate(record.turns) if turn.role == "assistant"]
    if not isinstance(value, str):
        raise RecordError(f"'{key}' is '{short(value)}', not text", remedy="Write it as a JSON string.")
    # Beside a row of several answers nothing says whose thought it is.
    if len(answers) != 1 or record.turns[answers[0]].thinking is not None:
        problem = f"'{key}' stands beside a row with {len(answers)} answers"
        raise RecordError(problem, remedy="Put each thought into its turn, as reasoning_content.")
    turns = list(record.turns)
    turns[answers[0]] = replace(turns[answers[0]], thinking=value)
    return replace(record, turns=tuple(turns))


def _row_weight(record: Record, key: str, value: Any) -> Record:
    return replace(record, weight=record.weight * _weight(value, f"'{key}'"))


def _template_args(record: Record, key: str, value: Any) -> Record:
    value = _parsed(value)
    if not isinstance(value, Mapping):
        raise RecordError(f"'{key}' is '{short(value)}', not an object", remedy='Write {"enable_thinking": true}.')
    return replace(record, template_args={**record.template_args, **value})


def _enable_thinking(record: Record, key: str, value: Any) -> Record:
    return _template_args(record, key, {key: value})


_READ = {
    "system": _system,
    "tools": _tools,
    "thinking": _thinking,
    "weight": _row_weight,
    "train": _row_weight,
    "template_args": _template_args,
    "enable_thinking": _enable_thinking,
}


def _check_choices(record: Record, meta: Row) -> None:
    """Refuse an answer such as "B" to a question whose choices nobody is shown: it would teach a letter alone."""
    key = next((key for key in CHOICES if not _empty(meta.get(key))), None)
    if key is None or not record.turns or record.turns[-1].role != "assistant":
        return
    answer = record.turns[-1].text.strip()
    if not _POINTER.fullmatch(answer):
        return
    value = _parsed(meta[key])
    if isinstance(value, str):  # MMMU's tables hold the list as Python prints it
        value = [one or other for one, other in _QUOTED.findall(value)] or value
    if isinstance(value, Mapping):  # {"A": "cat"}, or ARC's {"text": [...], "label": [...]}
        value = value.get("text", list(value.values()))
    texts = [str(item).strip() for item in (value if isinstance(value, list) else [value])]
    asked = "\n".join(turn.text for turn in record.turns[:-1])
    if answer not in texts and not all(text in asked for text in texts):
        problem = f"the answer '{answer}' points at one of '{key}', which the question does not show"
        raise RecordError(problem, remedy=UNSHOWN)


def _check_storable(meta: Row) -> None:
    """Raise RecordError naming the key whose value a JSON file cannot keep."""
    if not meta or not json_problem(meta, "")[0]:
        return
    for key, value in meta.items():
        if json_problem({key: value}, "")[0]:
            problem = f"'{short(key)}' is {short(value)}, which JSON cannot keep"
            remedy = "Write NaN and Infinity as null or leave the key out; write dates and the like as text."
            raise RecordError(problem, remedy=remedy)
