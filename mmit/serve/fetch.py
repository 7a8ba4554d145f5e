"""Images at http(s) addresses: fetched from hosts that the operator allows, never from inside a network.

In: an address that a client wrote. Out: bytes. A host is looked up once, every address it has must be public, and the
connection goes to that very address; a redirect starts over. Size, time and redirects are bounded. Proxies of the
environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit

from mmit.errors import ConfigError
from mmit.records import short
from mmit.serve.refused import Refused

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*")
_ENTRY = re.compile(r"(\*|(?:\*\.)?[a-z0-9_.-]+)(?::(\d{1,5}))?")
# What IANA's registries of special addresses keep from the public internet, whatever this Python knows of them.
_SPECIAL4 = [
    ipaddress.IPv4Network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
    )
]
# Public IPv6 is in 2000::/3: that leaves out loopback, mapped and translated IPv4 (64:ff9b::), local and multicast.
_PUBLIC6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL6 = [
    ipaddress.IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]


def is_public(address: str) -> bool:
    """Tell whether a numeric address is one of the public internet."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return not any(found in net for net in _SPECIAL4)
    return found in _PUBLIC6 and not any(found in net for net in _SPECIAL6)


@dataclass(frozen=True)
class Fetcher:
    """Fetches from allowed hosts.

    Args:
        hosts: names, "*.name" for the hosts below one, "*" for every public host; with ":port" for another port than
            the scheme's own.
        size: most bytes. seconds: for one image, with its redirects. redirects: most of them.
        resolve: as `socket.getaddrinfo`.
    """

    hosts: tuple[str, ...]
    size: int
    seconds: float = 10.0
    redirects: int = 3
    resolve: Callable[..., Any] = field(default=socket.getaddrinfo, repr=False)

    def __post_init__(self) -> None:
        for entry in self.hosts:
            if not _ENTRY.fullmatch(entry.lower()):
                remedy = "Give a name such as images.example.org, *.example.org, example.org:8080, or * for any host."
                raise ConfigError(f"'{short(entry)}' is no host", where="--allow-url", remedy=remedy)

    def get(self, url: str, *, param: str) -> bytes:
        """Fetch an image. Raises Refused."""
        until = time.monotonic() + self.seconds
        asked = url
        for _ in range(self.redirects + 1):
            target = self._target(url, param)
            found = self._once(target, until, param)
            if isinstance(found, bytes):
                return found
            try:
                url = urljoin(url, found)
            except ValueError:
                _refuse(f"'{short(asked)}' redirects to no address", param)
        _refuse(f"'{short(asked)}' redirects more than {self.redirects} times", param)

    def _target(self, url: str, param: str) -> _Target:
        """Take an address apart, and hold it against the allowed hosts."""
        if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            _refuse(f"'{short(url)}' has characters that an address has to escape", param)
        try:
            split = urlsplit(url)
            port = PORTS.get(split.scheme, 0) if split.port is None else split.port
        except ValueError:
            _refuse(f"'{short(url)}' is no address", param)
        if split.scheme not in PORTS:
            _refuse(f"an image's address begins with http:// or https://, not with '{short(split.scheme)}:'", param)
        if split.username is not None or split.password is not None:
            _refuse("the address holds a user name or password", param)
        host = (split.hostname or "").removesuffix(".")
        if not _NAME.fullmatch(host) and not _is_ipv6(host):
            _refuse(f"'{short(host)}' is no host", param)
        if not any(_allows(entry.lower(), host, port, split.scheme) for entry in self.hosts):
            place = host if port == PORTS[split.scheme] else f"{host}:{port}"
            remedy = "Send the image as a data: URL; whoever runs the server may allow the host with --allow-url"
            raise Refused(400, f"images of '{short(place)}' are not allowed", remedy, param=param, code="url_refused")
        path = (split.path or "/") + (f"?{split.query}" if split.query else "")
        return _Target(split.scheme, host, port, path)

    def _address(self, target: _Target, param: str) -> str:
        try:
            found = self.resolve(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            _refuse(f"the host '{short(target.host)}' is not known", param)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(is_public(address) for address in addresses):
            _refuse(f"the host '{short(target.host)}' has no public address", param)
        return addresses[0]

    def _once(self, target: _Target, until: float, param: str) -> bytes | str:
        """Ask one host; returns the content, or where it redirects to."""
        address = self._address(target, param)
        left = until - time.monotonic()
        if left <= 0:
            _refuse(f"'{short(target.host)}' took longer than {self.seconds:g} seconds", param)
        try:
            connection = socket.create_connection((address, target.port), timeout=left)
        except OSError:
            _refuse(f"'{short(target.host)}' cannot be reached", param)
        late = threading.Timer(max(until - time.monotonic(), 0), _hang_up, [connection])
        late.daemon = True
        late.start()
        try:
            if not is_public(str(connection.getpeername()[0])):
                _refuse(f"the host '{short(target.host)}' has no public address", param)
            found = self._read(target, connection, param)
            if time.monotonic() >= until:  # an answer without a length that was hung up on looks whole
                raise TimeoutError
            return found
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = "took too long" if time.monotonic() >= until else "broke off the answer"
            raise Refused(400, f"'{short(target.host)}' {why}", param=param, code="url_refused") from error
        finally:
            late.cancel()
            connection.close()

    def _read(self, target: _Target, connection: socket.socket, param: str) -> bytes | str:
        asking = http.client.HTTPConnection(target.host, target.port)
        asking.auto_open = 0  # it may not connect by itself
        asking.sock = connection
        if target.scheme == "https":
            asking.sock = ssl.create_default_context().wrap_socket(connection, server_hostname=target.host)
        try:
            headers = {"Host": target.netloc, "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "mmit"}
            asking.request("GET", target.path, headers=headers)
            answer = asking.getresponse()
            if answer.status in REDIRECTS and (where := answer.getheader("Location")):
                return where
            if answer.status != 200:
                _refuse(f"'{short(target.host)}' answers with the status {answer.status}", param)
            if answer.getheader("Content-Encoding", "identity").lower() != "identity":
                _refuse(f"'{short(target.host)}' sends the image compressed once more", param)
            content = answer.read(self.size + 1) if (answer.length or 0) <= self.size else b""
            if not content or len(content) > self.size:
                what = "is empty" if not content and not answer.length else f"has more than {self.size:,} bytes"
                _refuse(f"the image at '{short(target.host)}' {what}", param)
            return content
        finally:
            asking.close()


@dataclass(frozen=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return "%" not in host


def _allows(entry: str, host: str, port: int, scheme: str) -> bool:
    name, _, own = entry.partition(":")
    if port != (int(own) if own else PORTS[scheme]):
        return False
    return name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _refuse(problem: str, param: str) -> NoReturn:
    raise Refused(400, problem, "Send the image as a data: URL", param=param, code="url_refused")
