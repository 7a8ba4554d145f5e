"""A hub on this machine: the calls that huggingface_hub makes to create a repository and to commit a folder.

Speaks /api/repos/create, /api/validate-yaml, /tree, /preupload, Git LFS (batch, PUT, verify) and /commit, and checks
what it is sent: the token, sizes and sha256 of large files. Holds what arrived in `Hub.files`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"
LARGE = (".safetensors", ".bin", ".gguf", ".png")  # kept by LFS


@dataclass
class Hub:
    """What the hub holds, and how it misbehaves: `cut` closes the connection at paths that hold this text."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    cut: str | None = None
    calls: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body waits for nobody to acknowledge its headers: 40 ms
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name, _, rest = self.path.removeprefix("/api/models/").partition("/tree/")
        if not rest or not self._begun():
            return
        entries = [
            {"type": "file", "path": path, "size": len(d), "oid": "0"} for path, d in self.hub.files[name].items()
        ]
        self._answer(200, entries)

    def do_PUT(self) -> None:
        data = self._body()
        if self.hub.cut and self.hub.cut in self.path:
            self.close_connection = True
            self.connection.close()
            return
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self._answer(200, {})

    def do_POST(self) -> None:
        data = self._body()
        if not self._begun():
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            good = json.loads(data)["content"].startswith("---\n")
            self._answer(200 if good else 400, {"errors": [] if good else [{"message": "no front matter"}]})
        elif path.endswith("/preupload/main"):
            modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in json.loads(data)["files"]]
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer(200, {"transfer": "basic", "objects": [self._action(o) for o in json.loads(data)["objects"]]})
        elif path == "/verify":
            told = json.loads(data)
            held = self.hub.objects.get(told["oid"], b"")
            whole = hashlib.sha256(held).hexdigest() == told["oid"] and len(held) == told["size"]
            self.hub.verified |= {told["oid"]} if whole else set()
            self._answer(200 if whole else 422, {})
        elif path.endswith("/commit/main"):
            self._commit(path.split("/api/models/")[1].removesuffix("/commit/main"), data)
        else:
            self._answer(404, {"error": f"no such call: {path}"})

    def _begun(self) -> bool:
        """Note a call; refuses another token."""
        self.hub.calls.append(self.path)
        if self.headers.get("authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid credentials in Authorization header"})
        return False

    def _create(self, told: dict[str, Any]) -> None:
        name = f"{told['organization']}/{told['name']}"
        if name in self.hub.files:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.files[name] = {".gitattributes": b""}
        self.hub.private |= {name} if told.get("visibility") == "private" or told.get("private") else set()
        self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def _action(self, told: dict[str, Any]) -> dict[str, Any]:
        where = {"upload": {"href": f"{self.hub.url}/lfs/{told['oid']}"}, "verify": {"href": f"{self.hub.url}/verify"}}
        return {"oid": told["oid"], "size": told["size"], "actions": where}

    def _commit(self, name: str, data: bytes) -> None:
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.hub.verified
                self.hub.files[name][value["path"]] = self.hub.objects[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, status: int, told: Any) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub() -> Iterator[Hub]:
    """Yield a hub that answers on a port of its own."""
    held = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": held}))
    server.daemon_threads = True
    held.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield held
    server.shutdown()
    server.server_close()
    thread.join(5)
