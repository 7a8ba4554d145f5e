"""A client that calls an ASGI application without a socket: sends a body in pieces, stalls, leaves in the middle."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found = self.json["error"]
        assert found.keys() == {"message", "type", "param", "code"} and found["message"].endswith("."), found
        return found

    @property
    def events(self) -> list[Any]:
        """The values of a stream, which has to end with [DONE]."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]


class Client:
    def __init__(self, app: Any, **headers: str) -> None:
        self.app, self.headers = app, {"host": "127.0.0.1:8000", **headers}

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, [content], headers={"content-type": "application/json", **headers})

    def send(
        self,
        method: str,
        path: str,
        chunks: Sequence[bytes] = (b"",),
        *,
        headers: Mapping[str, str] | None = None,
        stall: bool = False,
        leave_after: int | None = None,
    ) -> Answer:
        """Send a request; `stall`: its body never ends; `leave_after` so many pieces of the answer."""
        return asyncio.run(self._send(method, path, list(chunks), headers or {}, stall, leave_after))

    async def _send(
        self,
        method: str,
        path: str,
        chunks: list[bytes],
        headers: Mapping[str, str],
        stall: bool,
        leave_after: int | None,
    ) -> Answer:
        answer, left, seen = Answer(), asyncio.Event(), 0
        if leave_after == 0:
            asyncio.get_running_loop().call_later(0.05, left.set)

        async def receive() -> dict[str, Any]:
            if chunks:
                content = chunks.pop(0)
                return {"type": "http.request", "body": content, "more_body": bool(chunks) or stall}
            if stall:
                await asyncio.sleep(3600)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal seen
            await asyncio.sleep(0)
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
                return
            answer.body += message["body"]
            seen += 1
            if leave_after is not None and seen >= leave_after:
                left.set()

        raw = [(name.encode(), value.encode()) for name, value in {**self.headers, **headers}.items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        await self.app(scope, receive, send)
        return answer


def png(size: tuple[int, int] = (20, 24), colour: Any = (200, 30, 30), form: str = "PNG") -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(out, form)
    return out.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def user(*parts: Any, text: str = "What is it?") -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
