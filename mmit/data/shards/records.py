"""Samples: from the members of one key in a WebDataset tar to a Record, and back.

Owns which members are accepted (an allow-list: text and pictures, nothing that can execute), how large and how many
they may be, and which layouts are understood. Never decodes a picture: bytes go in, an image part with bytes comes out.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, NoReturn, TypeVar

import PIL.Image

from mmit.data.formats.captions import img2dataset
from mmit.data.formats.chat import FORMATS as CONVERSATIONS
from mmit.data.formats.chat import conversation_format
from mmit.data.formats.common import with_shared
from mmit.data.formats.keys import kept_keys
from mmit.data.formats.preferences import read_keys
from mmit.data.images import FORMATS as PICTURES
from mmit.data.images import without_png_text
from mmit.errors import ImageError, RecordError
from mmit.records import Image, Record, Text, Turn, short

T = TypeVar("T")

TEXTS = ("json", "txt")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_LAYOUTS = (
    "A sample is a .json with 'turns' (mmit), 'conversations' (LLaVA, ShareGPT), 'messages' or 'text_list' "
    "(interleaved), or one picture with a .txt (caption); pictures lie beside it under the same key."
)
# Where a name ends and the member's type begins: at the first dot of the last path component, as in WebDataset.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
# The index has 32 bits for a size and 16 for a number of members.
_MOST_BYTES, _MOST_MEMBERS = 0xFFFFFFFF, 0xFFFF
_ORIENTATION_TAG = 0x0112
# What Pillow's EXIF reader is seen to raise for a damaged block, which then counts as none (see images.load_rgb).
_BROKEN_EXIF = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sample may hold; more is refused before it is read."""

    member_bytes: int = 256 << 20
    sample_bytes: int = 512 << 20
    members: int = 256
    key_bytes: int = 1024


def split_name(name: str, *, where: str = "") -> tuple[str, str]:
    """Return (key, suffix) of a member's name: "a/b.0.jpg" -> ("a/b", "0.jpg"). Raises RecordError without a dot."""
    match = _NAME.fullmatch(name)
    if not match:
        remedy = "Name members KEY.jpg, KEY.json and so on."
        raise RecordError(f"member {short(name)} has no extension", where=where, remedy=remedy)
    return match[1], match[2]


def extension(suffix: str) -> str:
    """Return the type of a member: "0.JPG" -> "jpg"."""
    return suffix.rpartition(".")[2].lower()


def is_ignored(name: str, words: Sequence[str]) -> str:
    """Return the word that leaves a member out: its extension ("npy"), or its suffix ("seg.png"); "" if none does."""
    suffix = name.rpartition("/")[2].partition(".")[2].lower()
    return next((w for w in words if w == (suffix if "." in w else extension(suffix))), "")


