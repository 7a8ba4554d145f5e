"""Requests as other people's clients write them, sent unchanged: each gets the model's own answer.

The shapes were read from the sources of VLMEvalKit (August 2026, `vlmeval/api/gpt.py` and `lmdeploy.py`), Open WebUI
0.12.4 (`routers/openai.py`, `routers/tasks.py`) and lmms-eval 0.7.3 (`models/chat/openai.py`). Where VLMEvalKit's or
lmms-eval's package is installed, the slow tests at the end drive the client itself.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.serve.app import Settings, build_app
from mmit.serve.engine import Engine
from mmit.serve.requests import Limits
from tests.serve.client import CHAT, Client, data_url, png, shown, user
from tests.serve.sockets import served
from tests.test_generate import LLAMA, build

KEY = "sk-a-key-of-this-server"
PICTURE = png((120, 140), (10, 90, 200))
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    # An answer ends with the context, long before the limits that these clients name.
    engine = Engine({"tiny": build(config={**LLAMA, "max_position_embeddings": 160})}, max_running=4)
    yield engine
    engine.close(0)


def client(engine: Engine, **settings: Any) -> Client:
    """With a key, which these clients always send."""
    return Client(build_app(engine, Settings(keys=(KEY,), **settings)), authorization=f"Bearer {KEY}")


def own(engine: Engine, messages: list[dict[str, Any]], tokens: int) -> str:
    return engine.models["tiny"].chat(messages=messages, max_new_tokens=tokens, temperature=0)


def jpeg(content: bytes = png((120, 140), (10, 90, 200), "JPEG")) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


# --- VLMEvalKit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detail", ["low", "high"])
@pytest.mark.parametrize("stream", [False, True])
def test_vlmevalkits_openai_wrapper(engine: Engine, detail: str, stream: bool) -> None:
    """A system prompt as a text, the user's turn as parts, JPEGs with `detail`, 2048 tokens, `stream` if asked."""
    shown_as = {"type": "image_url", "image_url": {"url": jpeg(), "detail": detail}}
    system = {"role": "system", "content": "Answer with one word."}
    messages = [system, {"role": "user", "content": [shown_as, {"type": "text", "text": QUESTION}]}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 2048}
    found = client(engine).post(CHAT, asked | ({"stream": True} if stream else {}))
    assert found.status == 200, found.body
    if stream:  # it joins what has choices, and leaves the rest
        answer = "".join(e["choices"][0]["delta"].get("content") or "" for e in found.events if e["choices"])
    else:
        answer = found.json["choices"][0]["message"]["content"]
    assert answer == own(engine, messages, 2048)


