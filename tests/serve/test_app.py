"""The HTTP server without a socket: OpenAI's shapes, errors with remedies, limits, keys, clients that leave."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mmit.serve.app import Settings, build_app
from mmit.serve.engine import Answering, Engine
from mmit.serve.requests import Limits
from tests.serve.client import CHAT, COMPLETION, Client, data_url, png, shown, user
from tests.test_generate import build

HELLO: dict[str, Any] = {"model": "tiny", "messages": [user()], "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine({"tiny": build()}, max_running=4, max_waiting=2)
    yield engine
    engine.close(0)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Client:
    return Client(build_app(engine, Settings()))


def serving(engine: Engine, **settings: Any) -> Client:
    return Client(build_app(engine, Settings(**settings)))


# --- answers --------------------------------------------------------------------------------------------------------


def test_models(client: Client) -> None:
    found = client.get("/v1/models").json
    assert found["object"] == "list" and [m["id"] for m in found["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json == found["data"][0]
    assert found["data"][0]["mmit"]["images"] is True
    assert client.get("/v1/models/other").error["code"] == "model_not_found"


@pytest.mark.parametrize("images", [0, 2])
def test_an_answer_is_the_models_own(engine: Engine, client: Client, images: int) -> None:
    pictures = [png((20 + n, 24), (n * 90, 10, 200)) for n in range(images)]
    message = user(*(shown(data_url(content)) for content in pictures))
    found = client.post(CHAT, {**HELLO, "messages": [{"role": "system", "content": "Be brief."}, message]})
    assert found.status == 200, found.body
    own = engine.models["tiny"].chat(
        pictures or None, "What is it?", system="Be brief.", max_new_tokens=6, temperature=0
    )
    choice = found.json["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": own, "refusal": None} and choice["index"] == 0
    assert choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None
    usage, head = found.json["usage"], found.json
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 16 * images
    assert head["object"] == "chat.completion" and head["id"].startswith("chatcmpl-") and head["model"] == "tiny"


def test_a_stream_adds_up_to_the_answer(client: Client) -> None:
    asked = {**HELLO, "max_tokens": 20, "n": 2}
    whole = client.post(CHAT, asked).json
    found = client.post(CHAT, {**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert found.headers["content-type"].startswith("text/event-stream") and "content-length" not in found.headers
    *chunks, last = found.events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert last["mmit"]["first_token_s"] > 0 and all(chunk["usage"] is None for chunk in chunks)
    texts, ends = ["", ""], ["", ""]
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk" and chunk["id"] == last["id"]
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [choice["finish_reason"] for choice in whole["choices"]]
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:2]] == ["assistant"] * 2


def test_without_include_usage_a_stream_has_none(client: Client) -> None:
    assert all("usage" not in event for event in client.post(CHAT, {**HELLO, "stream": True}).events)


def test_completions_continue_a_text(client: Client) -> None:
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "temperature": 0, "logprobs": None}
    found = client.post(COMPLETION, asked).json
    assert found["object"] == "text_completion" and found["usage"]["completion_tokens"] <= 5
    streamed = client.post(COMPLETION, {**asked, "prompt": ["Once"], "stream": True}).events
    assert "".join(e["choices"][0]["text"] for e in streamed) == found["choices"][0]["text"]
    assert streamed[0]["object"] == "text_completion"
    assert client.post(COMPLETION, {**asked, "prompt": ["a", "b"]}).error["param"] == "prompt"


def test_a_seed_draws_the_same_again(client: Client) -> None:
    asked = {**HELLO, "temperature": 5.0, "max_tokens": 12, "seed": 7}
    first, again, other = (client.post(CHAT, {**asked, "seed": seed}).json for seed in (7, 7, 8))
    texts = [found["choices"][0]["message"]["content"] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_what_is_harmless_is_taken(client: Client) -> None:
    harmless = {"user": "x", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "tools": [], "audio": None}
    harmless |= {"response_format": {"type": "text"}, "logit_bias": {}, "frequency_penalty": 0.0, "seed": None}
    harmless |= {"stop": [], "max_completion_tokens": 3.0, "tool_choice": "auto"}
    earlier = {"role": "assistant", "content": "A cat.", "refusal": None, "tool_calls": [], "annotations": []}
    found = client.post(CHAT, {**HELLO, **harmless, "messages": [user(), earlier, user(text="Why?")]})
    assert found.status == 200 and found.json["usage"]["completion_tokens"] <= 3, found.body


# --- what is refused ------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no model": ({"model": None}, "model", "GET /v1/models"),
    "a model by number": ({"model": 3}, "model", "GET /v1/models"),
    "no messages": ({"messages": None}, "messages", "not a list of messages"),
    "empty messages": ({"messages": []}, "messages", "messages is empty, not a list of messages"),
    "messages as text": ({"messages": "hello"}, "messages", "not a list"),
    "a message as text": ({"messages": ["hello"]}, "messages[0]", "not an object"),
    "an unknown role": ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role", "did you mean 'user'"),
    "a tool": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "Tools are not supported"),
    "content as number": ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "list of parts"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    "an empty text": ({"messages": [{"role": "user", "content": " "}]}, "messages", "is empty"),
    "the assistant last": ({"messages": [user(), {"role": "assistant", "content": "x"}]}, "messages", "end with the"),
    "two users": ({"messages": [user(), user()]}, "messages", "alternate"),
    "audio": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
        "'input_audio'",
    ),
    "tool calls": (
        {"messages": [user(), {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "messages[1].tool_calls",
        "Leave it out",
    ),
    "a path": ({"messages": [user(shown("/etc/passwd"))]}, "messages[0].content[0].image_url.url", "is no image"),
    "a file URL": (
        {"messages": [user(shown("file:///etc/passwd"))]},
        "messages[0].content[0].image_url.url",
        "no image",
    ),
    "an address": ({"messages": [user(shown("http://example.org/a.png"))]}, None, "--allow-url"),
    "no base64": ({"messages": [user(shown("data:image/png;base64,%%%"))]}, None, "broken base64"),
    "data without base64": ({"messages": [user(shown("data:image/png,abc"))]}, None, "not base64"),
    "no picture": ({"messages": [user(shown(data_url(b"hello there")))]}, None, "JPEG, PNG"),
    "a cut picture": ({"messages": [user(shown(data_url(png((60, 60), form="JPEG")[:-200])))]}, None, "cannot decode"),
    "a strip": ({"messages": [user(shown(data_url(png((900, 2)))))]}, None, "200 times"),
    "an unknown file": ({"messages": [user({"type": "file", "file": {"file_id": "file-1"}})]}, None, "/v1/files"),
    "an image of the system": (
        {"messages": [{"role": "system", "content": [shown(data_url(png()))]}, user()]},
        "messages[0].content",
        "Move it to the user's",
    ),
    "surrogates": ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages[0].content", "surrogate"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    "a schema": ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty", "send 0"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    "a misspelling": ({"max_token": 5}, "max_token", "did you mean 'max_tokens'"),
    "n of 0": ({"n": 0}, "n", "from 1 to 8"),
    "n of many": ({"n": 100}, "n", "from 1 to 8"),
    "true as n": ({"n": True}, "n", "whole number"),
    "too many tokens": ({"max_tokens": 10**6}, "max_tokens", "from 1 to 4096"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "from 1"),
    "a text as temperature": ({"temperature": "hot"}, "temperature", "number from 0"),
    "cold": ({"temperature": -1}, "temperature", "from 0"),
    "top_p of 0": ({"top_p": 0}, "top_p", "above 0"),
    "a broken seed": ({"seed": 1.5}, "seed", "whole number"),
    "an empty stop": ({"stop": ""}, "stop", "1 to 1000"),
    "stops": ({"stop": ["a"] * 17}, "stop", "more than 16"),
    "stop as number": ({"stop": [1]}, "stop", "list of them"),
    "stream as text": ({"stream": "yes"}, "stream", "true or false"),
    "options without stream": ({"stream_options": {}}, "stream_options", "Set stream"),
    "an unknown option": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "include_usage"),
    "top without logprobs": ({"top_logprobs": 2}, "top_logprobs", "Set logprobs"),
    "too many tops": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_named_with_its_remedy(client: Client, engine: Engine, case: str) -> None:
    change, param, told = CASES[case]
    before = engine.models["tiny"].usage.prefill_tokens
    found = client.post(CHAT, {**HELLO, **change})
    assert found.status in (400, 404), found.body
    assert told in found.error["message"], found.error
    assert found.error["param"] == (param or found.error["param"]) and found.error["type"] == "invalid_request_error"
    assert engine.models["tiny"].usage.prefill_tokens == before, "nothing is computed for it"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not an object"),
        (b'"x"', "not an object"),
        (b"[" * 5000, "without end"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "levels deep"),
        (b"[" + b"[]," * 150_000 + b"[]]", "more than 200,000 values"),
        (b'{"model": "tiny", "model": "tiny"}', "twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_request(client: Client, body: bytes, told: str) -> None:
    found = client.post(CHAT, body)
    assert found.status == 400 and told in found.error["message"], found.error


def test_another_model_is_never_asked(client: Client) -> None:
    found = client.post(CHAT, {**HELLO, "model": "gpt-4o"})
    assert found.status == 404 and found.error["code"] == "model_not_found" and "tiny" in found.error["message"]


def test_a_prompt_that_does_not_fit(client: Client) -> None:
    found = client.post(CHAT, {**HELLO, "messages": [user(text="word " * 500)]})
    assert found.status == 400 and found.error["code"] == "context_length_exceeded"


def test_addresses_and_methods(client: Client) -> None:
    assert client.get("/v2/nothing").status == 404 and client.get("/v2/nothing").error
    assert client.get(CHAT).status == 405 and "GET" in client.get(CHAT).error["message"]
    found = client.send("POST", CHAT, [b"{}"], headers={"content-type": "text/plain"})
    assert found.status == 415 and "application/json" in found.error["message"]
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    found = client.send("POST", CHAT, [b"\x1f\x8b"], headers=packed)
    assert found.status == 415 and "the body is compressed (gzip)" in found.error["message"]
    plain = client.send("POST", CHAT, [b"[]"], headers={**packed, "content-encoding": "identity"})
    assert plain.status == 400 and "not an object" in plain.error["message"]


# --- limits ---------------------------------------------------------------------------------------------------------


def test_limits(engine: Engine) -> None:
    limited = serving(engine, limits=Limits(body=4000, images=1, pixels=900, messages=3, text=50))
    for change, status, told in (
        ({"user": "x" * 5000}, 413, "4,000 bytes"),
        ({"messages": [user(shown("data:1"), shown("data:2"))]}, 400, "more than 1 images"),
        ({"messages": [user(shown(data_url(png((31, 30)))))]}, 400, "more than the 900 allowed"),
        ({"messages": [user()] * 4}, 400, "more than 3"),
        ({"messages": [user(text="x" * 51)]}, 400, "50 characters"),
    ):
        found = limited.post(CHAT, {**HELLO, **change})
        assert found.status == status and told in found.error["message"], found.body
    assert limited.post(CHAT, {**HELLO, "messages": [user(shown(data_url(png((30, 30)))))]}).status == 200


def test_a_picture_is_refused_by_its_header(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmit.serve.images.load_fast", lambda image: pytest.fail("it was decoded"))
    limited = serving(engine, limits=Limits(pixels=10_000))
    found = limited.post(CHAT, {**HELLO, "messages": [user(shown(data_url(png((1500, 1500)))))]})
    assert found.status == 400 and "1500 x 1500" in found.error["message"]


def test_a_jpeg_of_many_scans(client: Client) -> None:
    content = png((40, 40), form="JPEG") + b"\xff\xda" * 101
    found = client.post(CHAT, {**HELLO, "messages": [user(shown(data_url(content)))]})
    assert found.status == 400 and "scans" in found.error["message"]


def test_a_body_that_comes_too_slowly(engine: Engine) -> None:
    slow = serving(engine, read_s=0.05)
    found = slow.send("POST", CHAT, [b"{"], headers={"content-type": "application/json"}, stall=True)
    assert found.status == 408 and found.headers["connection"] == "close"


def test_a_body_in_pieces_and_one_that_breaks_off(client: Client) -> None:
    whole = client.send("POST", CHAT, [b'{"model": "tiny"', b', "n": 0}'], headers={"content-type": "application/json"})
    assert whole.error["param"] == "n"


def test_a_full_queue_and_clients_that_leave(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are freed whichever way a client leaves; who finds the queue full is told when to come again."""
    made: list[Answering] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda ask: made.append(submit(ask)) or made[-1])
    client = serving(engine)
    long = {**HELLO, "max_tokens": 350, "temperature": 5.0}
    for body, after in ((long, 0), ({**long, "stream": True}, 0), ({**long, "stream": True}, 3)):
        left = client.send("POST", CHAT, [_json(body)], headers={"content-type": "application/json"}, leave_after=after)
        assert left.status in (200, 499)
        assert made[-1].cancelled or made[-1].finished
    idle(engine)
    monkeypatch.setattr(engine, "max_waiting", 0)
    found = client.post(CHAT, HELLO)
    assert found.status == 429 and int(found.headers["retry-after"]) >= 1, found.body
    assert found.error["type"] == "rate_limit_error" and found.error["code"] == "queue_full"


