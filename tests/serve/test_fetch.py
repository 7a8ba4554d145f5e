"""Images at addresses: whatever a client writes, nothing inside a network is fetched."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mmit.errors import ConfigError
from mmit.serve import fetch
from mmit.serve.app import Settings, build_app
from mmit.serve.engine import Engine
from mmit.serve.fetch import Fetcher, is_public
from mmit.serve.images import Files, Images
from mmit.serve.refused import Refused
from tests.serve.client import CHAT, Answer, Client, data_url, png, shown, user
from tests.test_generate import build

# Names that an attacker owns, and what they resolve to.
NAMES = {
    "loopback.evil.example": ["127.0.0.1"],
    "private.evil.example": ["10.1.2.3"],
    "metadata.evil.example": ["169.254.169.254"],
    "mixed.evil.example": ["93.184.215.14", "127.0.0.1"],
    "six.evil.example": ["::1"],
    "mapped.evil.example": ["::ffff:127.0.0.1"],
    "nothing.evil.example": [],
    "public.example": ["93.184.215.14"],
}
REFUSED = [
    *(
        "http://127.0.0.1/",
        "http://127.0.0.1:80/a.png",
        "http://127.1/",
        "http://127.0.1/",
        "http://0/",
        "http://0.0.0.0/",
    ),
    *("http://2130706433/", "http://017700000001/", "http://0x7f000001/", "http://0x7f.0.0.1/", "http://0177.0.0.1/"),
    *("http://0x7f.1/", "http://127.0.0.1./", "http://localhost/", "http://LOCALHOST/", "http://localhost./"),
    *("http://10.0.0.1/", "http://172.16.0.1/", "http://172.31.255.255/", "http://192.168.1.1/", "http://100.64.0.1/"),
    *("http://169.254.169.254/latest/meta-data/", "http://192.0.0.170/", "http://198.18.0.1/", "http://224.0.0.1/"),
    *("http://240.0.0.1/", "http://255.255.255.255/", "http://192.88.99.1/", "http://203.0.113.5/"),
    *(
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[::127.0.0.1]/",
    ),
    *(
        "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b:1::a00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[2001:0:7f00:1::]/",
    ),
    *(
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[fc00::1]/",
        "http://[fd12:3456::1]/",
        "http://[ff02::1]/",
    ),
    *("http://[fec0::1]/", "http://[2001:db8::1]/", "http://[::ffff:0:127.0.0.1]/", "http://[0:0:0:0:0:0:0:1]/"),
    *("http://user@127.0.0.1/", "http://public.example@127.0.0.1/", "http://public.example:80@127.0.0.1/"),
    *("http://127.0.0.1\\@public.example/", "http://public.example\\@127.0.0.1/", "http://127.0.0.1#@public.example/"),
    *("http://127.0.0.1%2f@public.example/", "http://①②⑦.⓪.⓪.①/", "http://127。0。0。1/", "http://ⓛocalhost/"),
    *(
        "http://127.0.0.1\r\n.public.example/",
        "http:///127.0.0.1/",
        "http:127.0.0.1",
        "http://",
        "http://[",
        "http://a b/",
    ),
    *(
        "http://public.example:0/",
        "http://public.example:22/",
        "http://public.example:99999/",
        "http://-/",
        "http://a..b/",
    ),
    *(f"http://{name}/a.png" for name in NAMES if "evil" in name),
    *("ftp://public.example/a.png", "gopher://127.0.0.1:6379/_", "file:///etc/passwd", "dict://127.0.0.1:11211/"),
    *("jar:http://127.0.0.1!/", "//127.0.0.1/", "/etc/passwd", "../x.png", "HTTP://127.0.0.1/", "https://127.0.0.1/"),
]


def resolve(host: str, port: int, **_: Any) -> list[Any]:
    """Planted names; numbers in any form are read as the system does, without asking a name server."""
    if host in NAMES:
        return [(0, 0, 0, "", (address, port)) for address in NAMES[host]]
    flags = 0 if host == "localhost" else socket.AI_NUMERICHOST
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Where connections go to; none is made."""
    found: list[Any] = []

    def connect(address: Any, timeout: float) -> socket.socket:
        found.append(address)
        raise OSError

    monkeypatch.setattr(fetch.socket, "create_connection", connect)
    yield found


def test_the_list_is_long_enough() -> None:
    assert len(set(REFUSED)) >= 70


@pytest.mark.parametrize("hosts", [("*",), ("*", "*:22", "*:6379", "*:99"), ("*.example", "localhost", "127.0.0.1")])
@pytest.mark.parametrize("url", REFUSED)
def test_nothing_inside_is_fetched(reached: list[Any], url: str, hosts: tuple[str, ...]) -> None:
    images = Images(10**6, Files(count=1, size=1), Fetcher(hosts, size=1000, resolve=resolve))
    with pytest.raises(Refused) as found:
        images.read(url, owner="", param="x")
    # A port that the operator allows on any host may be asked, at the public address.
    assert [address for address, _ in reached if address != "93.184.215.14"] == []
    assert reached == [] or url == "http://public.example:22/"
    assert found.value.status == 400 and "93.184" not in found.value.message


