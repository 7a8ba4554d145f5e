"""mmit.eval.judges and endpoint, against a server of one's own on 127.0.0.1."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmit.errors import ConfigError, MmitError
from mmit.eval.endpoint import EndpointModel
from mmit.eval.judges import JUDGES, Judge
from mmit.eval.tasks import load_task, task_items
from mmit.records import Record
from mmit.teachers.endpoint import Endpoint, openai_messages
from mmit.teachers.request import Request, user
from tests.eval.benchmarks import CASES, picture
from tests.eval.loose import answered
from tests.teachers.server import Server

Reply = Callable[[dict[str, Any]], "tuple[int, Any]"]


class Stub:
    """An OpenAI-compatible server; `reply` gives status and text (or a whole body) for a request."""

    def __init__(self) -> None:
        self.reply: Reply = lambda body: (200, "ok")
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # a body waits for nobody to acknowledge its headers: 40 ms

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, dict(self.headers), body))
                status, said = stub.reply(body)
                whole = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                content = json.dumps(whole if isinstance(said, str) else said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    yield made
    made.server.shutdown()
    made.server.server_close()


def prompt_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"]


def judge(stub: Stub, path: Path, name: str = "judge:mmvet", **options: Any) -> Judge:
    endpoint = Endpoint(stub.url, "big", key_env="TEST_KEY", pause=0.0, in_flight=1)
    return Judge(name, endpoint, path=path, judge="big", **options)


def reply_of(endpoint: Endpoint) -> str:
    [(_, reply)] = endpoint.ask([Request(user("q"))])
    return reply.text


REFERENCES = [
    {"question": "x?", "answer": "-1", "capability": ["ocr", "math"]},
    {"question": "who?", "answer": "Ada {prediction}", "capability": ["rec"]},
]


def test_mmvet(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "s3cret")
    stub.reply = lambda body: (200, "0.5" if "Prediction: {question}" in prompt_of(body) else "1.0")
    metric = judge(stub, tmp_path / "j.jsonl")
    score = metric(["{question}", "Ada"], REFERENCES)
    assert score.value == 0.75 and score.details["values"] == [0.5, 1.0]
    assert {name: part.value for name, part in score.by_group.items()} == {"math": 0.5, "ocr": 0.5, "rec": 1.0}
    path, headers, body = stub.requests[1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer s3cret"
    assert (body["model"], body["temperature"]) == ("big", 0) and "Ground truth: Ada {prediction}\n" in prompt_of(body)
    kept = (tmp_path / "j.jsonl").read_text()
    assert "s3cret" not in kept and [json.loads(line)["scores"] for line in kept.splitlines()] == [[0.5], [1.0]]
    # What is on file is not asked again; another answer, and another judge, are.
    assert metric(["{question}", "Ada"], REFERENCES) == score and len(stub.requests) == 2
    metric(["{question}", "Bob"], REFERENCES)
    assert len(stub.requests) == 3
    Judge("judge:mmvet", metric.teacher, path=tmp_path / "j.jsonl", judge="other")(["Ada"], REFERENCES[1:])
    assert len(stub.requests) == 4


def test_llava_bench(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, "8 6\nThe first is better." if "Hawaii" in prompt_of(body) else "10, 9")
    rows = [{"question": "q", "context": c, "answer": "a", "category": "conv"} for c in ("Hawaii", "Rome")]
    score = judge(stub, tmp_path / "j.jsonl", "judge:llava_bench")(["x", "y"], rows, groups=["conv", "detail"])
    assert score.value == pytest.approx(15 / 18)
    assert {name: part.value for name, part in score.by_group.items()} == {"conv": 6 / 8, "detail": 9 / 10}


@pytest.mark.parametrize(
    ("name", "text", "scores"),
    [
        ("mmvet", "0.7", [0.7]),
        ("mmvet", "Correctness: 1", [1.0]),
        ("mmvet", "0.0", [0.0]),
        ("mmvet", "7", None),
        ("mmvet", "", None),
        ("llava_bench", "7 8\nbecause", [7.0, 8.0]),
        ("llava_bench", "7.5, 8", [7.5, 8.0]),
        ("llava_bench", "Both are fine.\n7 8", None),
        ("llava_bench", "0 11", None),
    ],
)
def test_how_judgements_are_read(name: str, text: str, scores: list[float] | None) -> None:
    assert JUDGES[f"judge:{name}"].read(text) == scores


def test_a_judge_that_gives_no_score_is_an_error_not_a_zero(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, "I would rather not.")
    with pytest.raises(MmitError, match="no score in 3 replies, the last being 'I would rather not.'"):
        judge(stub, tmp_path / "j.jsonl")(["a"], REFERENCES[:1])
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 3
    stub.reply = lambda body: (200, "0.2")
    assert judge(stub, tmp_path / "j.jsonl")(["a"], REFERENCES[:1]).value == 0.2


def test_ones_own_wording(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, "1")
    judge(stub, tmp_path / "j.jsonl", prompt="{answer} or {prediction}?")(["a"], REFERENCES[:1])
    assert prompt_of(stub.requests[0][2]) == "-1 or a?"
    with pytest.raises(ConfigError, match="no {prediction}"):
        judge(stub, tmp_path / "j.jsonl", prompt="hello")


def test_a_judged_task_from_files_to_report(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, "0.4")
    task = load_task("mmvet", data_root=tmp_path)
    CASES["mmvet"][0](tmp_path / "mmvet")

    class Says:
        def generate(self, records: Any, **options: Any) -> list[str]:
            return ["because"] * len(records)

    metric = judge(stub, tmp_path / "out" / "judgements.jsonl")
    result = answered(Says(), task, out_dir=tmp_path / "out", metric=metric)
    assert result.score.value == pytest.approx(0.4) and (tmp_path / "out" / "judgements.jsonl").exists()


def test_a_busy_server_is_asked_again(stub: Stub) -> None:
    waiting = [503, 429]
    stub.reply = lambda body: (waiting.pop(), "busy") if waiting else (200, " done ")
    assert reply_of(Endpoint(stub.url, "m", pause=0.0)) == "done"
    assert len(stub.requests) == 3


def test_a_reply_that_is_cut_off_is_asked_for_again() -> None:
    with Server(lambda body: "done") as server:
        server.faults = [("cut",), ("hang up",)]
        assert reply_of(Endpoint(server.url, "m", pause=0.0)) == "done"
        server.faults = [("cut",)] * 2
        with pytest.raises(MmitError, match="no answer"):
            reply_of(Endpoint(server.url, "m", pause=0.0, tries=2))


def test_what_a_server_does_wrong_is_told(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    endpoint = Endpoint(stub.url, "m", pause=0.0, tries=2)
    for status, said, wanted in ((401, "bad key", "HTTP 401"), (500, "oops", "HTTP 500"), (200, {}, "holds no answer")):
        stub.reply = lambda body, status=status, said=said: (status, said)  # type: ignore[misc]
        with pytest.raises(MmitError, match=wanted) as caught:
            reply_of(endpoint)
        assert "s3cret" not in str(caught.value)
    with pytest.raises(MmitError, match="Is the server running"):
        reply_of(Endpoint("http://127.0.0.1:9/v1", "m", pause=0.0, tries=2))
    for url, model in (("ftp://x", "m"), ("file:///etc/passwd", "m"), (stub.url, "")):
        with pytest.raises(ConfigError):
            Endpoint(url, model)


def test_an_endpoint_is_evaluated_like_a_model(stub: Stub, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        parts = body["messages"][0]["content"]
        assert [part["type"] for part in parts] == ["image_url", "text"]
        assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,")
        return 200, "yes"

    stub.reply = reply
    task = load_task("pope", data_root=tmp_path)
    CASES["pope"][0](tmp_path / "pope")
    model = EndpointModel(Endpoint(stub.url, "m", pause=0.0))
    result = answered(model, task, out_dir=tmp_path / "out", batch_size=4)
    assert (result.score.value, result.score.n, len(stub.requests)) == (0.5, 6, 6)
    blank = model.generate([task_items(task)[0].prompt], blank_images=True)
    urls = [request[2]["messages"][0]["content"][0]["image_url"]["url"] for request in stub.requests[-2:]]
    assert blank == ["yes"] and urls[0] != urls[1]


def test_turns_as_messages() -> None:
    record = Record.triple("what?", "this", images=[])
    assert openai_messages(record.turns) == [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "this"},
    ]
    assert len(picture()) > 0


def test_an_evaluated_endpoint_waits_as_told_and_keeps_an_account() -> None:
    records = [Record.triple(f"question {n}", "", images=[]) for n in (0, 1, 1)]
    with Server(lambda body: prompt_of(body)) as server:
        server.faults = [("status", 429, "slow down", {"Retry_After": "0.3"})]
        model = EndpointModel(Endpoint(server.url, "m", pause=0.0, in_flight=1, price={"input": 1.0}))
        assert model.generate(records) == ["question 0", "question 1", "question 1"]
        assert server.times[1] - server.times[0] >= 0.29
        assert (model.account.requests, model.account.attempts) == (3, 4)
        assert model.account.prompt_tokens == server.prompt_tokens and model.account.cost > 0


def test_a_refused_question_is_an_error_not_a_wrong_answer() -> None:
    refusal = {"error": {"code": "content_filter", "message": "no"}}
    too_long = {"error": {"code": "context_length_exceeded", "message": "too many tokens"}}
    with Server() as server:
        model = EndpointModel(Endpoint(server.url, "m", pause=0.0))
        for error, problem in ((refusal, "refuses the question"), (too_long, "too long")):
            server.faults = [("status", 400, json.dumps(error))]
            with pytest.raises(MmitError, match=problem):
                model.generate([Record.triple("q", "", images=[])])
