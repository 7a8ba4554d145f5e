"""The journal of a build: every request with its reply, one JSON line each, written the moment the reply is there.

One append-only file is cache, resume state and replay file. Its first line holds the settings of the build, and a
journal of other settings is refused. A half line that a killed process left is cut off. `Replay` is a recorded journal
as a teacher: a request that is not in it is an error, or, where the replay is lenient, a reply that says so.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, MmitError
from mmit.io import append, drop_half_line
from mmit.records import json_lines
from mmit.teachers.request import Reply, Request

VERSION = 1
_REPLY = {field.name for field in fields(Reply)}


@dataclass(frozen=True)
class Entry:
    """One line: the reply, the digest of its request, and what it was for."""

    reply: Reply
    digest: str
    purpose: str
    asked: Mapping[str, Any]


class Journal:
    """An open journal. Hold the folder's lock while it is open; `settings` are what decides the requests."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        if path.exists():
            drop_half_line(path)
        settings = json.loads(json.dumps(settings, sort_keys=True))
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            append(path, json.dumps({"journal": VERSION, "settings": settings}, ensure_ascii=False) + "\n")
            return
        found = header(path)["settings"]
        if changed := sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key)):
            key = changed[0]
            problem = f"the journal is of another config: {key} was {found.get(key)!r}, is now {settings.get(key)!r}"
            raise ConfigError(problem, where=str(path), remedy="Give --out a new folder, or restore the setting.")
        self.entries = {entry.reply.id: entry for entry in read_entries(path)}

    def add(self, request: Request, reply: Reply) -> None:
        """Write a reply and keep it. Raises WriteError."""
        row = {"digest": request.digest, "purpose": request.purpose, **request.facts, "reply": asdict(reply)}
        append(self.path, json.dumps(row, ensure_ascii=False) + "\n")
        self.entries[reply.id] = Entry(reply, request.digest, request.purpose, request.facts)


def header(path: Path) -> dict[str, Any]:
    """Return the first line of a journal. Raises ConfigError."""
    first = next((row for _, row in json_lines(path)), None) if path.is_file() else None
    if not isinstance(first, dict) or first.get("journal") != VERSION or not isinstance(first.get("settings"), dict):
        remedy = "Give the journal.jsonl of a build by a teacher."
        raise ConfigError("is not a journal of this version of mmit", where=str(path), remedy=remedy)
    return first


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield the replies of a journal. Raises ConfigError for a damaged line."""
    header(path)
    for number, row in json_lines(path):
        if isinstance(row, dict) and "journal" in row:
            continue
        reply = row.get("reply") if isinstance(row, dict) else None
        if not isinstance(reply, dict) or not {"id", "teacher", "text"} <= reply.keys() <= _REPLY:
            where = f"{path}:{number}"
            raise ConfigError("the line is damaged", where=where, remedy="Remove the line; its request is asked again.")
        asked = {key: row.get(key) for key in ("messages", "draw")}
        yield Entry(Reply(**reply), str(row.get("digest")), str(row.get("purpose")), asked)


@dataclass
class Replay:
    """A journal as a Teacher.

    Attributes:
        only: takes the replies of one teacher of a journal of several.
        lenient: requests that are not recorded get a reply that ends "unrecorded"; else they are an error.
    """

    path: Path
    name: str = ""
    terms: str | None = None
    price: Mapping[str, float] = field(default_factory=dict)
    only: str | None = None
    lenient: bool = False

    def __post_init__(self) -> None:
        self.name = self.name or self.only or "replay"
        self.identity = f"replay:{self.path}#{self.only or ''}"
        self._entries: dict[str, Entry] = {}
        for entry in read_entries(self.path):
            if self.only in (None, entry.reply.teacher):
                self._entries.setdefault(entry.digest, entry)

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Yield the recorded replies. Raises MmitError for a request that is not in the journal, unless lenient."""
        for request in requests:
            entry = self._entries.get(request.digest)
            if entry is None and not self.lenient:
                raise self._unknown(request)
            recorded = Reply("", self.name, "", "unrecorded", 0, 0) if entry is None else entry.reply
            yield request, replace(recorded, teacher=self.name)

    def _unknown(self, request: Request) -> MmitError:
        problem = f"a request for '{request.purpose}' is not in the journal: {request.text[:80]!r}"
        asked = {_text(entry)[:200]: entry for entry in self._entries.values() if entry.purpose == request.purpose}
        close = difflib.get_close_matches(request.text[:200], list(asked)[:2000], n=1, cutoff=0.0)
        near = f" The nearest recorded one is {asked[close[0]].reply.id}." if close else ""
        remedy = f"Replay needs the same config, inputs and seed as the recording, or --lenient.{near}"
        return MmitError(problem, where=str(self.path), remedy=remedy)


def _text(entry: Entry) -> str:
    turns = entry.asked.get("messages") or [{"parts": []}]
    return "".join(part.get("text", "") for part in turns[-1]["parts"])