def idle(engine: Engine) -> None:
    until = time.monotonic() + 5
    while engine.state().running or engine.state().waiting:
        assert time.monotonic() < until, "a slot is stuck"
        time.sleep(0.005)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_an_answer_that_takes_too_long(engine: Engine) -> None:
    # With a seed: without one the first token drawn may be the end, and then nothing takes long.
    long = {**HELLO, "max_tokens": 300, "temperature": 5.0, "seed": 0}
    assert serving(engine).post(CHAT, long).json["usage"]["completion_tokens"] > 10
    hasty = serving(engine, timeout_s=0.001)
    found = hasty.post(CHAT, long)
    assert found.status == 504 and found.error["code"] == "timeout" and found.error["type"] == "server_error"
    streamed = hasty.post(CHAT, {**long, "stream": True}).events
    assert streamed[-1]["error"]["code"] == "timeout"


# --- who may ask ----------------------------------------------------------------------------------------------------


def test_keys(engine: Engine) -> None:
    client = serving(engine, keys=("first-key", "second-key"))
    for path in ("/v1/models", "/metrics", "/v1/files"):
        refused = client.get(path)
        assert refused.status == 401 and refused.error["code"] == "invalid_api_key"
        assert client.get(path, authorization="Bearer third-key").status == 401
        assert client.get(path, authorization="Basic first-key").status == 401
        assert client.get(path, authorization="Bearer second-key").status == 200
    assert client.get("/health").status == client.get("/").status == 200
    stalled = client.send("POST", CHAT, [b"{"], headers={"content-type": "application/json"}, stall=True)
    assert stalled.status == 401, "who may not ask is not listened to"