def check_members(members: Sequence[tuple[str, int]], *, where: str, limits: Limits) -> None:
    """Raise RecordError if the (suffix, bytes) of one sample break the allow-list or a limit, or repeat a suffix."""
    if len(members) > min(limits.members, _MOST_MEMBERS // 2):
        _fail(
            f"{len(members)} members are more than the {limits.members} allowed",
            where,
            "Split the sample.",
        )
    seen: set[str] = set()
    for suffix, size in members:
        if extension(suffix) not in TEXTS + IMAGES:
            remedy = f"Accepted: {', '.join(TEXTS + IMAGES)}. Name this one in `ignore` to leave such members out."
            _fail(f"member '{short(suffix)}' is of a type that is not accepted", where, remedy)
        if suffix in seen:
            _fail(
                f"the member '{short(suffix)}' is there twice",
                where,
                "Give each member a name of its own.",
            )
        if size > min(limits.member_bytes, _MOST_BYTES):
            problem = f"member '{short(suffix)}' of {size:,} bytes is over the limit of {limits.member_bytes:,}"
            _fail(problem, where, "Leave it out, or raise the limit if its origin is trusted.")
        seen.add(suffix)
    # Asked of the headers, before a byte of the sample is read: a tar from anywhere must not decide how much memory is
    # taken.
    total = sum(size for _, size in members)
    if total > limits.sample_bytes:
        problem = f"{total:,} bytes are over the limit of {limits.sample_bytes:,} for one sample"
        _fail(problem, where, "Split the sample, or raise the limit if its origin is trusted.")


def to_record(
    key: str,
    members: Mapping[str, bytes],
    *,
    where: str,
    caption: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    kept: Counter[str] | None = None,
) -> Record:
    """Build the record of one sample; every picture must be used by it.

    The row is the member with the suffix json, a caption the one with the suffix txt; others of these types belong to
    nothing and are refused. Captions are read by mmit.data.formats.captions.img2dataset, conversations and messages by
    their importers; pictures are matched with what the row names (see `_named_members`). Interleaved documents
    (OpenFlamingo): each picture opens a user turn, the sentences from its own to the next picture's are the answer;
    what comes before the first picture is the user's.

    Args:
        key: of the sample. members: {suffix: bytes}. where: shard and key, for errors.
        caption: options of captions: instruction, seed. options: those that all formats share: boxes, thoughts.
        sizes: (W, H) of pictures that are not all there. kept: counts keys that stay in the meta unread.

    Raises:
        RecordError: what is wrong with the sample, with `where`.
    """
    images = {s: d for s, d in members.items() if extension(s) in IMAGES}
    pictures = {s: Image(d, (sizes or {}).get(s)) for s, d in images.items()}
    texts = [s for s in members if s == "txt"]
    if empty := [s for s, data in images.items() if not data]:
        _fail(f"member {short(empty[0])} is empty", where, "Fetch the picture again, or leave the sample out.")
    row: Any = None
    # Other texts could be captions, alt texts or prompts. Which of them to learn is the user's to say.
    if unread := [s for s in members if extension(s) in TEXTS and s not in TEXTS]:
        remedy = f"Only KEY.json and KEY.txt are read. Leave such members out: --ignore {unread[0]}."
        _fail(f"member '{short(unread[0])}' is neither the row nor the caption", where, remedy)
    if "json" in members:
        row = _json(members["json"], "json", where)
    keys = row.keys() if isinstance(row, dict) else ()
    # Told by keys, in the order of how sure they are; a caption is what is left with one picture and a text.
    if "turns" in keys and not texts:
        # Checked by from_json; filling in the bytes breaks no rule.
        return _with_bytes(Record.from_json(row, where=where), key, images, where=where)
    if "text_list" in keys and not texts:
        record = _interleaved(row, images, where)
        record = _placed(lambda: read_keys(record), where)
    elif ("conversations" in keys or "messages" in keys) and not texts:
        record = _foreign(row, pictures, key, where)
    elif len(images) == 1 and (texts or "caption" in keys):
        record = _caption(key, members, row, options=caption or {}, where=where)
    else:
        found = ", ".join(short(s, 40) for s in list(members)[:8])
        _fail(f"cannot tell what the sample is (members: {found})", where, _LAYOUTS)
    # A key is unique within its tar, and what other tools call the sample by.
    record = record if record.id else replace(record, id=key)
    record = _placed(lambda: with_shared(record, options or {}), where)
    _placed(lambda: record.validate(for_training=None), where)
    if kept is not None:
        kept.update(kept_keys(record))
    return record


def from_record(record: Record, key: str, pictures: Sequence[bytes]) -> dict[str, bytes]:
    """Return the members {suffix: bytes} of a record whose image parts hold `pictures`, in reading order.

    Equal pictures of one record are stored once. The JSON is the canonical one, its image parts being the names of
    members.
    """
    members: dict[str, bytes] = {}
    known: dict[bytes, str] = {}
    names = []
    for data in pictures:
        # By bytes: two parts that show the same picture name one member.
        if data not in known:
            known[data] = f"{len(known)}.{_EXTENSION[picture_format(data, where=record.where)]}"
            members[known[data]] = data
        names.append(f"{key}.{known[data]}")
    named = iter(names)
    turns = tuple(
        replace(t, parts=tuple(Image(next(named)) if isinstance(p, Image) else p for p in t.parts))
        for t in record.turns
    )
    # Contract: image parts name members as KEY.SUFFIX, so that any WebDataset reader with the same key can follow the
    # row.
    row = replace(record, turns=turns).to_json()
    members["json"] = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return members


def picture_format(data: bytes, *, where: str) -> str:
    """Return the name in images.FORMATS that the first bytes of a picture tell. Raises ImageError."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM":
        return "BMP"
    problem = f"not a {', '.join(PICTURES)} picture (it begins with {data[:8]!r})" if data else "the image is empty"
    raise ImageError(problem, where=where, remedy="Convert it, fetch it again if it is damaged, or leave it out.")


def picture_size(data: bytes, *, where: str) -> tuple[int, int]:
    """Return (width, height) as seen, EXIF orientation applied, from the header alone. Raises ImageError."""
    try:
        with PIL.Image.open(BytesIO(data), formats=PICTURES) as picture:
            width, height = picture.size
            try:
                # These four lie on their side: width and height change places. `load_rgb` turns the pixels likewise.
                turned = picture.getexif().get(_ORIENTATION_TAG) in (5, 6, 7, 8)
            except _BROKEN_EXIF:
                turned = False
    except MemoryError:
        raise
    except Exception as error:
        if (bare := without_png_text(data)) is not None:
            return picture_size(bare, where=where)
        # Pillow's plugins raise whatever a malformed header leads to (struct.error, KeyError, ...).
        cause = f"cannot read its header ({len(data):,} bytes): {short(str(error) or type(error).__name__)}"
        remedy = "Fetch the picture again, or leave the record out."
        raise ImageError(cause, where=where, remedy=remedy) from error
    return (height, width) if turned else (width, height)


def _fail(problem: str, where: str, remedy: str) -> NoReturn:
    raise RecordError(problem, where=where, remedy=remedy)


def _json(data: bytes, suffix: str, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        _fail(
            f"{short(suffix)} is not JSON: {short(str(error))}",
            where,
            "Write the sample again, or leave it out.",
        )


def _with_bytes(record: Record, key: str, images: Mapping[str, bytes], *, where: str) -> Record:
    """Replace image parts that name members by the members' bytes."""
    used: set[str] = set()

    def fill(part: Text | Image) -> Text | Image:
        if not isinstance(part, Image) or not isinstance(part.source, str):
            return part
        suffix = part.source.removeprefix(f"{key}.")
        if suffix not in images:
            have = ", ".join(short(s, 30) for s in images) or "none"
            _fail(
                f"image part {short(part.source)} is no member (pictures: {have})",
                where,
                "Write it again.",
            )
        used.add(suffix)
        return Image(images[suffix])

    turns = tuple(replace(turn, parts=tuple(fill(part) for part in turn.parts)) for turn in record.turns)
    # A picture that nobody shows is a sign that row and pictures do not belong together.
    if unused := images.keys() - used:
        problem = f"{', '.join(map(short, sorted(unused)))} is shown by no image part"
        _fail(problem, where, "Name it in an image part, or leave it out of the tar.")
    return replace(record, turns=turns)


def _placed(work: Callable[[], T], where: str) -> T:
    """What `work` returns; its error gets the place of the sample."""
    try:
        return work()
    except RecordError as error:
        raise type(error)(error.problem, where=where, remedy=error.remedy) from error


def _foreign(row: dict[str, Any], images: Mapping[str, Image], key: str, where: str) -> Record:
    """Read a conversation or messages by their importer; the members take the places of what the row names."""
    # Only where the row names nothing does the order of members decide, numbers in them counted as numbers.
    names = sorted(images, key=_natural)
    given = next((row[name] for name in ("image", "images") if row.get(name)), None)
    if names and given is None and not _parts_name_files(row):
        row = {k: v for k, v in row.items() if k not in ("image", "images")} | {"images": names}
    try:
        format = "messages" if "messages" in row else conversation_format([row])[0]
        record = read_keys(CONVERSATIONS[format].row(row, image_root=""))
    except RecordError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise RecordError(error.problem, where=place, remedy=error.remedy) from error
    # Each name once: a picture that the row shows twice is one member.
    paths = list(dict.fromkeys(i.source for i in record.images if isinstance(i.source, str)))
    held = _named_members(paths, names, key, where)

    def fill(part: Text | Image) -> Text | Image:
        name = held.get(part.source) if isinstance(part, Image) and isinstance(part.source, str) else None
        return part if name is None else images[name]

    return replace(record, turns=tuple(replace(t, parts=tuple(map(fill, t.parts))) for t in record.turns))


def _parts_name_files(row: Mapping[str, Any]) -> bool:
    """Tell whether an image part of the messages names a file."""
    lists = [row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)]
    turns: list[Any] = lists[0] if lists else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    keys = ("image", "url", "path", "image_url")
    return any(isinstance(part, Mapping) and any(part.get(name) for name in keys) for part in parts)


