"""Two servers are asked the same questions about pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.teachers.server import Server

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("compare_endpoints", ROOT / "scripts" / "compare_endpoints.py")
assert spec is not None and spec.loader is not None
script: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def sees(body: dict[str, Any]) -> bool:
    content = body["messages"][-1]["content"]
    return not isinstance(content, str) and any(part["type"] == "image_url" for part in content)


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])[-40:]


def tokens(each: int) -> Any:
    return lambda body: 12 + each * sees(body)


def test_equal_servers_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(asked, count=tokens(49)) as one, Server(asked, count=tokens(49)) as other:
        assert script.main([f"{one.url}#a", f"{other.url}#b", "--questions", "7"]) == 0
        assert one.bodies[-1]["model"] == "a" and one.bodies[-1]["temperature"] == 0
        assert sum(sees(body) for body in one.bodies) == 7 + len(script.SIZES)
    told = capsys.readouterr().out
    assert "tokens of a picture: 49 on both" in told and "equal answers: 7 of 7 (100.0%)" in told
    assert "first difference" not in told and told.count("p95") == 2


def test_the_first_difference_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(lambda body: "red", count=tokens(4)) as one:
        with Server(lambda body: "blue" if "Is there" in str(body["messages"]) else "red", count=tokens(4)) as other:
            command = [one.url, other.url, "--questions", "12"]
            assert script.main(command) == 1
            assert script.main([*command, "--at-least", "0.5"]) == 0
    told = capsys.readouterr().out
    assert "equal answers: 8 of 12 (66.7%)" in told
    assert "question 9 (Is there a circle?): 'red' and 'blue'" in told


def test_servers_with_other_picture_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(count=tokens(576)) as one, Server(count=tokens(144)) as other:
        assert script.main([one.url, other.url]) == 2
        assert len(one.bodies) == 1 + len(script.SIZES)  # nothing else was asked
    told = capsys.readouterr().err
    assert "a picture of 96 x 96 is 576 tokens to one and 144 to the other" in told and "same picture size" in told


def test_a_server_that_counts_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(usage=False) as one, Server(usage=False) as other:
        assert script.main([one.url, other.url]) == 2
    assert "states no number of prompt tokens" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("mmit.teachers.endpoint.time.sleep", lambda seconds: None)
    assert script.main(["http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1", "--questions", "1"]) == 2
    assert "Is the server running?" in capsys.readouterr().err
