"""`mmit serve`: a run behind OpenAI's HTTP API, with a page to chat on.

In: a run and limits. Out: a server until Ctrl-C or SIGTERM. Refuses to start where what it needs is not installed.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.loading import (
    AllowCode,
    Device,
    Dtype,
    ForeignBase,
    ForeignChat,
    In4Bit,
    In8Bit,
    RunArgument,
    TemplateArgs,
    load_told,
)
from mmit.cores import few_kernels
from mmit.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from mmit.serve.app import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")

AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=DIR,...", help="Checkpoints of LoRA on the same base, each a model of its own."),
]
ApiKeyOption = Annotated[list[str] | None, typer.Option(metavar="KEY", help="Who sends it is let in; may be repeated.")]
ApiKeysFileOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keys, one a line; lines that begin with # are left out.")
]
ReadTimeoutOption = Annotated[
    float, typer.Option(min=0.1, help="Seconds for a request's head, and for each part of its body.")
]
CorsOption = Annotated[
    list[str] | None, typer.Option(metavar="ORIGIN", help="Pages of this origin may ask, as https://example.org.")
]
AllowHostOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A further name of this server, where no key is set.")
]
AllowUrlOption = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST", help="Fetch images from this host (*.example.org, or * for any public one)."),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PARAMETER", help="Pass over what mmit cannot honour, such as tools; may be repeated."),
]


def serve(
    run: RunArgument,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. (default: the folder's name)")] = None,
    adapters: AdaptersOption = None,
    api_key: ApiKeyOption = None,
    api_keys_file: ApiKeysFileOption = None,
    max_running: Annotated[int, typer.Option(min=1, help="Answers written at a time.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue; 429 beyond.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request's answers may take.")] = 120.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running answers have when the server ends.")] = 30.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer that a request may ask for.")] = 4096,
    max_answers: Annotated[int, typer.Option(min=1, help="Most answers to one request (n).")] = 8,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Most megabytes of a request.")] = 20.0,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a request.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of an image, by its header.")] = 40_000_000,
    read_timeout: ReadTimeoutOption = 15.0,
    cors: CorsOption = None,
    allow_host: AllowHostOption = None,
    allow_url: AllowUrlOption = None,
    ignore: IgnoreOption = None,
    device: Device = "auto",
    dtype: Dtype = None,
    load_in_8bit: In8Bit = False,
    load_in_4bit: In4Bit = False,
    chat_format: ForeignChat = None,
    base: ForeignBase = None,
    template_arg: TemplateArgs = None,
    allow_code: AllowCode = False,
) -> None:
    """Serve a trained model: OpenAI's API at /v1, a page to chat on at /."""
    needs_extra()
    few_kernels()
    from mmit.serve.adapters import with_adapters
    from mmit.serve.app import Settings
    from mmit.serve.fetch import Fetcher
    from mmit.serve.requests import Limits
    from mmit.serve.server import listen

    body = int(max_body_mb * (1 << 20))
    answers = min(max_answers, max_running)  # more could never be written at once
    limits = Limits(body=body, images=max_images, pixels=max_pixels, answers=answers, tokens=max_tokens)
    settings = Settings(
        keys=tuple(_keys(api_key or [], api_keys_file)),
        # A page of another site can reach a loopback address by a name of its own (DNS rebinding): names are checked.
        hosts=(*LOOPBACK, *(entry.lower() for entry in allow_host or ())) if host in LOOPBACK else None,
        origins=tuple(origin.rstrip("/") for origin in cors or ()),
        timeout_s=timeout,
        read_s=read_timeout,
        limits=limits,
        fetcher=Fetcher(tuple(allow_url), size=body) if allow_url else None,
        ignored=tuple(_ignored(ignore or [])),
    )
    further = further_of(adapters, taken=name or served_name(run))
    place = listen(host, port)  # first: a port that is taken is told before a model is read
    numbers: dict[str, Any] = {"dtype": dtype, "load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}
    given: dict[str, Any] = {"chat": chat_format, "base": base, "template_arg": template_arg}
    model = load_told(run, device=device, allow_code=allow_code, **numbers, **given)
    notices = []
    if settings.hosts is None and not settings.keys:
        notices.append(f"notice: whoever reaches {host} may ask this model; --api-key lets in who has a key")
    if settings.ignored:
        notices.append(f"notice: passed over in requests: {', '.join(settings.ignored)}")
    models = {name or served_name(run): model} | (with_adapters(model, further) if further else {})
    bounds = {"max_running": max_running, "max_waiting": max_waiting}
    start(models, settings, place, grace_s=grace, notices=notices, bounds=bounds)


def start(
    models: Mapping[str, Any],
    settings: Settings,
    place: socket.socket,
    *,
    grace_s: float = 30.0,
    notices: Sequence[str] = (),
    browser: bool = False,
    bounds: Mapping[str, int] | None = None,
) -> None:
    """Serve loaded models at a place until a signal comes; `bounds` are those of `Engine`."""
    from mmit.serve.app import build_app
    from mmit.serve.engine import Engine
    from mmit.serve.server import Server, run

    engine = Engine(models, **(bounds or {}))
    server = Server(build_app(engine, settings), engine, grace_s=grace_s, head_s=settings.read_s)
    run(server, place, notices=notices, browser=browser)
    gc.freeze()  # as it ends, Python would look through all of torch for garbage: seconds of the grace


def chat_page(model: Any, name: str) -> None:
    """Open the page to chat on in a browser, with a server of its own on a free port."""
    from mmit.serve.app import Settings
    from mmit.serve.server import listen

    start({name: model}, Settings(hosts=LOOPBACK), listen("127.0.0.1", 0), browser=True, grace_s=2.0)


def served_name(run: str) -> str:
    """What a model is called that was given no name: its folder's name, or what follows the owner of a hub id."""
    path = Path(run)
    name = path.resolve().name if path.exists() else run.rstrip("/").rpartition("/")[2]
    return name or "model"


def further_of(given: Sequence[str] | None, *, taken: str) -> dict[str, str]:
    """Read NAME=DIR,NAME=DIR options; `taken` is the base's own name. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in (part for option in given or () for part in option.split(",")):
        name, equals, folder = (piece.strip() for piece in text.partition("="))
        if not (equals and name and folder):
            problem = f"'{text}' is not NAME=DIR"
            raise ConfigError(problem, where="--adapters", remedy="Write --adapters a=runs/a,b=runs/b.")
        if name == taken or name in found:
            remedy = "Give each another name (--name for the base)."
            raise ConfigError(f"two models are called '{name}'", where="--adapters", remedy=remedy)
        found[name] = folder
    return found


def needs_extra() -> None:
    """Refuse to go on without what a server is made of. Raises ConfigError."""
    missing = [name for name in ("starlette", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed", remedy="pip install 'mmit-tune[serve]'")


def _ignored(given: list[str]) -> list[str]:
    from mmit.serve.requests import CHAT, COMPLETION

    if honoured := [name for name in given if name in CHAT | COMPLETION]:
        remedy = "Name a parameter that the server refuses, such as tools."
        raise ConfigError(f"{honoured[0]} is honoured, and not passed over", where="--ignore", remedy=remedy)
    return given


def _keys(given: list[str], path: Path | None) -> list[str]:
    keys = list(given)
    if path is not None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot be read: {error}", where=str(path), remedy="Give a text file of keys."
            ) from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError("holds no key", where=str(path), remedy="Write one a line, or leave --api-keys-file out.")
        keys += found
    if any(not key.isascii() or len(key) < 8 for key in keys):
        remedy = "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(24))'"
        raise ConfigError("a key is under 8 characters, or not ASCII", where="--api-key", remedy=remedy)
    return keys
