"""A server's sockets: what it listens on, what it says, clients that stall, and an end that lets answers end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.request
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from mmit.errors import ConfigError
from mmit.serve import server
from mmit.serve.app import Settings
from mmit.serve.server import Server, listen
from tests.serve.client import CHAT, user
from tests.serve.sockets import served
from tests.test_generate import build


class Engine:
    """Is closed once it may be."""

    def __init__(self) -> None:
        self.closed: list[float] = []
        self.may = threading.Event()

    def close(self, grace_s: float) -> None:
        assert self.may.wait(20)
        self.closed.append(grace_s)


def quiet(engine: Engine) -> Server:
    return Server(None, engine, grace_s=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "told"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]")]
)
@pytest.mark.parametrize("browser", [False, True])
def test_the_address_that_is_told_can_be_opened(
    host: str, told: str, browser: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that stands for every address, and one of IPv6; a client may connect before the server has started."""
    opened: list[str] = []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(
        server.threading, "Thread", lambda target, args, daemon: SimpleNamespace(start=lambda: target(*args))
    )
    try:
        place = listen(host, 0)
    except ConfigError:
        if ":" not in host:
            raise
        pytest.skip("this machine has no IPv6")

    def serving(sockets: list[socket.socket]) -> None:
        assert sockets == [place]
        socket.create_connection((told.strip("[]"), place.getsockname()[1]), timeout=5).close()

    with place:
        server.run(SimpleNamespace(run=serving), place, notices=["No key is asked for."], browser=browser)  # type: ignore[arg-type]
        port = place.getsockname()[1]
    said = capsys.readouterr().err
    assert said.startswith("No key is asked for.\n") and f"chat: http://{told}:{port}/ " in said
    assert opened == ([f"http://{told}:{port}"] if browser else [])


def test_an_address_that_cannot_be_had_is_told_with_the_remedy() -> None:
    with listen("127.0.0.1", 0) as place:
        place.listen()
        port = place.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: .*in use") as error:
            listen("127.0.0.1", port)
    assert "--port" in error.value.remedy and "--host" in error.value.remedy


def test_the_engine_ends_before_the_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, order = Engine(), list[str]()

    async def connections_end(self: Any, sockets: Any = None) -> None:
        order.append("connections")
        assert not engine.closed
        engine.may.set()  # both at once: connections wait for the answers that they carry
        while not engine.closed:
            await asyncio.sleep(0.001)

    monkeypatch.setattr(uvicorn.Server, "shutdown", connections_end)
    found = quiet(engine)
    asyncio.run(asyncio.wait_for(found.shutdown(), 20))
    assert engine.closed == [2.5] and order == ["connections"]
    assert found.config.timeout_graceful_shutdown == 7  # whoever is still connected then is cut off


def test_the_server_waits_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, order = Engine(), list[str]()

    async def connections_end(self: Any, sockets: Any = None) -> None:
        asyncio.get_running_loop().call_later(0.02, engine.may.set)
        order.append("connections")

    monkeypatch.setattr(uvicorn.Server, "shutdown", connections_end)

    async def check() -> None:
        await asyncio.wait_for(quiet(engine).shutdown(), 20)
        assert engine.closed == [2.5] and order == ["connections"]

    asyncio.run(check())


def test_a_signal_ends_the_server_and_not_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    found = quiet(Engine())
    with found.capture_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert found.should_exit and not found.force_exit
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# --- clients that stall -----------------------------------------------------------------------------------------------


def health(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        return json.loads(answer.read())["status"]


@pytest.mark.slow
def test_clients_that_send_nothing_are_cut_off() -> None:
    with served({"tiny": build(vision=False)}, Settings(read_s=0.2)) as (url, _):
        for start in (b"", b"POST /v1/chat/com", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea"):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as place:
                place.sendall(start)
                began = time.monotonic()
                with suppress(ConnectionResetError):
                    while place.recv(65536):
                        pass
                assert time.monotonic() - began < 8  # a connection that was used is kept for five seconds


@pytest.mark.slow
def test_a_body_that_turns_malformed_once_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("asyncio"), "error", lambda message, *_, **__: told.append(str(message)))
    with served({"tiny": build(vision=False)}) as (url, _):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as place:
            place.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert place.recv(65536).startswith(b"HTTP/1.1 200")
            place.sendall(b"zz\r\n\r\n")
            with suppress(ConnectionResetError):
                while place.recv(65536):
                    pass
        # And in one piece with its head, to an address that does not read it.
        monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", lambda m, *_, **__: told.append(str(m)))
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as place:
            place.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
            assert place.recv(65536).startswith(b"HTTP/1.1 400")
        assert health(url) == "ok"
    assert told == []


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmit.serve.server.STALL_S", 0.2)
    model = build(vision=False)
    model.vlm.llm.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with served({"tiny": model}, send_buffer=4096) as (url, engine):
        place = socket.socket()
        place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        place.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        asked = {"model": "tiny", "messages": [user()], "max_tokens": 350, "n": 8, "stream": True, "temperature": 5.0}
        asked |= {"logprobs": True, "top_logprobs": 20}
        body = json.dumps(asked).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        place.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until = time.monotonic() + 30
        while not engine.state().ended.get("cancelled", 0):
            assert time.monotonic() < until and not engine.state().ended.get("length", 0), engine.state()
            time.sleep(0.02)
        place.close()
