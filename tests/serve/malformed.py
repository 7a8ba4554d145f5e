"""Malformed requests by their seed: JSON, images, heads, forms, cut connections, slow clients."""

from __future__ import annotations

import copy
import json
import random
import re
import socket
import time
from typing import Any

from tests.serve.client import CHAT, data_url, png, shown, user

PATHS = (CHAT, "/v1/completions", "/v1/files", "/v1/models", "/v1/models/x", "/metrics", "/health", "/", "/nothing")
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        1e308,
        -1e-9,
        10**40,
        "",
        "x",
        "\ud800",
        "\0",
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        "tiny",
    ),
    *("a" * 3000, [1] * 50, {"type": "text"}, {"type": "image_url", "image_url": 5}, float("nan"), float("inf")),
]


def odd(draw: random.Random) -> Any:
    """Draw a value; a copy, since what is built of it is changed: shared ones would end inside themselves."""
    return copy.deepcopy(draw.choice(VALUES))


def damaged(draw: random.Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        at = draw.randrange(len(out) + 1)
        kind = draw.random()
        if kind < 0.4 and at < len(out):
            out[at] = draw.randrange(256)
        elif kind < 0.6:
            del out[at : at + draw.randrange(40)]
        elif kind < 0.8:
            out[at:at] = draw.randbytes(draw.randrange(9))
        else:
            out[at:at] = out[:at][-draw.randrange(60) - 1 :]
    return bytes(out)


def asked(draw: random.Random) -> dict[str, Any]:
    content = png(
        (draw.randrange(2, 40), draw.randrange(2, 40)), form=draw.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP"))
    )
    if draw.random() < 0.8:
        content = damaged(draw, content)
    parts = [shown(data_url(content))] if draw.random() < 0.6 else []
    return {"model": "tiny", "messages": [user(*parts)], "max_tokens": draw.randrange(1, 4), "temperature": 0}


def odd_values(draw: random.Random) -> bytes:
    body = asked(draw)
    names = ["messages", "n", "stop", "stream", "logprobs", "top_logprobs", "stream_options", "seed", "top_p", "top_k"]
    names += [
        "model",
        "max_tokens",
        "temperature",
        "tools",
        "prompt",
        "user",
        "response_format",
        "logit_bias",
        "\0",
        "é",
    ]
    for name in draw.sample(names, draw.randrange(1, 4)):
        body[name] = odd(draw)
    if draw.random() < 0.4:
        message = draw.choice([user(), {"role": odd(draw)}, {}, odd(draw)])
        if isinstance(message, dict):
            found = draw.choice([*VALUES, [odd(draw)], [{"type": "text", "text": odd(draw)}]])
            message["content"] = copy.deepcopy(found)
        body["messages"] = [message] * draw.choice((1, 2))
    return json.dumps(body).encode()


def form(draw: random.Random) -> tuple[bytes, str]:
    content = b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + png() + b"\r\n--X--\r\n"
    return damaged(draw, content), draw.choice(
        ("multipart/form-data; boundary=X", "multipart/form-data", "multipart/x;;=")
    )


def request(draw: random.Random) -> bytes:
    """One request, malformed in one of many ways."""
    path, kind, method = CHAT, "application/json", "POST"
    way = draw.randrange(8)
    if way == 0:
        body = damaged(draw, json.dumps(asked(draw)).encode())
    elif way in (1, 2):
        body = odd_values(draw)
    elif way == 3:
        body = json.dumps(asked(draw)).encode()
    elif way == 4:
        path, (body, kind) = "/v1/files", form(draw)
    elif way == 5:
        path, method, body = (
            draw.choice(PATHS),
            draw.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "A")),
            b"",
        )
        path += draw.choice(("", "?a=b", "/../..", "/%00", "/%ff%2f", "//"))
    elif way == 6:
        body = draw.choice(
            (b"[" * 3000, b'{"a":' * 3000, b"[" + b"{}," * 2000 + b"{}]", b"\xff" * 50, b"", b"null", b"1e999")
        )
    else:
        path, body = "/v1/completions", odd_values(draw)
    length = draw.choice((str(len(body)),) * 12 + (str(len(body) + 50), "-1", "x", "1", str(10**12), "0"))
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", f"Content-Length: {length}"]
    if draw.random() < 0.1:
        lines.append(
            draw.choice(
                ("Transfer-Encoding: chunked", "Authorization: Bearer \u00ff", "Expect: 100-continue", "A" * 200)
            )
        )
    if draw.random() < 0.05:
        lines[1] = draw.choice(("Host: evil.example", "Host:", "Host: [", "X: y", "Origin: null"))
    head = ("\r\n".join([*lines, "Connection: close"]) + "\r\n\r\n").encode("latin-1")
    if draw.random() < 0.1:
        head = damaged(draw, head)
    return head + body


def send(port: int, seed: int) -> int:
    """Send a request, some of them cut or slow; returns the status, 0 for none."""
    draw = random.Random(seed)
    content = request(draw)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as place:
        way = draw.random()
        try:
            if way < 0.1:  # cut off
                place.sendall(content[: draw.randrange(len(content))])
                return 0
            if way < 0.15:  # gone before, or while, it is answered
                place.sendall(content)
                time.sleep(draw.random() * 0.01)
                place.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return 0
            if way < 0.2:  # slowly
                at = draw.randrange(len(content))
                place.sendall(content[:at])
                time.sleep(0.05)
                content = content[at:]
            place.sendall(content)
            if draw.random() < 0.05:  # for uvicorn it has left
                place.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := place.recv(65536):
                answer += chunk
        except OSError:
            return 0
    found = re.match(rb"(?:HTTP/1\.1 100[^\r]*\r\n(?:[^\r]+\r\n)*\r\n)?HTTP/1\.1 (\d{3})", answer)
    return int(found[1]) if found else 0
