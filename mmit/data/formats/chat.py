"""Conversations: LLaVA and its kin, ShareGPT, OpenAI messages, Qwen-VL, any list of turns, mmit's own rows.

Each function makes one Record of one row. "<image>" is a marker here and only here: afterwards images are parts.
Keys beside speaker and text are read by mmit/data/formats/keys.py, or refused there, with the turn's role.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from mmit.data.formats.anthropic import without_blocks
from mmit.data.formats.boxes import PLACE
from mmit.data.formats.common import Format, Row, by_name, id_of, images_of, objects_of, rest, text_of
from mmit.data.formats.keys import calls_of, part_extras, turn_extras, with_spans
from mmit.data.formats.pictures import (
    IMG_PATH,
    MARKER,
    content_part,
    foreign_marker,
    place_images,
    place_paths,
)
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Part, Record, Text, Turn, short

Dialogue = list[Turn]
BOX_PARTS = ("bbox", "box", "point")  # types of parts, and the key of their numbers
_BOXES = "boxes of parts"
# A speaker that makes a call is an assistant whose text is the call.
_CALL = "call"
_LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
MESSAGE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = {
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response", "function", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}
ROLES = {
    **_LLAVA_ROLES,
    **MESSAGE_ROLES,
    **dict.fromkeys(("chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **_TOOL_ROLES,
}


def said(role: str, text: str) -> Turn:
    """A turn of one text."""
    return Turn(cast("Any", role), (Text(text),))


def llava(row: Row, *, image_root: str = "") -> Record:
    """LLaVA: {"id", "image": path or list, "conversations": [{"from": "human"|"gpt", "value"}]}.

    The files: blip_laion_cc_sbu_558k.json, llava_instruct_150k.json, llava_v1_5_mix665k.json, and those of
    ShareGPT4V. Without `image` the row is text-only (40,688 rows of mix665k). As in LLaVA, a single image moves to
    the front of its turn, whose text is stripped (a newline between them is the chat format's affair), and a
    leading gpt turn is dropped; its text stays in meta["dropped_leading_turn"], so that drops can be counted.
    Several images stay where their markers are, the text between them unchanged. One image without a marker opens
    the first human turn. Raises RecordError if markers and images differ in number, or if a marker is not in a
    human turn.
    """
    images = images_of(row, image_root)
    dialogue, meta = read_turns(row, _LLAVA_ROLES, root=image_root)
    if images is None and any(MARKER in turn.text for turn in dialogue):
        raise RecordError(
            f"the text has {MARKER} but the row has no 'image'",
            remedy=f'Add "image": "path", or "image": [] if {MARKER} is meant as ordinary text.',
        )
    return Record(place_images(dialogue, images, front=True), id=id_of(row), meta=meta)


def sharegpt(row: Row, *, image_root: str = "") -> Record:
    """ShareGPT: like LLaVA with more speaker names, among them those of tools; every "<image>" keeps its place.

    "<image>" is a marker only in rows with `image` or `images`; elsewhere it is text.
    """
    dialogue, meta = read_turns(row, ROLES, root=image_root)
    return Record(place_images(dialogue, images_of(row, image_root)), id=id_of(row), meta=meta)


def allava(row: Row, *, image_root: str = "") -> Record:
    """ALLaVA: pictured rows as LLaVA's, a single image opening its turn.

    Its text-only part (Evol-Instruct-GPT4-Turbo-143K.json) quotes HTML, so that "<image>" is text there.
    """
    dialogue, meta = read_turns(row, ROLES, root=image_root)
    return Record(place_images(dialogue, images_of(row, image_root), front=True), id=id_of(row), meta=meta)


def qwen_vl(row: Row, *, image_root: str = "") -> Record:
    """Qwen-VL: {"id", "conversations": [{"from": "user", "value": "Picture 1: <img>path</img>\\nWhat?"}, ...]}.

    "<img>path</img>" is the picture at that path, in that place; "Picture 1: " stays text, as Qwen-VL reads it.
    "<ref>name</ref><box>(x1,y1),(x2,y2)</box>" is a box, which the option `boxes` says how to write.
    """
    dialogue, meta = read_turns(row, ROLES, root=image_root)
    if images_of(row, image_root):
        problem = "the row has pictures beside the text as well"
        raise RecordError(problem, remedy="Import it as sharegpt, or write every picture as <img>path</img>.")
    return Record(place_paths(dialogue, image_root), id=id_of(row), meta=meta)


def messages(row: Row, *, image_root: str = "") -> Record:
    """OpenAI messages: {"messages": [{"role", "content": text or a list of text and image parts}]}.

    A picture is a path, a file:// or a base64 data: URL, in the forms of OpenAI ({"type": "image_url"}) and
    transformers ({"type": "image", "image" | "url" | "path" | "base64"}); its `detail` is not kept. Pictures may also
    lie beside the messages, in `images`: then "<image>" marks their places in content that is text, and
    {"type": "image"} parts without a picture do in content that is a list (ms-swift, LLaMA-Factory, TRL). In a list
    {"type": "bbox", "bbox": [x1, y1, x2, y2]} is a box, as are box and point; `objects` may hold them too. A leading
    system text may stand in `system`, schemas of tools in `tools`; calls and results may be Anthropic's blocks. Raises
    RecordError for http(s) URLs and if places and pictures differ in number.
    """
    key = next((name for name in ("messages", "conversations", "conversation") if name in row), "messages")
    beside = images_of(row, image_root) or []
    turns, extras = _turns(without_blocks(objects_of(row, key)), ROLES, root=image_root, beside=beside)
    return Record(turns, id=id_of(row), meta=_meta(rest(row, key), extras))


def chat(
    row: Row,
    *,
    image_root: str = "",
    turns: str = "messages",
    role: str = "role",
    content: str = "content",
    roles: Any = None,
    images: str | None = None,
) -> Record:
    """A list of turns under any keys. Every "<image>" keeps its place.

    Args:
        row: an object that holds the list.
        image_root: where relative image paths start.
        turns: key of the list; dots step into objects.
        role: key of a turn's speaker.
        content: key of what is said.
        roles: maps the file's speakers to system, user, assistant and tool, as "person=user,bot=assistant"; common
            names need no mapping.
        images: key of the pictures, by default image or images.

    Raises:
        RecordError: a row without these keys, or turns that make no dialogue. ConfigError: an option that cannot work.
    """
    known = {**ROLES, **_roles_option(roles)}
    outer, _, key = turns.rpartition(".")
    # Dots step into objects, since exports of chats nest their turns.
    inner: Any = row
    for step in outer.split(".") if outer else ():
        inner = inner.get(step) if isinstance(inner, Mapping) else None
    if not isinstance(inner, dict) or key not in inner:
        problem = f"the row has no '{turns}' (option turns)"
        raise RecordError(problem, remedy=f"Say which key holds the turns; the row has {short(list(row)[:12], 120)}.")
    pictured = row if images is None else {"images": row.get(images)}
    beside = images_of(pictured, image_root) or []
    read, extras = _turns(objects_of(inner, key), known, root=image_root, beside=beside, keys=(role, content))
    return Record(read, id=id_of(row), meta=_meta(rest(row, turns.split(".")[0], images or "images"), extras))


def _roles_option(roles: Any) -> dict[str, str]:
    if isinstance(roles, str):
        pairs = [pair.partition("=") for pair in roles.split(",") if pair.strip()]
        roles = {name.strip(): ours.strip() for name, _, ours in pairs}
    if roles is not None and not isinstance(roles, Mapping):
        raise ConfigError(
            f"option roles is '{short(roles)}'", remedy='Write "person=user,bot=assistant", or a mapping.'
        )
    valid = ("system", "user", "assistant", "tool", _CALL)
    for name, ours in (roles or {}).items():
        if ours not in valid:
            raise ConfigError(f"option roles maps '{short(name)}' to '{short(ours)}'", remedy=nearest(str(ours), valid))
    return {str(name): str(ours) for name, ours in (roles or {}).items()}


def mmit_row(row: Row, *, image_root: str = "") -> Record:
    """mmit's own rows, as `mmit.records.write_jsonl` writes them."""
    return Record.from_json(row, root=image_root)


def read_turns(
    row: Row, roles: dict[str, str] | None = None, *, key: str = "conversations", root: str = ""
) -> tuple[Dialogue, Row]:
    """Read a row's list of turns.

    Args:
        row: an object that holds the list.
        roles: maps the file's speaker names to ours, by default LLaVA's.
        key: of the list.
        root: where the relative paths of images start that turns list themselves.

    Returns:
        the dialogue, with the images of its turns in place; the meta, with a leading assistant turn that was dropped.

    Raises:
        RecordError: no such list, or a turn that cannot be read.
    """
    items = objects_of(row, key)
    turns, extras = _turns(items, roles or _LLAVA_ROLES, root=root, beside=None)
    if row.get("image") or row.get("images"):
        _no_images_in(items)
    dialogue, meta = list(turns), _meta(rest(row, key), extras)
    start = 1 if dialogue[0].role == "system" else 0
    if len(dialogue) > start and dialogue[start].role == "assistant" and not dialogue[start].tool_calls:
        meta["dropped_leading_turn"] = dialogue.pop(start).text
    return dialogue, meta


def _meta(meta: Row, extras: Sequence[Row]) -> Row:
    """The row's meta, with what is left of its turns, and with the boxes that are parts of them as `objects`."""
    boxes = [part for left in extras for part in left.pop(_BOXES, ())]
    if boxes and meta.get("objects"):
        raise RecordError("boxes stand in parts and in 'objects'", remedy="Keep one of them.")
    if boxes:
        which = [part["image_id"] for part in boxes if "image_id" in part]
        meta = {**meta, "objects": {"bbox": [part.get(part["type"]) for part in boxes], "image_id": which}}
    return {**meta, "turn_keys": list(extras)} if any(extras) else meta


def _turns(
    items: Sequence[Row],
    roles: Mapping[str, str],
    *,
    root: str,
    beside: Sequence[Image] | None,
    keys: tuple[str, str] | None = None,
) -> tuple[tuple[Turn, ...], list[Row]]:
    """Read turns with their keys; return them, pictures in place, and the keys that are left, turn by turn.

    `beside` are the pictures of the row, None to leave markers as text. `keys` names speaker and text.
    """
    turns: Dialogue = []
    extras: list[Row] = []
    in_lists = any([isinstance(item.get("content"), list) for item in items])
    left = iter(beside or ())
    if beside:
        _no_images_in(items)
    for number, item in enumerate(items, 1):
        # Told turn by turn: some files mix both spellings.
        named = keys or (("from", "value") if "from" in item or "role" not in item else ("role", "content"))
        label = "turn" if named[0] == "from" else "message"
        said_by = item.get(named[0])
        role = _role_of(said_by, roles) or by_name(said_by, cast("Any", roles), f"turn {number} is said by")
        call, role = role == _CALL, "assistant" if role == _CALL else role
        found, rest_of = turn_extras(item, role, number, used=(*named, "image", "images"))
        content = item.get(named[1])
        own = images_of(item, root)
        parts: tuple[Part, ...]
        if isinstance(content, list) and not call:
            thoughts, content = _thoughts(content)
            found = {**({"thinking": thoughts} if thoughts is not None else {}), **found}
            # Image parts without a picture take those of the turn, else the next of the row, in the order of reading.
            places = iter(own) if own else left
            parts = tuple(_part(part, role, number, rest_of, root=root, beside=places) for part in content)
            if own and (unplaced := len(list(places))):
                problem = f"{unplaced} of {len(own)} images of turn {number} ({role}) have no place in its content"
                raise RecordError(problem, remedy='Give each its place: {"type": "image"}.')
        elif call or (content is None and found.get("tool_calls")):
            parts = ()
            if call:
                found["tool_calls"] = calls_of(content, f"{named[1]} of {label} {number}")
        else:
            text = content if isinstance(content, str) else text_of(content, f"{named[1]} of {label} {number}")
            spans = found.pop("spans", None)
            parts = (Text(text),) if spans is None else with_spans(text, spans, number=number)
        if "spans" in found:
            problem = f"turn {number} ({role}) has train_detail, but its content is no text"
            raise RecordError(problem, remedy="Write the content as one text.")
        turn = Turn(cast("Any", role), parts, **found)
        if own and not isinstance(content, list):
            turn = _with_own(turn, own, number)
        if call and turns and turns[-1].role == "assistant":  # its text, or a parallel call, came before
            turns[-1] = replace(turns[-1], tool_calls=(*turns[-1].tool_calls, *turn.tool_calls))
            extras[-1] |= rest_of
            continue
        turns.append(turn)
        extras.append(rest_of)
    return _pictured(turns, beside, list(left), in_lists=in_lists) if beside else tuple(turns), extras


def _role_of(said_by: Any, roles: Mapping[str, str]) -> str:
    """The role of a speaker, "" if it is none of `roles`; "User" and "GPT" are user and gpt."""
    if not isinstance(said_by, str):
        return ""
    return roles.get(said_by) or roles.get(said_by.strip().lower(), "")


def _no_images_in(items: Sequence[Row]) -> None:
    for number, item in enumerate(items, 1):
        if key := next((key for key in ("image", "images") if item.get(key)), None):
            problem = f"the row has images, and so has turn {number} ('{key}')"
            raise RecordError(problem, remedy="List all of them in one place: in the turns, or beside them.")


def _with_own(turn: Turn, own: Sequence[Image], number: int) -> Turn:
    """The turn with the images that it lists itself: where its markers are, or one without a marker at its front."""
    if turn.role == "system" or not turn.parts:
        problem = f"turn {number} ({turn.role}) lists images"
        raise RecordError(problem, remedy="Move them to the turn whose text they belong to.")
    if len(own) == 1 and MARKER not in turn.text and not foreign_marker(turn.text):
        return replace(turn, parts=(*own, *turn.parts))
    try:
        return place_images((turn,), own)[0]
    except RecordError as error:
        raise RecordError(f"turn {number} ({turn.role}): {error.problem}", remedy=error.remedy) from None


def _part(part: Any, role: str, number: int, left: Row, *, root: str, beside: Iterator[Image]) -> Part:
    """Read one part of a content list; keys that nothing reads, and boxes, go into `left`."""
    if isinstance(part, Mapping) and part.get("type") in BOX_PARTS:
        left.setdefault(_BOXES, []).append(part)
        return Text(PLACE)
    read = content_part(part, root, number, beside)
    weight, others = part_extras(part, role, number)
    left |= others
    if weight is not None and isinstance(read, Image):
        raise RecordError(f"an image part of turn {number} has a weight", remedy="Only text carries loss: remove it.")
    return replace(read, weight=weight) if weight is not None and isinstance(read, Text) else read


def _pictured(turns: Dialogue, beside: Sequence[Image], unused: list[Image], *, in_lists: bool) -> tuple[Turn, ...]:
    """Give the row's pictures their places: markers in texts, or the image parts that have taken them."""
    if not in_lists:
        return place_images(turns, beside)
    # By identity: a picture of the row that has taken a place is the same object, and an equal one in a part is not.
    own = {id(image) for image in beside}
    named = [p.source for turn in turns for p in turn.parts if isinstance(p, Image) and id(p) not in own]
    # A picture that a part names may be listed beside the messages as well.
    if missing := [image for image in unused if image.source not in named]:
        remedy = 'Give each its place in the content: {"type": "image"}.'
        raise RecordError(f"{len(missing)} of {len(beside)} images have no place in the messages", remedy=remedy)
    return tuple(turns)


def _thoughts(content: list[Any]) -> tuple[str | None, list[Any]]:
    """Split the thinking parts off a content list: {"type": "thinking" | "reasoning", "thinking" | "text"}."""
    kinds = ("thinking", "reasoning")
    thoughts = [part for part in content if isinstance(part, Mapping) and part.get("type") in kinds]
    if not thoughts:
        return None, content
    texts = [
        next((p[k] for k in ("thinking", "reasoning", "text") if isinstance(p.get(k), str)), None) for p in thoughts
    ]
    if None in texts:
        raise RecordError("a thinking part has no text", remedy='Write {"type": "thinking", "thinking": "..."}.')
    return "".join(cast("list[str]", texts)), [part for part in content if part not in thoughts]


def conversation_format(rows: Sequence[Any]) -> tuple[str, str]:
    """Tell which format rows with 'conversations' have, from speakers and images: (name, reason)."""
    dicts = [row for row in rows if isinstance(row, dict)]
    lists = [row.get("conversations") for row in dicts]
    if lists and isinstance(lists[0], list) and lists[0] and all(isinstance(text, str) for text in lists[0]):
        return "lima", "'conversations' is a list of texts"
    turns = [t for value in lists if isinstance(value, list) for t in value if isinstance(t, dict)]
    # Keys decide before contents: LLaVA and ShareGPT share `conversations`, and only speakers and pictures tell them
    # apart.
    if turns and "role" in turns[0]:
        return "messages", "the first row has 'conversations' whose turns have 'role'"
    pictured = any("image" in holder or "images" in holder for holder in (*dicts, *turns))
    if not pictured and any(isinstance(t.get("value"), str) and IMG_PATH.search(t["value"]) for t in turns):
        return "qwen_vl", "'conversations' have pictures as <img>path</img>"
    if not {str(turn.get("from")).strip().lower() for turn in turns} <= set(_LLAVA_ROLES):
        return "sharegpt", "'conversations' has speakers other than human, gpt and system"
    if not pictured:
        return "sharegpt", f"rows have 'conversations', and none of the first {len(rows)} an 'image'"
    return "llava", "rows have 'conversations' and 'image'"


FORMATS = {
    "llava": Format("LLaVA conversations, with or without images", llava),
    "sharegpt4v": Format("ShareGPT4V, rows as LLaVA's", llava, licence="CC-BY-NC-4.0"),
    "allava": Format("ALLaVA, rows as LLaVA's; its text-only part quotes <image>", allava),
    "sharegpt": Format("conversations with more speaker names than LLaVA's, tools among them", sharegpt),
    "qwen_vl": Format("Qwen-VL conversations with pictures as <img>path</img>", qwen_vl, spells_boxes=True),
    "messages": Format("OpenAI messages with image parts, or images beside them", messages, detect=("messages",)),
    "chat": Format(
        "a list of turns under any keys, speakers mapped by name",
        chat,
        options={
            "turns": "key of the list of turns, default messages; dots step into objects",
            "role": "key of the speaker in a turn, default role",
            "content": "key of what is said, default content",
            "roles": 'speakers of the file, as "person=user,bot=assistant"',
            "images": "key of the pictures, default image or images",
        },
    ),
    "mmit": Format("mmit's own records", mmit_row, detect=("turns",), own=True),
}