def _named_members(paths: Sequence[str], names: Sequence[str], key: str, where: str) -> dict[str, str]:
    """Return {what the row names: suffix of the member}; every name must be one member's, and every member named.

    A name is a member's whole path, its suffix, or has the same last component as one of these. One picture
    whose member has no name of its own (KEY.jpg, KEY.0.jpg) is the one that the row names, whatever it is called.
    """
    held: dict[str, str] = {}
    for path in paths:
        # Rows keep the paths of the machine that they were written on, Windows' among them; the name of the file is
        # what both have.
        asked = path.replace("\\", "/").rpartition("/")[2]
        whole = {name: f"{key}.{name}" for name in names}
        fits = [n for n in names if path in (whole[n], n)]
        fits = fits or [n for n in names if asked in (whole[n].rpartition("/")[2], n)]
        # Of several that fit none is taken: which one was meant cannot be told, and a wrong picture would be learned
        # without an error.
        if len(fits) == 1:
            held[path] = fits[0]
    # A member that is only numbered has no name that the row could be compared with.
    nameless = len(names) == 1 and re.fullmatch(r"(?:[0-9]+\.)?[^.]+", names[0])
    if len(paths) == 1 and not held and nameless:
        held[paths[0]] = names[0]
    have = ", ".join(short(name, 30) for name in names) or "none"
    if missing := [path for path in paths if path not in held]:
        remedy = "Name each picture by its member: KEY.SUFFIX, or SUFFIX."
        _fail(f"the row names the picture '{short(missing[0])}', which is no member (pictures: {have})", where, remedy)
    if unused := [name for name in names if name not in held.values()]:
        problem = f"{', '.join(map(short, unused))} is named by no image of the row"
        _fail(problem, where, "Name it in the row, or leave it out of the tar.")
    return held


