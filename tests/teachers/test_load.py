"""Teachers by what a config says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmit.errors import ConfigError
from mmit.teachers.endpoint import Endpoint
from mmit.teachers.journal import Journal, Replay
from mmit.teachers.load import open_teachers
from mmit.teachers.request import Reply, Request, user


def journal(folder: Path) -> Path:
    made = Journal(folder / "j.jsonl", {"seed": 1})
    for name in ("a", "b"):
        made.add(Request(user(f"by {name}")), Reply(f"id-{name}", name, f"said {name}"))
    return folder / "j.jsonl"


def test_a_text_a_mapping_and_a_list_of_both_are_opened(tmp_path: Path) -> None:
    journal(tmp_path)
    described: list[Any] = ["https://h/v1#m", {"open": "replay:j.jsonl", "name": "old", "price": None, "only": "a"}]
    endpoint, replay = open_teachers(described, folder=str(tmp_path))
    assert isinstance(endpoint, Endpoint) and (endpoint.url, endpoint.model, endpoint.name) == (
        "https://h/v1",
        "m",
        "m",
    )
    assert isinstance(replay, Replay) and (replay.name, replay.only, replay.lenient) == ("old", "a", False)


def test_a_replay_holds_the_replies_of_one_teacher_where_it_is_named(tmp_path: Path) -> None:
    path = journal(tmp_path)
    requests = [Request(user("by a")), Request(user("by b"))]
    both = Replay(path)
    assert [reply.text for _, reply in both.ask(requests)] == ["said a", "said b"]
    one = Replay(path, only="a", lenient=True)
    found = [(reply.text, reply.finish) for _, reply in one.ask(requests)]
    assert found == [("said a", "stop"), ("", "unrecorded")] and one.name == "a"


def test_leniency_is_given_to_replays_and_refused_where_there_is_none(tmp_path: Path) -> None:
    journal(tmp_path)
    (replay,) = open_teachers("replay:j.jsonl", folder=str(tmp_path), lenient=True)
    assert isinstance(replay, Replay) and replay.lenient
    with pytest.raises(ConfigError, match="--lenient is for replayed teachers"):
        open_teachers("https://h/v1#m", lenient=True)


@pytest.mark.parametrize(
    ("described", "told"),
    [
        ({"name": "a"}, "cannot tell which teacher is meant by"),
        ([3], "cannot tell which teacher is meant by 3"),
        ("local:", "cannot open 'local:'"),
        ({"open": "https://h/v1#m", "tries": 0}, "tries is 0"),
        ({"open": "https://h/v1#m", "tries": True}, "tries is True"),
        ({"open": "https://h/v1#m", "pause": -1}, "pause is -1"),
        ({"open": "https://h/v1#m", "price": {"in": 1}}, "price is"),
        ({"open": "https://h/v1#m", "batch_size": 4}, "unknown key 'batch_size' of teacher https://h/v1#m"),
        ({"open": "local:here", "batch_size": 1.5}, "batch_size is 1.5"),
        ({"open": "replay:j.jsonl", "lenient": "yes"}, "lenient is 'yes'"),
    ],
)
def test_what_no_teacher_can_be_made_of_is_named(described: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        open_teachers(described)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (None, "missing"),
        ("gpt-4", "cannot open"),
        ({"open": "http://h/v1#m", "inflight": 3}, "did you mean 'in_flight'"),
        ({"open": "http://h/v1#m", "in_flight": "many"}, "in_flight is 'many'"),
        ({"open": "http://h/v1#m", "price": 3}, "price is 3"),
        (["http://h/v1#m", "http://g/v1#m"], "two teachers are named 'm'"),
        ("http://h/v1", "no model named"),
        ("replay:none.jsonl", "not a journal"),
    ],
)
def test_teachers_that_cannot_be_opened(described, said):
    with pytest.raises(ConfigError, match=said):
        open_teachers(described)
