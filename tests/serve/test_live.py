"""Answers on their way to a client: every event arrives, and one who leaves cancels what was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from mmit.serve import live
from mmit.serve.answering import Answering, Ask, End, Piece
from mmit.serve.live import EventStream, Live, sse


def asked(n: int = 1) -> Answering:
    return Answering(Ask("tiny", prompt="x", n=n), prompt_tokens=1, image_tokens=0)


class Leaving:
    """A client's side of a connection: silent until `left` is set."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def __call__(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


def within(made: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(made(), 5)

    return asyncio.run(limited())


def test_events_of_another_thread_arrive_in_order_until_every_answer_has_ended() -> None:
    events = [Piece(0, "a"), End(1, "stop"), *(Piece(0, str(n)) for n in range(50)), End(0, "length")]

    async def check() -> list[Any]:
        answering = asked(2)
        here = Live(answering, Leaving())
        writing = threading.Thread(target=lambda: [answering.put(event) for event in events])
        writing.start()
        found = [event async for event in here.events() if event is not None]
        writing.join()
        here.leave()
        assert not answering.cancelled  # it had ended
        return found

    assert within(check) == events


def test_a_stream_that_has_nothing_to_say_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PING_S", 0.01)

    async def check() -> None:
        answering = asked()
        events = Live(answering, Leaving()).events()
        assert [await anext(events), await anext(events)] == [None, None]
        answering.put(End(0, "stop"))
        assert [event async for event in events] == [End(0, "stop")]

    within(check)


@pytest.mark.parametrize("waits", [True, False], ids=["while_it_waits", "between_events"])
def test_a_client_that_leaves_cancels(waits: bool) -> None:
    async def check() -> None:
        answering, client = asked(), Leaving()
        here = Live(answering, client)
        answering.put(Piece(0, "a"))
        events = here.events()
        assert await anext(events) == Piece(0, "a") and not here.gone
        if waits:
            asyncio.get_running_loop().call_later(0.01, client.left.set)
        else:
            answering.put(Piece(0, "b"))
            client.left.set()
            await asyncio.sleep(0.01)
        with pytest.raises(ClientDisconnect):
            await anext(events)
        here.leave()
        assert here.gone and answering.cancelled

    within(check)


def test_an_engine_that_outlives_the_loop_may_still_put() -> None:
    async def check() -> Answering:
        answering = asked()
        Live(answering, Leaving())
        return answering

    answering = within(check)
    answering.put(Piece(0, "a"))
    answering.put(End(0, "stop"))
    assert answering.finished


@pytest.mark.parametrize("fails", [None, ClientDisconnect(), BrokenPipeError()])
def test_a_stream_stops_what_runs_whichever_way_it_ends(fails: Exception | None) -> None:
    sent: list[dict[str, Any]] = []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        if fails is not None:
            raise fails
        yield b"two"

    async def send(message: Any) -> None:
        sent.append(message)

    async def check() -> Answering:
        answering = asked()
        stream = EventStream(chunks(), Live(answering, Leaving()))
        await stream({"type": "http"}, Leaving(), send)
        return answering

    assert within(check).cancelled
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream") and b"content-length" not in headers
    assert headers[b"x-accel-buffering"] == b"no"  # nginx would gather the whole answer
    assert [message["body"] for message in sent[1:]] == ([b"one", b"two", b""] if fails is None else [b"one"])
    assert sent[-1].get("more_body") is (fails is not None)


def test_an_event_is_one_line_whatever_its_text_holds() -> None:
    value = {"text": 'a\nb\r\n\n"c" 你好 \u2028 data: x'}
    event = sse(value)
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2 and b"\r" not in event
    assert json.loads(event[6:]) == value and "你好".encode() in event