def _natural(name: str) -> list[tuple[int, str]]:
    """Order "2.jpg" before "10.jpg"."""
    # Known limit: digits beyond 18 are cut into several numbers.
    return [(int(p), "") if p.isdecimal() else (0, p) for p in re.findall(r"[0-9]{1,18}|[^0-9]+", name)]


def _caption(key: str, members: Mapping[str, bytes], row: Any, *, options: Mapping[str, Any], where: str) -> Record:
    # The suffix of the one picture may be numbered.
    sample = {extension(suffix) if extension(suffix) in IMAGES else suffix: data for suffix, data in members.items()}
    return _placed(lambda: read_keys(img2dataset({**sample, "__key__": key, "json": row}, **options)), where)


def _interleaved(row: dict[str, Any], images: Mapping[str, bytes], where: str) -> Record:
    sentences, pictures = row.get("text_list"), row.get("image_info") or []
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        _fail("'text_list' is not a list of strings", where, _LAYOUTS)
    # Pictures of a document lie inside its JSON: with members beside it, which of them a sentence means could not be
    # told.
    if images or not isinstance(pictures, list) or not all(isinstance(p, dict) for p in pictures):
        _fail(
            "pictures of an interleaved document belong into 'image_info' as 'image_base64'",
            where,
            _LAYOUTS,
        )
    at: dict[int, list[Image]] = {}
    for number, info in enumerate(pictures):
        place = info.get("matched_text_index", number)
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(sentences):
            _fail(
                f"picture {number + 1} matches no sentence of {len(sentences)}",
                where,
                "Fix matched_text_index.",
            )
        at.setdefault(place, []).append(Image(_base64(info.get("image_base64"), number, where)))
    if not at:
        _fail("the document has no picture", where, "Import text without pictures from JSONL instead.")
    # By sentence and not by the order of pictures, which OpenFlamingo leaves open.
    starts = sorted(at)
    turns = []
    for n, start in enumerate(starts):
        end = starts[n + 1] if n + 1 < len(starts) else len(sentences)
        context = (Text(" ".join(sentences[:start]) + "\n"),) if n == 0 and start else ()
        # The pictures open a user turn and the sentences after them are the answer, so that text is learned given what
        # it describes.
        turns.append(Turn("user", (*context, *at[start])))
        turns.append(Turn("assistant", (Text(" ".join(sentences[start:end])),)))
    # The matrix and the pictures are what the turns were made of; the rest is provenance.
    meta = {k: v for k, v in row.items() if k not in ("text_list", "image_info", "similarity_matrix")}
    return Record(tuple(turns), meta=meta)


def _base64(text: Any, number: int, where: str) -> bytes:
    try:
        # Strict: without it characters that are no base64 are skipped, and a damaged picture would be another one.
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        remedy = "Write the encoded picture's bytes with base64.b64encode."
        raise RecordError(f"picture {number + 1} is not base64", where=where, remedy=remedy) from error
    return data
