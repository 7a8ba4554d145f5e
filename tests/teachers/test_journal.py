"""The journal as cache, resume state and replay file."""

from __future__ import annotations

import json

import pytest

from mmit.errors import ConfigError, MmitError
from mmit.teachers import Desk, Journal, open_teachers
from tests.teachers.test_desk import Echo, requests


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


def test_the_journal_holds_the_request_and_the_reply(tmp_path):
    Desk([Echo()], Journal(tmp_path / "j.jsonl", {})).ask(requests(1))
    row = json.loads((tmp_path / "j.jsonl").read_text().splitlines()[1])
    assert row["messages"] == [{"role": "user", "parts": [{"text": "q0"}]}] and row["purpose"] == "write"
    assert row["draw"]["seed"] == 0 and row["reply"]["prompt_tokens"] == 2
