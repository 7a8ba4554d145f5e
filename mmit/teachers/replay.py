"""A teacher that replays a recorded journal.

A request that is not in it is an error, or, where the replay is lenient, a reply that says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmit.errors import MmitError
from mmit.teachers.journal import Entry, read_entries
from mmit.teachers.request import Reply, Request


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
