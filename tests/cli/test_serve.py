"""`mmit serve` and `mmit chat --web`: what their options mean, and what they refuse before a model is read."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mmit.generate
from mmit.cli import app
from mmit.cli import serve as command
from mmit.serve.server import listen

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would be served; no model is read, nothing is listened to, and the environment is as before afterwards."""
    for name in KERNELS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    found: list[tuple[Any, ...]] = []

    class Model:
        notes: list[str] = []

    def start(models: Any, settings: Any, place: socket.socket, **more: Any) -> None:
        found.append((models, settings, place.getsockname(), more))
        place.close()

    monkeypatch.setattr(mmit.generate, "load", lambda *_, **__: Model())
    monkeypatch.setattr(command, "start", start)
    return found


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_options_reach_the_server(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# who may ask\nfirst-key\n\nsecond-key\n")
    limits = ["--max-body-mb", "0.5", "--max-images", "2", "--max-pixels", "99", "--max-running", "3"]
    who = ["--api-key", "third-key", "--api-keys-file", str(tmp_path / "keys"), "--cors", "https://app.example/"]
    done = call(
        "serve",
        "runs/mine",
        "--port",
        "0",
        *limits,
        *who,
        "--allow-url",
        "*.example.org",
        "--timeout",
        "7",
        "--ignore",
        "tools",
        "--ignore",
        "response_format",
    )
    assert done.exit_code == 0, done.output
    models, settings, (host, _), more = started[0]
    assert list(models) == ["mine"] and host == "127.0.0.1" and more["bounds"] == {"max_running": 3, "max_waiting": 64}
    assert settings.keys == ("third-key", "first-key", "second-key") and settings.origins == ("https://app.example",)
    limit = settings.limits
    assert (limit.body, limit.images, limit.pixels, limit.answers) == (1 << 19, 2, 99, 3)
    assert settings.fetcher.hosts == ("*.example.org",) and settings.fetcher.size == 1 << 19
    assert settings.ignored == ("tools", "response_format")
    assert "passed over in requests: tools, response_format" in more["notices"][-1]
    assert settings.timeout_s == 7 and settings.hosts[:3] == ("127.0.0.1", "localhost", "::1")


def test_what_is_safe_is_the_default(started: list[Any]) -> None:
    assert call("serve", "runs/mine", "--port", "0").exit_code == 0
    _, settings, (host, _), more = started[0]
    assert [os.environ[name] for name in KERNELS] == ["256", "256"]
    assert host == "127.0.0.1" and settings.fetcher is None and settings.origins == () and more["notices"] == []
    assert call("serve", "runs/mine", "--port", "0", "--host", "0.0.0.0", "--name", "x").exit_code == 0
    models, settings, _, more = started[1]
    assert list(models) == ["x"] and settings.hosts is None and "--api-key" in more["notices"][0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--api-key", "short"], "under 8 characters"),
        (["--api-keys-file", "missing"], "cannot be read"),
        (["--api-keys-file", "empty"], "holds no key"),
        (["--allow-url", "http://x/"], "is no host"),
        (["--ignore", "seed"], "seed is honoured"),
        (["--host", "256.0.0.1"], "cannot listen"),
    ],
)
def test_mistakes(started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("# nobody\n")
    done = call("serve", "runs/mine", "--port", "0", *options)
    assert done.exit_code == 2 and told in done.output and not started


def test_a_port_that_is_taken_is_told_before_a_model_is_read(started: list[Any]) -> None:
    with listen("127.0.0.1", 0) as place:
        place.listen()
        done = call("serve", "runs/mine", "--port", str(place.getsockname()[1]))
    assert done.exit_code == 2 and "Give another --port" in done.output and not started


def test_a_page_in_place_of_the_terminal(started: list[Any]) -> None:
    assert call("chat", "runs/mine", "--web").exit_code == 0
    models, settings, (host, port), more = started[0]
    assert list(models) == ["mine"] and host == "127.0.0.1" and port > 0 and more["browser"] is True
    assert settings.hosts == ("127.0.0.1", "localhost", "::1")
    done = call("chat", "runs/mine", "--web", "--prompt", "Hello")
    assert done.exit_code == 2 and "the page asks for them" in done.output


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("serve", "runs/mine")
    assert done.exit_code == 2 and "pip install 'mmit-tune[serve]'" in done.output
