"""An OpenAI-compatible server on 127.0.0.1 that misbehaves on request, and counts what it served."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], "str | tuple[str, str]"]  # the text, or the text and how it ends


class Server:
    """Answers with `answer(body)`; `faults` are used up first, one a request: see `_Handler._fault`."""

    def __init__(
        self,
        answer: Answer = lambda body: "yes",
        *,
        usage: bool = True,
        count: Callable[[dict[str, Any]], int] = lambda body: len(json.dumps(body["messages"])) // 4,
    ) -> None:
        self.answer, self.usage, self.count = answer, usage, count
        self.faults: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.prompt_tokens = self.new_tokens = self.served = self.at_once = self.most_at_once = 0
        self.pause = 0.0
        self.finish = "stop"
        self.lock = threading.Lock()
        server = self

        class Handler(_Handler):
            owner = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # a body waits for nobody to acknowledge its headers: 40 ms
    owner: Server

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.bodies.append(body)
            owner.times.append(time.monotonic())
            owner.headers.append(dict(self.headers))
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
            fault = owner.faults.pop(0) if owner.faults else None
        try:
            time.sleep(owner.pause)
            self._fault(fault) if fault else self._serve(body)
        finally:
            with owner.lock:
                owner.at_once -= 1

    def _serve(self, body: dict[str, Any], *, text: str | None = None) -> None:
        owner = self.owner
        said = owner.answer(body) if text is None else text
        said, finish = said if isinstance(said, tuple) else (said, owner.finish)
        whole: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        whole["choices"][0]["finish_reason"] = finish
        used = {"prompt_tokens": owner.count(body), "completion_tokens": len(said.split())}
        if owner.usage:
            whole["usage"] = used
        with owner.lock:
            owner.served += 1
            owner.prompt_tokens += used["prompt_tokens"]
            owner.new_tokens += used["completion_tokens"]
        self._send(200, json.dumps(whole).encode())

    def _fault(self, fault: Any) -> None:
        kind, *rest = fault
        if kind == "status":
            self._send(rest[0], rest[1].encode(), **(rest[2] if len(rest) > 2 else {}))
        elif kind == "cut":
            self._send(200, b'{"choices": [{"mess', length=500)
            self.close_connection = True
        elif kind == "hang up":
            self.close_connection = True
        elif kind == "slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with suppress(OSError):  # the client has gone
                for _ in range(50):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
        elif kind == "raw":
            self._send(200, rest[0])

    def _send(self, status: int, content: bytes, *, length: int | None = None, **headers: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass

    def log_message(self, *args: Any) -> None:
        pass
