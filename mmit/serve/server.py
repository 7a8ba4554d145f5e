"""A server as a process: sockets, clients that stall, and an end that running answers live to see.

On SIGTERM or Ctrl-C nothing new is taken; what runs or waits may end within the grace, and what has not by then is told
so.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmit.errors import ConfigError
from mmit.text import echo

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from mmit.serve.engine import Engine

STALL_S = 30.0  # without a client reading what it is sent
CONNECTIONS = 1000  # at a time; 503 beyond


class _Connection(H11Protocol):
    """A connection that ends where its client stalls: uvicorn waits for ever for a head, and for a reader."""

    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, head_s: float, **more: Any) -> None:
        super().__init__(*given, **more)
        self._head_s = head_s

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(self._head_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # a body that turns malformed once it is answered: no second answer can be sent
            self.transport.abort()
            return
        awaited = self.cycle is None or self.cycle.response_complete
        if not awaited:
            _stop(self._late)
            self._late = None
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self._head_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Of a body that turns malformed while it is read: the application has nobody to answer any more."""
        super().send_400_response(msg)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._late)
        _stop(self._stalled)
        super().connection_lost(exc)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """Serves an application until a signal, and closes its engine.

    Args:
        grace_s: seconds that running answers have then. head_s: seconds for the head of a request to come.
    """

    def __init__(self, app: ASGIApp, engine: Engine, *, grace_s: float, head_s: float = 15.0) -> None:
        quiet: dict[str, Any] = {"log_config": None, "log_level": "error", "access_log": False}
        connection: Any = partial(_Connection, head_s=head_s)
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                lifespan="on",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=int(grace_s) + 5,
                **quiet,
            )
        )
        self._engine, self._grace_s = engine, grace_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the process ends in peace instead of by the signal that it was sent."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the engine's answers end, and then the connections that carry them."""
        closing = asyncio.create_task(asyncio.to_thread(self._engine.close, self._grace_s))
        await super().shutdown(sockets)
        await closing


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on which the server will listen; port 0 takes a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        problem = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        raise ConfigError(problem, remedy="Give another --port (0: a free one) or --host.") from error
    return found


def run(server: Server, place: socket.socket, *, notices: Sequence[str] = (), browser: bool = False) -> None:
    """Serve until a signal; says where.

    Args:
        server: not started yet. place: a bound socket, from `listen`.
        notices: lines that are told before the address.
        browser: open one at the chat page.
    """
    host, port = place.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    for notice in notices:
        echo(notice, err=True)
    # Which byte of a client's form is wrong is for the client, who is told.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    place.listen(128)  # whoever connects before the server has started waits
    echo(f"chat: {url}/   OpenAI API: {url}/v1   (Ctrl-C ends)", err=True)
    if browser:
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    server.run(sockets=[place])
