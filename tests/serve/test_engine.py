"""Many requests at once: each gets the answer it would get alone, and every one of them ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmit.errors import ConfigError, TooLong
from mmit.serve.engine import Answering, Ask, Closing, End, Engine, ModelUnknown, Piece
from tests.test_generate import build, picture

QUESTIONS = ["What is it?", "How many circles are there?", "Hello", "Which of them? " * 4]


def messages(text: str, *pictures: int) -> list[dict[str, object]]:
    shown = [{"type": "image", "image": picture(n)} for n in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def text_of(answering: Answering, index: int = 0) -> str:
    events = list(answering.events())
    assert sum(isinstance(e, End) for e in events) == answering.ask.n
    return "".join(e.text for e in events if isinstance(e, Piece) and e.index == index)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine({"tiny": build()}, max_running=4)
    yield engine
    engine.close(0)


def test_answers_equal_the_models_own(engine: Engine) -> None:
    model = engine.models["tiny"]
    asked = [engine.submit(Ask("tiny", messages(q, n % 3), max_tokens=12)) for n, q in enumerate(QUESTIONS)]
    found = [text_of(a) for a in asked]
    assert found == [model.chat(messages=messages(q, n % 3), max_new_tokens=12) for n, q in enumerate(QUESTIONS)]


def test_a_request_is_refused_before_anything_is_computed(engine: Engine) -> None:
    before = engine.models["tiny"].usage.prefill_tokens
    with pytest.raises(ModelUnknown, match="valid: tiny"):
        engine.submit(Ask("other", messages("Hello")))
    with pytest.raises(TooLong, match="leaves no room for an answer"):
        engine.submit(Ask("tiny", messages("Hello " * 200)))
    with pytest.raises(ConfigError, match="temperature is -1"):
        engine.submit(Ask("tiny", messages("Hello"), temperature=-1))
    assert engine.models["tiny"].usage.prefill_tokens == before


def test_nothing_is_taken_after_close() -> None:
    engine = Engine({"tiny": build(vision=False)})
    engine.close(1)
    with pytest.raises(Closing):
        engine.submit(Ask("tiny", messages("Hello")))