def test_names_and_origins(engine: Engine) -> None:
    local = serving(engine, hosts=("127.0.0.1", "::1"))
    assert local.get("/v1/models").status == local.get("/v1/models", host="[::1]:80").status == 200
    assert local.get("/v1/models", host="evil.example:8000").error["code"] == "host_refused"
    assert local.get("/v1/models", origin="http://127.0.0.1:8000").status == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9000", "null"):
        assert local.get("/v1/models", origin=origin).error["code"] == "origin_refused"
    assert "access-control-allow-origin" not in local.get("/v1/models").headers


def test_cors(engine: Engine) -> None:
    client = serving(engine, origins=("https://app.example",), keys=("first-key",))
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    before = client.send("OPTIONS", CHAT, headers={**asked, "access-control-request-headers": "authorization"})
    assert before.status == 200 and before.headers["access-control-allow-origin"] == "https://app.example"
    assert client.get("/v1/models", origin="https://app.example").headers["access-control-allow-origin"]
    other = client.send("OPTIONS", CHAT, headers={**asked, "origin": "https://evil.example"})
    assert other.status == 400 and "access-control-allow-origin" not in other.headers


# --- files, health, metrics, page -----------------------------------------------------------------------------------


def form(content: bytes, *, name: str = "file") -> tuple[bytes, str]:
    lines = [
        b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n',
        f'--XX\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'.encode(),
        b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--XX--\r\n",
    ]
    return b"".join(lines), "multipart/form-data; boundary=XX"


