"""The journal as cache, resume state and replay file; several teachers; what a config may say."""

from __future__ import annotations

import json

import pytest

from mmit.errors import ConfigError, MmitError
from mmit.teachers import Desk, Draw, Journal, Reply, Request, open_teachers
from mmit.teachers.request import user


class Echo:
    """Answers with its name and the question, last request first."""

    terms, price = "MIT", {}

    def __init__(self, name: str = "echo") -> None:
        self.name = self.identity = name
        self.asked: list[str] = []

    def ask(self, requests):
        for request in reversed(list(requests)):
            self.asked.append(request.text)
            yield request, Reply("", self.name, f"{self.name}: {request.text}", "stop", 2, 1)


def requests(count: int) -> list[Request]:
    return [Request(user(f"q{n}"), Draw(seed=n)) for n in range(count)]


def test_replies_come_in_the_order_of_the_requests_and_once_each(tmp_path):
    teacher = Echo()
    work = Desk([teacher], Journal(tmp_path / "j.jsonl", {}))
    asked = [*requests(3), *requests(2)]
    assert [reply.text for reply in work.ask(asked)] == ["echo: q0", "echo: q1", "echo: q2", "echo: q0", "echo: q1"]
    assert len(teacher.asked) == 3


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_half_line_is_cut_off_and_its_request_asked_again(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    Desk([Echo()], Journal(path, {})).ask(requests(5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    teacher = Echo()
    lost = 5 + 1 - path.read_bytes().count(b"\n")
    Desk([teacher], Journal(path, {})).ask(requests(5))
    assert len(teacher.asked) == lost >= 1
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_journal_of_another_config_is_refused_and_the_setting_named(tmp_path):
    Journal(tmp_path / "j.jsonl", {"seed": 0, "prompt": {"human": 6}})
    Journal(tmp_path / "j.jsonl", {"prompt": {"human": 6}, "seed": 0})
    with pytest.raises(ConfigError, match="seed was 0, is now 1"):
        Journal(tmp_path / "j.jsonl", {"seed": 1, "prompt": {"human": 6}})


@pytest.mark.parametrize("line", ["{}", '{"reply": {"id": 1}}', "[]", "nonsense"])
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "j.jsonl"
    Desk([Echo()], Journal(path, {})).ask(requests(2))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"j.jsonl:4: the line is damaged"):
        Journal(path, {})


def test_replay_gives_the_recorded_replies_and_nothing_else(tmp_path):
    recorded = Desk([Echo("a"), Echo("b")], Journal(tmp_path / "j.jsonl", {})).ask(requests(6))
    assert [reply.teacher for reply in recorded] == ["a", "b"] * 3  # in turn
    (teacher,) = open_teachers("replay:j.jsonl", folder=str(tmp_path))
    work = Desk([teacher], Journal(tmp_path / "k.jsonl", {}))
    assert [reply.text for reply in work.ask(requests(6))] == [reply.text for reply in recorded]
    with pytest.raises(MmitError, match="'write' is not in the journal: 'q7'.*\n.*nearest"):
        work.ask(requests(8)[7:])
    (only,) = open_teachers({"open": "replay:j.jsonl", "only": "b"}, folder=str(tmp_path))
    with pytest.raises(MmitError, match="not in the journal"):
        Desk([only], Journal(tmp_path / "l.jsonl", {})).ask(requests(1))


def test_weights_share_requests_out_by_content(tmp_path):
    teachers = [Echo("a"), Echo("b")]
    work = Desk(teachers, Journal(tmp_path / "j.jsonl", {}), weights=[3, 1])
    first = [reply.teacher for reply in work.ask(requests(800))]
    assert 0.7 < first.count("a") / 800 < 0.8
    assert [reply.teacher for reply in work.ask(requests(800)[::-1])] == first[::-1]


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


def test_the_journal_holds_the_request_and_the_reply(tmp_path):
    Desk([Echo()], Journal(tmp_path / "j.jsonl", {})).ask(requests(1))
    row = json.loads((tmp_path / "j.jsonl").read_text().splitlines()[1])
    assert row["messages"] == [{"role": "user", "parts": [{"text": "q0"}]}] and row["purpose"] == "write"
    assert row["draw"]["seed"] == 0 and row["reply"]["prompt_tokens"] == 2
