"""Shards behind a real HTTP server and an S3 one: read by ranges; a server that fails is an error with its place."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

from mmit.data.shards.files import ShardFileError
from mmit.data.shards.reader import open_shards
from mmit.data.shards.scan import index_tars
from mmit.data.shards.writer import build_shards
from mmit.data.sources import open_source
from mmit.errors import MmitError
from tests.data.shards.shard_samples import records


class Server(BaseHTTPRequestHandler):
    """Serves a folder by ranges; `mode` makes it misbehave."""

    disable_nagle_algorithm = True  # a body waits for nobody to acknowledge its headers: 40 ms
    folder = Path()
    mode = "ranges"
    served: list[tuple[str, int]] = []  # name and bytes of each answer

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status, headers = path.read_bytes(), 200, {}
        asked = self.headers.get("Range")
        if asked and self.mode != "no ranges":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        if self.mode != "no ranges":
            headers["Accept-Ranges"] = "bytes"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            if self.mode == "cut" and path.suffix == ".tar":
                data = data[: len(data) // 2]
                self.close_connection = True
            self.served.append((path.name, len(data)))
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[Server]]]:
    pytest.importorskip("aiohttp", reason="aiohttp, which fsspec reads http with, is not installed")
    (tmp_path / "web").mkdir()
    kind = type("Here", (Server,), {"folder": tmp_path / "web", "mode": "ranges", "served": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", kind
        running.shutdown()


@pytest.mark.slow
def test_a_web_server_is_read_by_ranges(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    url, kind = server
    given = records(9)
    build_shards(given, kind.folder / "data", max_bytes=12_000)
    source = open_source(f"{url}/data", cache=tmp_path / "cache")
    assert len(source) == 9
    kind.served.clear()
    assert source[4] == given[4]
    ((name, size),) = kind.served
    assert name.endswith(".tar") and size < (kind.folder / "data" / name).stat().st_size / 2
    assert [source[i] for i in range(9)] == given
    subset = open_source(f"{url}/data#3", cache=tmp_path / "cache")
    assert len(subset) == 3 and subset[0] in given
    # Tars without an index are indexed where they lie, by their headers.
    tars = [f"{url}/data/{path.name}" for path in sorted((kind.folder / "data").glob("*.tar"))]
    index_tars(tars, tmp_path / "index")
    assert list(open_shards(tmp_path / "index")) == given


@pytest.mark.slow
def test_what_is_not_there_is_named(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    url, kind = server
    with pytest.raises(MmitError, match="no index of shards"):
        open_source(f"{url}/none", cache=tmp_path)
    build_shards(records(3), kind.folder / "data")
    source = open_source(f"{url}/data", cache=tmp_path / "cache")
    (kind.folder / "data" / "shard-000000.tar").unlink()
    with pytest.raises(ShardFileError, match="shard-000000.tar: cannot read"):
        source[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["no ranges", "cut"])
def test_a_server_that_fails_never_gives_a_wrong_record(
    server: tuple[str, type[Server]], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that sends the whole file for a range, and one that closes the connection in the middle."""
    url, kind = server
    monkeypatch.setattr("mmit.data.shards.files._TRIES", 1)
    given = records(9)
    build_shards(given, kind.folder / "data")
    source = open_source(f"{url}/data", cache=tmp_path / "cache")
    kind.mode = mode
    for number in range(9):
        # Not a RecordError: a policy that skips bad records must not skip these.
        with pytest.raises(ShardFileError, match="shard-000000.tar: ") as error:
            source[number]
        assert error.value.remedy
    kind.mode = "ranges"
    assert source[5] == given[5]  # it is well again


@pytest.mark.long
def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install s3fs 'moto[server]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_ENDPOINT_URL", url)):
        monkeypatch.setenv(name, value)
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], env=os.environ.copy(), stderr=-3)
    try:
        for _ in range(100):
            time.sleep(0.3)
            try:
                urlopen(f"{url}/moto-api/").close()
                break
            except OSError:
                continue
        import s3fs

        given = records(9)
        build_shards(given, tmp_path / "data", max_bytes=12_000)
        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        store.put(str(tmp_path / "data"), "bucket/data", recursive=True)
        source = open_source("s3://bucket/data", cache=tmp_path / "cache")
        assert [source[i] for i in range(9)] == given
        names = sorted(path.name for path in (tmp_path / "data").glob("*.tar"))
        index_tars([f"s3://bucket/data/{name}" for name in names], tmp_path / "index")
        assert list(open_shards(tmp_path / "index")) == given
        with pytest.raises(MmitError, match="no index of shards"):
            open_source("s3://bucket/none", cache=tmp_path)
        store.rm(f"bucket/data/{names[0]}")
        with pytest.raises(ShardFileError, match="cannot read"):
            source[0]
    finally:
        server.terminate()
        server.wait()