def test_files(engine: Engine) -> None:
    client = serving(engine, keys=("first-key", "second-key"), files=2)
    mine, other = {"authorization": "Bearer first-key"}, {"authorization": "Bearer second-key"}

    def put(content: bytes, **who: str) -> Any:
        body, kind = form(content)
        return client.send("POST", "/v1/files", [body], headers={"content-type": kind, **who})

    made = put(png(), **mine)
    assert made.status == 200 and made.json["object"] == "file" and made.json["bytes"] == len(png())
    name = made.json["id"]
    asked = {**HELLO, "messages": [user({"type": "file", "file": {"file_id": name}})]}
    found = client.post(CHAT, asked, **mine)
    assert found.status == 200 and found.json["usage"]["prompt_tokens_details"]["image_tokens"] == 16
    assert client.post(CHAT, {**HELLO, "messages": [user(shown(name))]}, **mine).status == 200
    assert client.post(CHAT, asked, **other).status == client.get(f"/v1/files/{name}", **other).status == 404
    assert [f["id"] for f in client.get("/v1/files", **mine).json["data"]] == [name]
    assert client.send("DELETE", f"/v1/files/{name}", headers=mine).json["deleted"] is True
    assert client.post(CHAT, asked, **mine).status == 404
    assert put(b"no picture", **mine).status == 400
    ids = [put(png(), **mine).json["id"] for _ in range(3)]
    assert [f["id"] for f in client.get("/v1/files", **mine).json["data"]] == ids[1:]
    for body, kind in ((b"x", "multipart/form-data"), (b"x", "text/plain"), form(png(), name="other")):
        assert client.send("POST", "/v1/files", [body], headers={"content-type": kind, **mine}).error