@pytest.mark.parametrize(
    ("url", "hosts", "allowed"),
    [
        ("http://public.example/a.png", ("public.example",), True),
        ("https://PUBLIC.example./a.png", ("public.example",), True),
        ("http://public.example/a.png", ("*.example",), True),
        ("http://public.example/a.png", ("*",), True),
        ("http://public.example/a.png", ("ublic.example",), False),
        ("http://public.example/a.png", ("*.public.example",), False),
        ("http://public.example.evil/a.png", ("public.example",), False),
        ("http://public.example:8080/a.png", ("public.example",), False),
        ("http://public.example:8080/a.png", ("public.example:8080",), True),
    ],
)
def test_hosts_that_are_allowed(reached: list[Any], url: str, hosts: tuple[str, ...], allowed: bool) -> None:
    with pytest.raises(Refused) as found:
        Fetcher(hosts, size=1000, resolve=resolve).get(url, param="x")
    assert ("cannot be reached" in found.value.message) == bool(reached) == allowed


def test_a_name_is_resolved_once(reached: list[Any]) -> None:
    """A name that is public when it is looked at, and inside when it is connected to."""
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])

    def rebinding(host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in next(answers)]

    with pytest.raises(Refused):
        Fetcher(("*",), size=1000, resolve=rebinding).get("http://rebinding.example/a.png", param="x")
    assert reached == [("93.184.215.14", 80)]


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:220:1::1", "1.1.1.1", "172.32.0.1", "100.128.0.1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_hosts_are_checked_at_the_start() -> None:
    with pytest.raises(ConfigError, match="is no host"):
        Fetcher(("http://example.org/",), size=1)


# --- over a socket, whose loopback address is held to be public -------------------------------------------------------


class Site(http.server.BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # a body waits for nobody to acknowledge its headers: 40 ms
    seen: list[str] = []

    def do_GET(self) -> None:
        self.seen.append(f"{self.headers['Host']}{self.path}")
        kind, _, rest = self.path.lstrip("/").partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest.replace("_", "/"))
            self.end_headers()
            return
        self.send_response(404 if kind == "missing" else 200)
        content = png() if kind == "image" else b"x" * 5000
        if kind == "zipped":
            self.send_header("Content-Encoding", "gzip")
        if kind not in ("endless", "drip"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            if kind == "drip":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            self.wfile.write(content)
        except OSError:
            pass

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def site(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Fetcher]]:
    Site.seen.clear()
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")

    def local(host: str, number: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", ("10.0.0.1" if host == "inside.example" else "127.0.0.1", number))]

    yield f"http://site.example:{port}", Fetcher((f"*:{port}",), size=4000, seconds=0.3, resolve=local)


def test_an_image_is_fetched(site: tuple[str, Fetcher]) -> None:
    url, fetcher = site
    assert fetcher.get(f"{url}/image/a.png?x=1", param="x") == png()
    assert Site.seen == [f"{url.removeprefix('http://')}/image/a.png?x=1"]
    assert fetcher.get(f"{url}/to/_image", param="x") == png()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/big", "more than 4,000 bytes"),
        ("/endless", "more than 4,000 bytes"),
        ("/missing", "status 404"),
        ("/zipped", "compressed"),
        ("/drip", "took too long"),
        ("/to/http:__inside.example:PORT_image", "no public address"),
        ("/to/http:__127.0.0.1:1_image", "not allowed"),
        ("/to/file:___etc_passwd", "begins with http"),
        ("/to/_to__to__to__to__to__to_x", "more than 3 times"),
        ("/to/http:__[", "no address"),
    ],
)
def test_what_a_host_may_answer(site: tuple[str, Fetcher], path: str, told: str) -> None:
    url, fetcher = site
    began = time.monotonic()
    with pytest.raises(Refused, match=told):
        fetcher.get(url + path.replace("PORT", url.rpartition(":")[2]), param="x")
    assert time.monotonic() - began < 1


def test_a_request_names_an_image_by_its_address(site: tuple[str, Fetcher]) -> None:
    """Where it is allowed the answer is that to the image as data; what leads inside is a mistake of the request."""
    url, fetcher = site
    engine = Engine({"tiny": build()}, max_running=1)
    try:
        client = Client(build_app(engine, Settings(fetcher=replace(fetcher, seconds=20))))

        def ask(address: str) -> Answer:
            messages = [user(shown(address))]
            return client.post(CHAT, {"model": "tiny", "messages": messages, "max_tokens": 6, "temperature": 0})

        fetched, sent = ask(f"{url}/image/a.png"), ask(data_url(png()))
        assert fetched.status == 200 and fetched.json["choices"] == sent.json["choices"], fetched.body
        assert len(Site.seen) == 1
        inside = ask(f"{url}/to/http:__inside.example:{url.rpartition(':')[2]}_image")
        assert inside.status == 400 and "no public address" in inside.error["message"]
        assert inside.error["param"] == "messages[0].content[0].image_url.url"
    finally:
        engine.close(0)
