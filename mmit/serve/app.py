"""The HTTP side of `mmit serve`: OpenAI's routes over an `Engine`, as an ASGI application.

Owns who may ask (keys, hosts, origins), what is refused before its body is read, and what happens when a client leaves:
its answers are cancelled. A mistake becomes OpenAI's error object. Reads no request's content itself (`requests`), and
computes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmit.errors import MmitError
from mmit.models.llm import context_length
from mmit.records import short
from mmit.serve.engine import Answering, End, Engine, Piece
from mmit.serve.images import Files, Images
from mmit.serve.live import EventStream, Live, sse
from mmit.serve.metrics import Metrics
from mmit.serve.page import Page
from mmit.serve.refused import Refused, closing, full, refusal_of
from mmit.serve.replies import Reply, failure
from mmit.serve.requests import Limits, Wanted, parse, read_chat, read_completion
from mmit.text import echo

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from mmit.generate import Model
    from mmit.serve.fetch import Fetcher

CHARACTERS = 32  # of one token, at the most that any text has on average
READERS = 8  # threads that read requests: parse, decode images, tokenise
_UPLOAD = "Send a multipart form with the image as its file and a purpose, such as vision"


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        keys: any of them lets a client in; none: everyone.
        hosts: names under which the server may be asked; None: any. Names of its own keep a page of another site, whose
            name was pointed here, from asking.
        origins: pages of other sites that may ask (CORS).
        timeout_s: for a request's answers. read_s: for a request's head, and for a body without a byte of it coming;
            its whole may take eight times as long.
        fetcher: of images at addresses; None where none are fetched.
        files: most uploaded images; files_size: bytes of all of them.
        ignored: parameters that are passed over, whatever they ask for.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    timeout_s: float = 120.0
    read_s: float = 15.0
    limits: Limits = field(default_factory=Limits)
    fetcher: Fetcher | None = None
    files: int = 64
    files_size: int = 256 << 20
    ignored: tuple[str, ...] = ()


def build_app(engine: Engine, settings: Settings) -> ASGIApp:
    """Return the application; the caller closes the engine."""
    service = _Service(engine, settings)
    api = (
        ("/v1/models", service.models, "GET"),
        ("/v1/models/{name:path}", service.model, "GET"),
        ("/v1/chat/completions", service.chat, "POST"),
        ("/v1/completions", service.completion, "POST"),
        ("/v1/files", service.upload, "POST"),
        ("/v1/files", service.files, "GET"),
        ("/v1/files/{name}", service.file, "GET"),
        ("/v1/files/{name}", service.delete, "DELETE"),
        ("/health", service.health, "GET"),
        ("/metrics", service.measured, "GET"),
        ("/", service.page, "GET"),
    )
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
    )
    app = Starlette(
        routes=[Route(path, service.counted(path, handler), methods=[method]) for path, handler, method in api],
        middleware=[cors] if settings.origins else [],
        exception_handlers={Refused: _refused, HTTPException: _not_found, Exception: _defect},
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False  # it would send a client to whatever host it named
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body(), error.status, error.headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = Refused(error.status_code, "no such address", "GET / is a page to chat on; see docs/serving.md")
    if error.status_code == 405:
        found = Refused(405, f"this address takes no {request.method[:20]}", "See docs/serving.md")
    return JSONResponse(found.body(), found.status, error.headers)


async def _defect(request: Request, error: Exception) -> Response:
    """What nobody foresaw: the traceback is for whoever runs the server, not for the client."""
    found = Refused(500, "the server failed", "Tell whoever runs it", code="server_error")
    return JSONResponse(found.body(), found.status)


class _Service:
    """What the routes share."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._limits = replace(
            settings.limits, text=min(settings.limits.text, *map(_characters, engine.models.values()))
        )
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        files = Files(count=settings.files, size=settings.files_size)
        self._images = Images(self._limits.pixels, files, settings.fetcher)
        self._metrics = Metrics(engine)
        self._page = Page.load()
        self._readers = ThreadPoolExecutor(READERS, "mmit-request")
        self._began = int(time.time())
        self._busy = 0  # requests with a body
        self._most = engine.max_running + engine.max_waiting + READERS

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """The threads end with the application."""
        yield
        self._readers.shutdown(wait=False, cancel_futures=True)

    def counted(self, route: str, handler: Callable[..., Any]) -> Callable[[Request], Any]:
        """A handler whose clients are let in first, and whose answers are counted by their status."""

        async def handle(request: Request) -> Any:
            status = 500
            try:
                owner = self._admit(request, open_to_all=route in ("/", "/health"))
                response = await handler(request, owner)
                status = response.status_code
                return response
            except Refused as error:
                status = error.status
                raise
            except HTTPException as error:
                status = error.status_code
                raise
            except ClientDisconnect:
                status = 499
                return Response(status_code=499)
            finally:
                self._metrics.request(route, status)

        return handle

    def _admit(self, request: Request, *, open_to_all: bool) -> str:
        """Return who asks, as a digest of the key. Raises Refused."""
        hosts, host = self._settings.hosts, request.headers.get("host", "").lower()
        if hosts is not None and not self._keys and _without_port(host) not in hosts:
            remedy = "Ask it as localhost, or start it with --allow-host for this name or with a key"
            raise Refused(403, "the server does not go by this name", remedy, code="host_refused")
        origin = request.headers.get("origin")
        foreign = origin is not None and origin.lower().partition("://")[2] != host
        if foreign and not {origin, "*"} & {*self._settings.origins}:
            remedy = "Start the server with --cors for this origin"
            raise Refused(403, "pages of other sites may not ask", remedy, code="origin_refused")
        if open_to_all or not self._keys:
            return ""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        # Every key is compared, in a time that says nothing about any of them.
        fits = [hmac.compare_digest(digest, key) for key in self._keys]
        if kind.lower() != "bearer" or not any(fits):
            problem = "no API key was sent" if not given else "the API key is not one of this server's"
            remedy = "Send the header Authorization: Bearer KEY"
            headers = {"www-authenticate": "Bearer", "connection": "close"}
            raise Refused(401, problem, remedy, code="invalid_api_key", headers=headers)
        return digest.hex()

    async def models(self, request: Request, owner: str) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._told(name) for name in self._engine.models]})

    async def model(self, request: Request, owner: str) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name not in self._engine.models:
            remedy = "GET /v1/models lists the names"
            raise Refused(404, f"no model '{name[:80]}' is served", remedy, param="model", code="model_not_found")
        return JSONResponse(self._told(name))

    def _told(self, name: str) -> dict[str, Any]:
        model = self._engine.models[name]
        facts = {"images": model.vlm.vision is not None, "max_images": self._limits.images}
        facts |= {"max_tokens": self._limits.tokens, "max_pixels": self._limits.pixels}
        return {"id": name, "object": "model", "created": self._began, "owned_by": "mmit", "mmit": facts}

    async def health(self, request: Request, owner: str) -> Response:
        """GET /health: 200 while requests are taken, 503 while the server ends."""
        state = self._engine.state()
        told = {"status": "closing" if state.closing else "ok", "running": state.running, "waiting": state.waiting}
        return JSONResponse(told, 503 if state.closing else 200)

    async def measured(self, request: Request, owner: str) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request, owner: str) -> Response:
        """GET /: the web chat."""
        headers = {"content-security-policy": self._page.policy, "x-content-type-options": "nosniff"}
        headers |= {"referrer-policy": "no-referrer", "cache-control": "no-cache"}
        return Response(self._page.body, media_type="text/html; charset=utf-8", headers=headers)

    async def upload(self, request: Request, owner: str) -> Response:
        """POST /v1/files: an image that requests may name by its id."""
        async with self._room():
            body = await self._body(request)
            name, purpose, content = await _uploaded(request.headers, body)
            await self._in_thread(partial(self._images.check, content, param="file"))
        file = self._images.files.put(content, owner=owner, name=name, purpose=purpose)
        return JSONResponse(file.to_json())

    async def files(self, request: Request, owner: str) -> Response:
        """GET /v1/files."""
        found = [file.to_json() for file in self._images.files.owned(owner)]
        return JSONResponse({"object": "list", "data": found, "has_more": False})

    async def file(self, request: Request, owner: str) -> Response:
        """GET /v1/files/ID."""
        return JSONResponse(self._images.files.get(request.path_params["name"], owner).to_json())

    async def delete(self, request: Request, owner: str) -> Response:
        """DELETE /v1/files/ID."""
        name = request.path_params["name"]
        self._images.files.remove(name, owner)
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    async def chat(self, request: Request, owner: str) -> Any:
        """POST /v1/chat/completions."""
        read = partial(read_chat, read=lambda source, param: self._images.read(source, owner=owner, param=param))
        return await self._answer(request, read, param="messages")

    async def completion(self, request: Request, owner: str) -> Any:
        """POST /v1/completions."""
        return await self._answer(request, read_completion, param="prompt")

    async def _answer(self, request: Request, read: Callable[..., Wanted], *, param: str) -> Any:
        async with self._room():
            if not _says_json(request.headers.get("content-type", "")):
                remedy = "Send the header Content-Type: application/json"
                raise Refused(415, "the body does not say that it is JSON", remedy, headers={"connection": "close"})
            body = await self._body(request)
            wanted, answering = await self._in_thread(self._submit, body, read, param)
            del body
            live = Live(answering, request.receive)
            try:
                self._metrics.image_tokens += answering.image_tokens
                reply = Reply(wanted, answering)
                if not wanted.stream:
                    return JSONResponse(await self._collected(live, reply))
            except BaseException:
                live.leave()
                raise
            finally:
                if not wanted.stream:
                    live.leave()
        return EventStream(self._chunks(live, reply), live)

    def _submit(self, body: bytes, read: Callable[..., Wanted], param: str) -> tuple[Wanted, Answering]:
        """Read a request and hand it to the engine; runs in a thread. Raises Refused."""
        given = parse(body, self._limits)
        for name in self._settings.ignored:
            given.pop(name, None)
        model = given.get("model")
        if isinstance(model, str) and model not in self._engine.models:
            names = ", ".join(self._engine.models)
            raise Refused(
                404, f"no model '{model[:80]}' is served", f"Valid: {names}", param="model", code="model_not_found"
            )
        wanted = read(given, limits=self._limits, timeout_s=self._settings.timeout_s)
        try:
            return wanted, self._engine.submit(wanted.ask)
        except MmitError as error:
            raise refusal_of(error, param=param) from error

    async def _collected(self, live: Live, reply: Reply) -> dict[str, Any]:
        pieces, ends = list[Piece](), list[End]()
        async for event in live.events():
            if isinstance(event, Piece):
                pieces.append(event)
            elif event is not None:
                ends.append(event)
                if bad := self._failed(event):
                    raise bad
        self._timed(live.answering)
        return reply.whole(pieces, ends)

    async def _chunks(self, live: Live, reply: Reply) -> AsyncIterator[bytes]:
        """The events of a stream; one that fails ends with an error object."""
        ends = list[End]()
        for chunk in reply.first():
            yield sse(chunk)
        async for event in live.events():
            if event is None:
                yield b": waiting\n\n"
            elif isinstance(event, Piece):
                yield sse(reply.piece(event))
            elif bad := self._failed(event):
                yield sse(bad.body())
                break
            else:
                ends.append(event)
                yield sse(reply.end(event))
        else:
            self._timed(live.answering)
            for chunk in reply.last(ends):
                yield sse(chunk)
        yield b"data: [DONE]\n\n"

    def _failed(self, end: End) -> Refused | None:
        bad = failure(end, ending=self._engine.state().closing)
        if bad is not None and bad.status == 500:
            echo(f"error: an answer failed: {end.error}", err=True)
        return bad

    def _timed(self, answering: Answering) -> None:
        self._metrics.answer.add(time.monotonic() - answering.started)
        if answering.first_token_s is not None:
            self._metrics.first_token.add(answering.first_token_s)

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[None]:
        """A place among the requests whose bodies are held. Raises Refused."""
        if self._engine.state().closing:
            raise closing()
        if self._busy >= self._most:
            raise full(f"{self._busy} requests are being served")
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)

    async def _body(self, request: Request) -> bytes:
        """Read a body within the limits of size and time. Raises Refused."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            # A few compressed bytes may be gigabytes, and proxies unpack what they like before us.
            remedy = "Send it as it is, without the header Content-Encoding"
            raise Refused(
                415, f"the body is compressed ({short(encoding, 40)})", remedy, headers={"connection": "close"}
            )
        most, read_s = self._limits.body, self._settings.read_s
        until = time.monotonic() + 8 * read_s
        held, size = list[bytes](), 0
        source = request.stream().__aiter__()
        while True:
            try:
                wait = min(read_s, max(until - time.monotonic(), 0))
                chunk = await asyncio.wait_for(source.__anext__(), wait)
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError as error:
                headers = {"connection": "close"}
                raise Refused(408, "the body came too slowly", code="timeout", headers=headers) from error
            size += len(chunk)
            if size <= most:
                held.append(chunk)
            elif size > 4 * most:
                break  # else it is read to its end: few clients listen while they still send
            else:
                held.clear()
        if size > most:
            headers = {"connection": "close"}
            problem = f"the body has more than {most:,} bytes"
            raise Refused(413, problem, "Scale images down, or send fewer", code="too_large", headers=headers)
        return b"".join(held)


def _characters(model: Model) -> int:
    """More than fit into a model's context, so that they need not be tokenised to see that."""
    context = context_length(model.vlm.llm)
    return 1 << 62 if context is None else CHARACTERS * context


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _says_json(kind: str) -> bool:
    return kind.partition(";")[0].strip().lower() == "application/json"


async def _uploaded(headers: Headers, body: bytes) -> tuple[str, str, bytes]:
    """Name, purpose and content of a multipart upload. Raises Refused."""

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(headers, once(), max_files=1, max_fields=8).parse()
        file, purpose = form.get("file"), form.get("purpose", "vision")
    except Exception as error:
        raise Refused(400, "the body is no multipart form", _UPLOAD, code="invalid_value") from error
    if not isinstance(file, UploadFile):
        raise Refused(400, "the form has no file", _UPLOAD, param="file", code="invalid_value")
    content = await file.read()
    await form.close()
    return short(file.filename or "image", 100), short(purpose, 40), content