def test_health_and_metrics(engine: Engine) -> None:
    client = serving(engine)
    assert client.get("/health").json["status"] == "ok"
    client.post(CHAT, HELLO), client.post(CHAT, {}), client.get("/nowhere/at/all")
    idle(engine)
    text = client.get("/metrics").body.decode()
    for line in (
        'mmit_requests_total{route="/v1/chat/completions",code="200"} 1',
        'mmit_requests_total{route="/v1/chat/completions",code="400"} 1',
        "mmit_running 0",
        f"mmit_remembered_bytes {engine.state().remembered}",
        "mmit_time_to_first_token_seconds_count 1",
        'mmit_time_to_first_token_seconds_bucket{le="+Inf"} 1',
    ):
        assert line in text.splitlines(), line
    sample = re.compile(r'[a-z_]+(\{([a-z]+="[^"\\\n]*",?)+\})? [0-9.e+-]+')
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in text.splitlines())
    names = re.findall(r"^# TYPE (\S+) ", text, re.M)
    assert len(names) == len(set(names)) and {line.split(" ")[2] for line in text.splitlines() if "# HELP" in line} == {
        *names
    }


def test_the_page_runs_nothing_but_itself(client: Client) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2
    text = page.body.decode()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text), "it loads nothing"
    assert not re.search(r" on[a-z]+=| style=", text), "the policy would not let it"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), "text stays text"


def test_settings_of_a_server_that_ends(engine: Engine) -> None:
    closing = Engine({"tiny": engine.models["tiny"]})
    client = Client(build_app(closing, Settings()))
    closing.close(0)
    found = client.post(CHAT, HELLO)
    assert found.status == 503 and found.error["code"] == "closing" and "retry-after" in found.headers
    assert client.get("/health").status == 503


def test_a_defect_tells_a_client_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ask: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine, "submit", broken)
    inner = serving(engine)
    with pytest.raises(ZeroDivisionError):  # which uvicorn logs
        inner.post(CHAT, HELLO)
