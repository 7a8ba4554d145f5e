"""A server of `mmit serve` on a socket of its own, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmit.serve.app import Settings, build_app
from mmit.serve.engine import Engine
from mmit.serve.server import Server, listen


@contextmanager
def served(
    models: dict[str, Any], settings: Settings | None = None, *, send_buffer: int = 0, **bounds: int
) -> Iterator[tuple[str, Engine]]:
    """Yield the URL of a server, and its engine; `send_buffer`: bytes that the kernel holds for a client."""
    settings = settings or Settings()
    engine = Engine(models, **bounds)
    server = Server(build_app(engine, settings), engine, grace_s=0.2, head_s=settings.read_s)
    place = listen("127.0.0.1", 0)
    if send_buffer:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield f"http://127.0.0.1:{place.getsockname()[1]}", engine
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
