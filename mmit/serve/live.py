"""A request's answers on their way to its client, who may leave at any time.

In: the engine's events, from its thread. Out: the same in the event loop, and bytes of a stream. A client that leaves
cancels what it asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from mmit.serve.engine import Answering, End, Event

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

PING_S = 15.0  # a comment in a stream that has nothing to say, so that no proxy takes it for dead


class Live:
    """The events of a request as the event loop sees them; a client that leaves cancels what it asked."""

    def __init__(self, answering: Answering, receive: Receive) -> None:
        self.answering = answering
        self._loop, self._rung = asyncio.get_running_loop(), asyncio.Event()
        self._left = asyncio.create_task(self._watch(receive))
        answering.listen(self._ring)

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        return self._left.done()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._rung.set()

    def _ring(self) -> None:
        with suppress(RuntimeError):  # the loop has ended before the engine
            self._loop.call_soon_threadsafe(self._rung.set)

    async def events(self) -> AsyncIterator[Event | None]:
        """Every event until all answers have ended; None now and then where there is none. Raises ClientDisconnect."""
        unended = self.answering.ask.n
        while unended:
            if self.gone:
                raise ClientDisconnect
            event = self.answering.get()
            if event is not None:
                unended -= isinstance(event, End)
                yield event
                continue
            try:
                await asyncio.wait_for(self._rung.wait(), PING_S)
            except asyncio.TimeoutError:
                yield None
            self._rung.clear()

    def leave(self) -> None:
        """Stop whatever still runs."""
        self._left.cancel()
        if not self.answering.finished:
            self.answering.cancel()


class EventStream(Response):
    """Server-sent events."""

    def __init__(self, chunks: AsyncIterator[bytes], live: Live) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no"}, "text/event-stream")
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._chunks, self._live = chunks, live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come, until the last or until the client has left."""
        start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._live.leave()


def sse(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
