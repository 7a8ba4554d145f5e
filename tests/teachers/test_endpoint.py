"""An endpoint against a real server that is busy, slow, broken or wrong: retries, ends, and counts."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path

import PIL.Image
import pytest

from mmit.errors import ConfigError, MmitError
from mmit.records import Image
from mmit.teachers import BudgetError, Desk, Draw, Journal, Request
from mmit.teachers.desk import ledger
from mmit.teachers.endpoint import Endpoint
from mmit.teachers.request import user
from tests.teachers.server import Server


def requests(count: int) -> list[Request]:
    return [Request(user(f"question {n}"), Draw(max_tokens=8, seed=n)) for n in range(count)]


def endpoint(server: Server, **options) -> Endpoint:
    return Endpoint(server.url, "m", **({"pause": 0.01, "deadline": 20.0} | options))


def desk(tmp_path: Path, teacher: Endpoint, **options) -> Desk:
    return Desk([teacher], Journal(tmp_path / "journal.jsonl", {}), **options)


def test_the_ledger_equals_the_servers_own_count_in_spite_of_faults(tmp_path):
    with Server(lambda body: body["messages"][0]["content"].upper()) as server:
        server.faults = [
            ("status", 429, "slow down", {"Retry_After": "0.05"}),
            ("status", 500, "oops"),
            ("cut",),
            ("hang up",),
            ("raw", b"<html>"),
            ("raw", b"[1]"),
        ]
        work = desk(tmp_path, endpoint(server, price={"input": 1.0, "output": 2.0}))
        replies = work.ask(requests(20))
        assert [reply.text for reply in replies] == [f"QUESTION {n}" for n in range(20)]
        (account,) = ledger(work.journal.entries.values())["m"].values()
        assert (account["requests"], account["attempts"]) == (20, 26) and server.served == 20
        assert account["prompt_tokens"] == server.prompt_tokens and account["new_tokens"] == server.new_tokens
        assert account["cost"] == pytest.approx((server.prompt_tokens + 2 * server.new_tokens) / 1e6)
        again = desk(tmp_path, endpoint(server))
        assert again.ask(requests(20)) == replies and server.served == 20  # nothing is asked twice


def test_retry_after_holds_all_requests_back(tmp_path):
    with Server() as server:
        server.faults = [("status", 429, "slow", {"Retry_After": "0.2"})]
        desk(tmp_path, endpoint(server, in_flight=1)).ask(requests(3))
        assert min(b - server.times[0] for b in server.times[1:]) >= 0.19


def test_a_slow_body_ends_at_the_deadline(tmp_path):
    with Server() as server:
        server.faults = [("slow",)] * 9
        began = time.monotonic()
        with pytest.raises(MmitError, match="no answer within 0.2 s"):
            desk(tmp_path, endpoint(server, deadline=0.2)).ask(requests(1))
        assert time.monotonic() - began < 2


def test_a_wrong_key_ends_at_once_with_the_servers_words_and_the_key_stays_unsaid(tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_KEY", "secret-key-value")
    with Server() as server:
        server.faults = [("status", 401, "invalid api key")] * 9
        with pytest.raises(MmitError, match="invalid api key") as found:
            desk(tmp_path, endpoint(server, key_env="OWN_KEY", in_flight=1)).ask(requests(5))
        assert len(server.bodies) == 1 and "OWN_KEY" in str(found.value)
        assert server.headers[0]["Authorization"] == "Bearer secret-key-value"
    assert "secret-key" not in str(found.value) + (tmp_path / "journal.jsonl").read_text()


def test_replies_in_flight_are_kept_when_another_request_fails(tmp_path):
    with Server() as server:
        server.pause = 0.05
        server.faults = [("status", 404, "no such model")]
        with pytest.raises(MmitError, match="no such model"):
            desk(tmp_path, endpoint(server, in_flight=4)).ask(requests(40))
        # The other three of the first four, and what was sent in the place of those that came back before the 404.
        assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1 + server.served
        assert 3 <= server.served <= 6


def test_refusals_too_long_prompts_and_bytes_that_are_no_text_concern_one_request(tmp_path):
    with Server() as server:
        reply = {"choices": [{"message": {"content": "caf?"}, "finish_reason": "length"}]}
        server.faults = [
            ("status", 400, json.dumps({"error": {"code": "content_filter", "message": "no"}})),
            ("status", 400, json.dumps({"error": {"code": "context_length_exceeded", "message": "long"}})),
            ("raw", json.dumps(reply).encode().replace(b"?", b"\xff")),
        ]
        work = desk(tmp_path, endpoint(server, in_flight=1))
        replies = work.ask(requests(4))
        assert [reply.finish for reply in replies] == ["refused", "length", "length", "stop"]
        assert replies[2].text == "caf\ufffd" and replies[2].prompt_tokens is None
        assert ledger(work.journal.entries.values())["m"]["write"]["unstated"] == 1


@pytest.mark.parametrize("budget", [{"tokens": 60}, {"requests": 7}, {"cost": 0.00002}])
def test_the_budget_is_passed_by_no_more_than_the_requests_in_flight(tmp_path, budget):
    with Server(lambda body: "a b c") as server:
        server.pause = 0.01
        teacher = endpoint(server, in_flight=3, price={"input": 1.0, "output": 1.0})
        with pytest.raises(BudgetError, match="are not asked yet"):
            desk(tmp_path, teacher, budget=budget).ask(requests(30))
        total = server.prompt_tokens + server.new_tokens
        each = total / server.served
        spent = {"tokens": total, "requests": server.served, "cost": total / 1e6}
        (key, limit) = next(iter(budget.items()))
        most = {"tokens": 3 * each, "requests": 3, "cost": 3 * each / 1e6}
        assert limit <= spent[key] <= limit + most[key]
        rest = desk(tmp_path, teacher).ask(requests(30))
        assert len(rest) == 30 and server.served == 30


def test_limits_of_requests_at_a_time_and_a_minute(tmp_path):
    with Server() as server:
        server.pause = 0.02
        desk(tmp_path, endpoint(server, in_flight=2, per_minute=2400)).ask(requests(8))
        assert server.most_at_once <= 2
        assert server.times[-1] - server.times[0] >= 7 * 0.025 * 0.9


def test_images_and_draws_reach_the_server(tmp_path):
    path = tmp_path / "red.png"
    PIL.Image.new("RGB", (3, 2), (255, 0, 0)).save(path)
    request = Request(user(Image(str(path)), "Which colour?"), Draw(0.7, 0.5, 16, ("\n",), 2.0, seed=5))
    with Server() as server:
        desk(tmp_path, endpoint(server)).ask([request])
        (body,) = server.bodies
    image, text = body["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert PIL.Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 0, 0) and text["text"] == "Which colour?"
    drawn = {key: body[key] for key in ("temperature", "top_p", "max_tokens", "stop", "presence_penalty", "seed")}
    assert drawn == dict(temperature=0.7, top_p=0.5, max_tokens=16, stop=["\n"], presence_penalty=2.0, seed=5)
    PIL.Image.new("RGB", (3, 2), (0, 255, 0)).save(path)
    assert Request(request.messages, request.draw).digest != request.digest  # another image is another request


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thought_in_a_field_of_its_own_is_kept_apart(tmp_path, field):
    message = {"content": "Red.", field: " first, ... "}
    with Server() as server:
        server.faults = [("raw", json.dumps({"choices": [{"message": message}], "usage": [1]}).encode())]
        (reply,) = desk(tmp_path, endpoint(server)).ask(requests(1))
    assert (reply.text, reply.thought, reply.prompt_tokens) == ("Red.", "first, ...", None)


def test_an_error_in_a_good_reply_is_asked_again_and_parts_of_text_are_an_answer(tmp_path):
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]
    with Server() as server:
        server.faults = [
            ("raw", json.dumps({"error": {"message": "busy", "code": 429}}).encode()),
            ("raw", json.dumps({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}).encode()),
        ]
        (reply,) = desk(tmp_path, endpoint(server)).ask(requests(1))
    assert (reply.text, reply.finish, reply.attempts) == ("A cat.", "stop", 2)


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    message = {"content": "A \ud83d", "reasoning": "b \ude00"}
    with Server() as server:
        server.faults = [("raw", json.dumps({"choices": [{"message": message}]}).encode())]
        (reply,) = desk(tmp_path, endpoint(server)).ask(requests(1))
    assert "\ufffd" in reply.text and "\ufffd" in reply.thought
    assert (reply.text + reply.thought).encode()  # every file can hold it


def test_bad_addresses_are_refused():
    for url, model in (("ftp://x", "m"), ("http://x/v1", "")):
        with pytest.raises(ConfigError):
            Endpoint(url, model)