def test_vlmevalkits_judge(engine: Engine) -> None:
    """A text alone is a list of one part; `n` is 1 where the address is OpenAI's own, and left out elsewhere."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which option is meant?\nA. one\nB. two"}]}]
    asked = {"model": "tiny", "messages": messages, "n": 1, "temperature": 0, "max_tokens": 16}
    found = client(engine).post(CHAT, asked)
    assert found.json["choices"][0]["message"]["content"] == own(engine, messages, 16)
    assert client(engine).post(CHAT, asked, authorization="Bearer sk-another").status == 401


def test_vlmevalkits_lmdeploy_wrapper_asks_for_more_tokens_than_the_default_limit(engine: Engine) -> None:
    """16384; the answer names the limit, and a server with --max-tokens 16384 answers."""
    messages = [user(shown(jpeg()), text=QUESTION)]
    asked = {"model": "tiny", "messages": messages, "n": 1, "max_tokens": 16384, "temperature": 0.0}
    assert "4096" in client(engine).post(CHAT, asked).error["message"]
    found = client(engine, limits=Limits(tokens=16384)).post(CHAT, asked)
    assert found.json["choices"][0]["message"]["content"] == own(engine, messages, 16384)


# --- Open WebUI -------------------------------------------------------------------------------------------------------

TIME_TOOL = {
    "name": "get_current_timestamp",
    "description": "Get the time.",
    "parameters": {"type": "object", "properties": {}},
}


def test_open_webui_lists_the_models(engine: Engine) -> None:
    """At {base}/models, when a connection is verified and when the page is opened."""
    found = client(engine).get("/v1/models", accept="*/*", **{"content-type": "application/json"})
    assert found.status == 200 and [model["id"] for model in found.json["data"]] == ["tiny"]


def test_open_webui_chats(engine: Engine) -> None:
    """A stream with usage; parts as its page makes them, earlier answers as texts; its own keys stay with it."""
    shown_as = {"type": "image_url", "image_url": {"url": data_url(PICTURE)}}
    first = {"role": "user", "content": [{"type": "text", "text": QUESTION}, shown_as]}
    messages = [{"role": "system", "content": "Be brief."}, first]
    messages += [{"role": "assistant", "content": "A box."}, {"role": "user", "content": "Which colour?"}]
    asked: dict[str, Any] = {"stream": True, "model": "tiny", "messages": messages}
    asked |= {"stream_options": {"include_usage": True}, "temperature": 0.0, "max_tokens": 12}
    found = client(engine).post(CHAT, asked)
    assert found.status == 200 and found.headers["content-type"].startswith("text/event-stream"), found.body
    *chunks, last = found.events
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == own(engine, messages, 12)
    assert last["usage"]["completion_tokens"] <= 12


def test_open_webui_sends_tools_with_a_chat_unless_told_not_to(engine: Engine) -> None:
    """Refused with the way out; --ignore tools passes them over, and a call that needs one is refused still."""
    messages = [{"role": "user", "content": "What time is it?"}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    asked["tools"] = [{"type": "function", "function": TIME_TOOL}]
    refused = client(engine).post(CHAT, asked)
    assert refused.status == 400 and refused.error["param"] == "tools" and "--ignore tools" in refused.error["message"]
    lenient = client(engine, ignored=("tools",))
    found = lenient.post(CHAT, asked)
    assert found.json["choices"][0]["message"]["content"] == own(engine, messages, 8)
    assert lenient.post(CHAT, asked | {"tool_choice": "required"}).error["param"] == "tool_choice"


def test_open_webui_asks_for_titles_and_tags(engine: Engine) -> None:
    """Of a text alone, not streamed, with the default of 1000 tokens; `metadata` stays with Open WebUI."""
    told = "### Task:\nGenerate a title.\n<chat_history>\nUSER: Hi\nASSISTANT: Hello\n</chat_history>"
    messages = [{"role": "user", "content": told}]
    asked = {"model": "tiny", "messages": messages, "stream": False, "max_tokens": 1000}
    found = client(engine).post(CHAT, asked | {"temperature": 0})
    assert found.json["choices"][0]["message"]["content"] == own(engine, messages, 1000)
    assert found.json["usage"]["completion_tokens"] > 0
    assert client(engine).post(CHAT, asked | {"metadata": {"task": "title_generation"}}).status == 200


# --- the clients themselves -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vlmevalkit_itself(tmp_path: Path) -> None:
    """Its OpenAI wrapper against a server on a socket (`pip install ms-vlmeval`, or VLMEvalKit's own checkout)."""
    wrapper = pytest.importorskip("vlmeval.api.gpt", reason="VLMEvalKit is not installed", exc_type=ImportError)
    (tmp_path / "a.png").write_bytes(PICTURE)
    with served({"tiny": build()}, Settings(keys=(KEY,))) as (url, engine):
        options: dict[str, Any] = {"key": KEY, "retry": 1, "max_tokens": 8, "system_prompt": "Be brief."}
        asks = wrapper.OpenAIWrapper("tiny", api_base=f"{url}{CHAT}", **options)
        parts = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": QUESTION}]
        messages = asks.prepare_inputs(parts)
        expected = build().chat(messages=messages, max_new_tokens=8, temperature=0)
        assert expected.strip() and asks.generate(parts) == expected.strip()
        assert asks.working()
        assert engine.state().prompt_tokens > 0


@pytest.mark.slow
def test_lmms_eval_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `openai` model against a server on a socket."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/harness_env.sh makes an environment")
    pytest.importorskip("openai", reason="the client of OpenAI is not installed")
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.chat.openai import OpenAICompatible

    image = PIL.Image.open(io.BytesIO(PICTURE)).convert("RGB")
    parts = [{"type": "image", "url": image}, {"type": "text", "text": QUESTION}]
    docs = [[{"role": "user", "content": parts}], [{"role": "user", "content": parts[1:]}]]
    with served({"tiny": build()}) as (url, _):
        asks = OpenAICompatible(model_version="tiny", base_url=f"{url}/v1", api_key="none", max_retries=1)
        asks.task_dict = {"task": {"test": docs}}
        requests = []
        for number in range(len(docs)):
            arguments = ("", lambda doc: doc, {"max_new_tokens": 8, "temperature": 0}, number, "task", "test")
            requests.append(
                Instance("generate_until", arguments, number, {"task": "task", "doc_id": number, "repeats": 1})
            )
        found = asks.generate_until(requests)
    from lmms_eval.protocol import ChatMessages

    for doc, told in zip(docs, found, strict=True):
        messages = ChatMessages(messages=doc).to_openai_messages()
        assert told.text == build().chat(messages=messages, max_new_tokens=8, temperature=0)
        assert told.token_counts.input_tokens > 0
