"""Requests through a desk: each asked once, answered in order, shared out among teachers."""

from __future__ import annotations

from mmit.teachers import Desk, Draw, Journal, Reply, Request
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


def test_weights_share_requests_out_by_content(tmp_path):
    teachers = [Echo("a"), Echo("b")]
    work = Desk(teachers, Journal(tmp_path / "j.jsonl", {}), weights=[3, 1])
    first = [reply.teacher for reply in work.ask(requests(800))]
    assert 0.7 < first.count("a") / 800 < 0.8
    assert [reply.teacher for reply in work.ask(requests(800)[::-1])] == first[::-1]
