"""Many requests at once: each gets the answer it would get alone, and every one of them ends."""

from __future__ import annotations

import gc
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmit.errors import ConfigError, ImageError, TooLong
from mmit.generate import Model
from mmit.models import decoding
from mmit.serve.engine import Answering, Ask, Closing, End, Engine, ModelUnknown, Piece, QueueFull
from tests.models.small_llms import family
from tests.test_generate import LLAMA, MAMBA, TOKENIZER, build, picture

QUESTIONS = ["What is it?", "How many circles are there?", "Hello", "Which of them? " * 4, "Is it blue?", "Why?"]
WINDOW = {"model_type": "mistral", "sliding_window": 8}
MIXED = {
    "model_type": "gemma3_text",
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 4,
    "head_dim": 4,
}
LONGROPE = family("phi3-longrope") | {"vocab_size": len(TOKENIZER), "max_position_embeddings": 400}


def messages(text: str, *pictures: int, system: str = "") -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": picture(n)} for n in pictures]
    told = [{"role": "system", "content": system}] if system else []
    return [*told, {"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def text_of(answering: Answering, index: int = 0) -> str:
    events = [e for e in answering.events() if e.index == index]
    assert isinstance(events[-1], End) and not any(isinstance(e, End) for e in events[:-1])
    assert events[-1].error is None, events[-1].error
    return "".join(e.text for e in events if isinstance(e, Piece))


def ends_of(answering: Answering) -> list[End]:
    return [e for e in answering.events() if isinstance(e, End)]


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.002)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine({"tiny": build()}, max_running=5, max_waiting=100)
    yield engine
    engine.close(0)


@pytest.fixture
def own() -> Iterator[Callable[..., Engine]]:
    """An engine of a test's own, whose model may be broken."""
    made: list[Engine] = []

    def make(model: Model, **options: Any) -> Engine:
        made.append(Engine({"tiny": model}, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)


class Slow:
    """Steps of decoding wait until the test lets them go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.steps, step = threading.Event(), 0, decoding.step

        def waiting(*args: Any) -> torch.Tensor:
            self.steps += 1
            assert self.open.wait(20)
            return step(*args)

        monkeypatch.setattr(decoding, "step", waiting)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


@pytest.mark.parametrize("config", [WINDOW, MIXED, LONGROPE, MAMBA], ids=["window", "mixed", "longrope", "mamba"])
def test_greedy_answers_equal_the_models_own_in_every_family(config: dict[str, Any], own: Any) -> None:
    llama = {} if config in (MAMBA, LONGROPE) else LLAMA
    model = build(vision=False, config=llama | config)
    engine = own(model, max_running=3)
    asked = [(q, 3 + 7 * n) for n, q in enumerate(QUESTIONS)]
    expected = [model.chat(text=q, max_new_tokens=limit) for q, limit in asked]
    found = [engine.submit(Ask("tiny", messages(q), max_tokens=limit)) for q, limit in asked]
    assert [text_of(a) for a in found] == expected
    assert len(set(expected)) > 4


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.slow)])
def test_answers_equal_the_models_own_alone_and_among_others(count: int, engine: Engine) -> None:
    model, draw = engine.models["tiny"], random.Random(0)
    asked = [
        (
            messages(draw.choice(QUESTIONS) + " " * (n % 50), *draw.sample(range(3), draw.choice([0, 1, 1, 2]))),
            1 + n % 13,
        )
        for n in range(count)
    ]
    expected = [model.chat(messages=m, max_new_tokens=limit) for m, limit in asked]
    waiting = [engine.submit(Ask("tiny", m, max_tokens=limit)) for m, limit in asked]
    assert [text_of(a) for a in waiting] == expected
    alone = [text_of(engine.submit(Ask("tiny", m, max_tokens=limit))) for m, limit in asked]
    assert alone == expected


def test_counts_say_what_a_request_took(engine: Engine) -> None:
    answering = engine.submit(Ask("tiny", messages("What is it?", 0, 1), max_tokens=7))
    (end,) = ends_of(answering)
    model = engine.models["tiny"]
    prompt = model.prompt_maker().question(record("What is it?", 0, 1), 0)
    assert (end.reason, end.completion_tokens, end.prompt_tokens) == ("length", 7, prompt.length)
    assert end.image_tokens == 2 * model.vlm.image_tokens == answering.image_tokens
    assert answering.first_token_s is not None and 0 < answering.first_token_s < 20
    until(lambda: engine.state().running == engine.state().waiting == 0)


def record(text: str, *pictures: int) -> Any:
    from mmit.data.prompts import ask_messages

    return ask_messages(messages(text, *pictures))


def test_a_model_whose_prompts_share_no_row_is_batched_all_the_same(own: Any) -> None:
    model = build(vision=False)
    model._support = decoding.Support(batched=True, shared=False)
    expected = [model.chat(text=q, max_new_tokens=8) for q in QUESTIONS]
    engine = own(model, max_running=4)
    assert [text_of(a) for a in [engine.submit(Ask("tiny", messages(q), max_tokens=8)) for q in QUESTIONS]] == expected
    assert engine.state().cached_tokens == 0


def test_a_picture_seen_before_is_not_looked_at_again(engine: Engine) -> None:
    model = engine.models["tiny"]
    text_of(engine.submit(Ask("tiny", messages("Hello", 40), max_tokens=2)))
    before = model.usage.pictures
    # The same pixels in another object.
    text_of(engine.submit(Ask("tiny", messages("And now?", 40), max_tokens=2)))
    assert model.usage.pictures == before
    text_of(engine.submit(Ask("tiny", messages("And now?", 41), max_tokens=2)))
    assert model.usage.pictures == before + 1


def test_a_conversation_that_goes_on_runs_only_what_is_new(engine: Engine) -> None:
    model, told = engine.models["tiny"], messages("What is it? " * 3, 1, system="You are brief. " * 4)
    for n in range(3):
        ask = Ask("tiny", list(told), max_tokens=8)
        before = model.usage.prefill_tokens
        events = list(engine.submit(ask).events())
        end, text = events[-1], "".join(e.text for e in events if isinstance(e, Piece))
        computed = model.usage.prefill_tokens - before
        assert isinstance(end, End) and computed == end.prompt_tokens - end.cached_tokens
        assert text == model.chat(messages=ask.messages, max_new_tokens=8)
        assert end.cached_tokens > end.prompt_tokens / 2 if n else True
        told += [{"role": "assistant", "content": text or "."}, {"role": "user", "content": "And?"}]


@pytest.mark.parametrize("stop", [(), ("e",), ("abc", " c"), ("\n", "o")])
def test_pieces_add_up_to_the_answer_and_hold_no_part_of_a_stop_text(engine: Engine, stop: tuple[str, ...]) -> None:
    model = engine.models["tiny"]
    for q in QUESTIONS[:3]:
        events = list(engine.submit(Ask("tiny", messages(q, 0), max_tokens=30, stop=stop)).events())
        pieces, sent = [e for e in events if isinstance(e, Piece)], ""
        whole = model.chat(messages=messages(q, 0), max_new_tokens=30, stop=stop)
        for piece in pieces:
            sent += piece.text
            assert whole.startswith(sent) and piece.text
        assert sent == whole


def test_a_seed_draws_the_same_whatever_else_runs(engine: Engine) -> None:
    model = engine.models["tiny"]
    drawn = {"temperature": 1.3, "top_p": 0.9}
    ask = Ask("tiny", messages("What is it?", 1), max_tokens=12, seed=5, **drawn)
    alone = text_of(engine.submit(ask))
    assert alone == model.chat(messages=ask.messages, max_new_tokens=12, seed=5, **drawn)
    others = [
        Ask("tiny", messages(q), max_tokens=20, temperature=t)
        for q, t in zip(QUESTIONS, (0, 0.5, 1, 2, 0, 1), strict=True)
    ]
    running = [engine.submit(other) for other in [*others[:2], ask, *others[2:]]]
    assert text_of(running[2]) == alone
    for answering in running:
        answering.cancel()
    # Without a seed each is another.
    free = [engine.submit(Ask("tiny", messages("What is it?", 1), max_tokens=12, temperature=1.3)) for _ in range(3)]
    assert len({text_of(a) for a in free}) > 1


def test_answers_to_one_prompt_are_drawn_apart_and_its_prompt_is_run_once(engine: Engine) -> None:
    model = engine.models["tiny"]
    ask = Ask("tiny", messages("How many?", 2), max_tokens=10, seed=1, temperature=1.5, n=4)
    before = model.usage.prefill_tokens
    events = list(engine.submit(ask).events())
    texts = ["".join(e.text for e in events if isinstance(e, Piece) and e.index == n) for n in range(4)]
    assert sorted(e.index for e in events if isinstance(e, End)) == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts[0] == model.chat(messages=ask.messages, max_new_tokens=10, seed=1, temperature=1.5)
    computed = model.usage.prefill_tokens - before
    assert computed < 3 * engine.submit(ask).prompt_tokens  # of five prompts, counting that of `chat`


@torch.no_grad()
def test_logprobs_are_those_of_the_models_own_distribution(engine: Engine) -> None:
    model = engine.models["tiny"]
    events = list(
        engine.submit(Ask("tiny", prompt="The quick", max_tokens=5, logprobs=3, temperature=0.7, seed=1)).events()
    )
    tokens = [token for e in events if isinstance(e, Piece) for token in e.tokens]
    ids = TOKENIZER("The quick").input_ids
    for token in tokens:
        row = model.vlm.llm(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = row.topk(3)
        assert [t.logprob for t in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        chosen = int((row - token.logprob).abs().argmin())
        assert TOKENIZER.decode([chosen]) == token.text and float(row[chosen]) == pytest.approx(token.logprob, abs=1e-4)
        ids.append(chosen)
    assert len(tokens) == 5
    assert b"".join(t.data for t in tokens).decode("utf-8", "replace") == "".join(
        e.text for e in events if isinstance(e, Piece)
    )


def test_tokens_beside_the_text_hold_no_part_of_a_stop_text(engine: Engine) -> None:
    free = text_of(engine.submit(Ask("tiny", prompt="The quick", max_tokens=30)))
    stop = free[6:9]
    events = list(engine.submit(Ask("tiny", prompt="The quick", max_tokens=30, stop=(stop,), logprobs=0)).events())
    text, told = "", b""
    for piece in events[:-1]:
        assert isinstance(piece, Piece)
        text, told = text + piece.text, told + b"".join(t.data for t in piece.tokens)
        assert text.startswith(told.decode("utf-8", "ignore"))
    assert text == free[: free.index(stop)]


def test_a_text_is_continued_as_it_is(engine: Engine) -> None:
    model = engine.models["tiny"]
    ids = TOKENIZER("The quick brown ").input_ids
    out = model.vlm.llm.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0].tolist()
    expected = TOKENIZER.decode(out[len(ids) :], skip_special_tokens=True)
    assert text_of(engine.submit(Ask("tiny", prompt="The quick brown ", max_tokens=9))) == expected


def test_a_request_is_refused_before_anything_is_computed(engine: Engine) -> None:
    before = engine.models["tiny"].usage.prefill_tokens
    broken = [{"role": "user", "content": [{"type": "image", "image": b"no picture"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ModelUnknown, match="valid: tiny"):
        engine.submit(Ask("other", messages("Hello")))
    with pytest.raises(TooLong, match="leaves no room for an answer"):
        engine.submit(Ask("tiny", messages("Hello " * 200)))
    with pytest.raises(ImageError):
        engine.submit(Ask("tiny", broken))
    for options, told in (({"temperature": -1}, "temperature is -1"), ({"n": 0}, "n is 0"), ({"prompt": "a"}, "one")):
        with pytest.raises(ConfigError, match=told):
            engine.submit(Ask("tiny", messages("Hello"), **options))
    assert engine.models["tiny"].usage.prefill_tokens == before
    assert engine.state().waiting == 0


def test_a_request_joins_between_two_steps_and_leaves_when_it_ends(own: Any, slow: Slow) -> None:
    engine = own(build(vision=False), max_running=2)
    first = engine.submit(Ask("tiny", messages("Hello"), max_tokens=200))
    until(lambda: slow.steps == 1)
    second, third = (engine.submit(Ask("tiny", messages(q), max_tokens=3)) for q in ("Why?", "Who?"))
    assert (engine.state().running, engine.state().waiting) == (1, 2)
    slow.open.set()
    assert ends_of(second)[0].completion_tokens == ends_of(third)[0].completion_tokens == 3
    assert not first.finished
    first.cancel()
    assert ends_of(first)[0].reason == "cancelled"
    until(lambda: engine.state().running == 0)


def test_what_is_cancelled_ends_whether_it_runs_or_waits(own: Any, slow: Slow) -> None:
    engine = own(build(vision=False), max_running=1)
    runs = engine.submit(Ask("tiny", messages("Hello"), max_tokens=200, n=2))
    waits = engine.submit(Ask("tiny", messages("Hello"), max_tokens=200))
    until(lambda: slow.steps == 1)
    runs.cancel()
    waits.cancel()
    slow.open.set()
    assert [e.reason for e in ends_of(runs)] == ["cancelled", "cancelled"]
    assert [e.reason for e in ends_of(waits)] == ["cancelled"]
    assert engine.state().ended == {"cancelled": 3}


def test_a_request_out_of_time_ends_with_a_reason(own: Any, slow: Slow) -> None:
    engine = own(build(vision=False), max_running=1)
    runs = engine.submit(Ask("tiny", messages("Hello"), max_tokens=200))
    waits = engine.submit(Ask("tiny", messages("Hello"), max_tokens=2, timeout_s=0.01))
    until(lambda: slow.steps == 1)
    time.sleep(0.02)
    slow.open.set()
    (end,) = ends_of(waits)
    assert end.reason == "timeout" and "longer than 0.01 seconds" in str(end.error) and end.completion_tokens == 0
    runs.cancel()


def test_the_queue_has_a_bound(own: Any, slow: Slow) -> None:
    engine = own(build(vision=False), max_running=1, max_waiting=2)
    asked = [engine.submit(Ask("tiny", messages("Hello"), max_tokens=2))]
    until(lambda: slow.steps == 1)
    asked += [engine.submit(Ask("tiny", messages("Hello"), max_tokens=2, n=3)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit(Ask("tiny", messages("Hello")))
    assert engine.state().refused == 1
    slow.open.set()
    assert [len(ends_of(a)) for a in asked] == [1, 3, 3]


@pytest.mark.parametrize("where", ["step", "prefill", "try_choose"])
def test_an_error_while_answering_ends_these_answers_and_the_engine_goes_on(
    where: str, own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmit.serve import lane as module

    engine = own(build(vision=False), max_running=4)
    holder = module if where == "try_choose" else decoding
    whole, fails = getattr(holder, where), [True]

    def broken(*args: Any, **options: Any) -> Any:
        if fails[0]:
            raise RuntimeError("out of memory")
        return whole(*args, **options)

    monkeypatch.setattr(holder, where, broken)
    asked = [engine.submit(Ask("tiny", messages(q), max_tokens=4)) for q in QUESTIONS[:3]]
    assert [(e.reason, e.error) for a in asked for e in ends_of(a)] == [("error", "out of memory")] * 3
    fails[0] = False
    expected = engine.models["tiny"].chat(text="Hello", max_new_tokens=4)
    assert text_of(engine.submit(Ask("tiny", messages("Hello"), max_tokens=4))) == expected
    until(lambda: engine.state().running == 0)


def test_a_prompt_that_fails_spoils_no_other(own: Any, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = own(build(), max_running=4)
    slow.open.set()
    expected = engine.models["tiny"].chat(messages=messages("Hello"), max_new_tokens=4)
    slow.open.clear()
    slow.steps = 0
    first = engine.submit(Ask("tiny", messages("Hello"), max_tokens=100))
    until(lambda: slow.steps == 1)
    bad, good = (engine.submit(Ask("tiny", messages("Hello", *p), max_tokens=4)) for p in ((7,), ()))
    monkeypatch.setattr(engine.models["tiny"].vlm, "encode_images", lambda *_: torch.zeros(1, 1, 1, 1, 1))
    slow.open.set()
    assert ends_of(bad)[0].reason == "error"
    assert text_of(good) == expected
    first.cancel()


def test_an_answer_whose_logits_are_not_finite_ends_alone(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = own(build(vision=False), max_running=4)
    expected = engine.models["tiny"].chat(text="Why?", max_new_tokens=6)
    step = decoding.step

    def spoiled(llm: Any, state: Any, fed: Any) -> torch.Tensor:
        logits = step(llm, state, fed)
        logits[state.lengths >= 60] = float("nan")
        return logits

    monkeypatch.setattr(decoding, "step", spoiled)
    long, short = (engine.submit(Ask("tiny", messages(q), max_tokens=6)) for q in ("Hello " * 20, "Why?"))
    assert "not finite" in str(ends_of(long)[0].error)
    assert text_of(short) == expected


@pytest.mark.parametrize("grace", [0.0, 20.0])
def test_close_lets_answers_end_within_the_grace(grace: float, slow: Slow) -> None:
    engine = Engine({"tiny": build(vision=False)}, max_running=1)
    asked = [engine.submit(Ask("tiny", messages("Hello"), max_tokens=5)) for _ in range(2)]
    until(lambda: slow.steps == 1)
    closing = threading.Thread(target=engine.close, args=(grace,))
    closing.start()
    until(lambda: engine.state().closing)
    with pytest.raises(Closing, match="shutting down"):
        engine.submit(Ask("tiny", messages("Hello")))
    slow.open.set()
    ends = [end for a in asked for end in ends_of(a)]
    assert {e.reason for e in ends} == ({"length"} if grace else {"error"})
    assert all(e.error is None or "shutting down" in e.error for e in ends)
    closing.join(20)
    assert not closing.is_alive()


def test_a_listener_is_told_of_events_and_may_fail(engine: Engine) -> None:
    told = threading.Event()
    answering = engine.submit(Ask("tiny", messages("Hello"), max_tokens=3))
    answering.listen(told.set)
    assert told.is_set()
    list(answering.events())
    other = engine.submit(Ask("tiny", messages("Hello"), max_tokens=30))

    def fails() -> None:
        if threading.current_thread().name == "mmit-engine":
            raise RuntimeError("no loop runs")

    other.listen(fails)
    assert ends_of(other)[0].completion_tokens == 30
    assert other.get() is None


LONG = "Tell me what you see in it, and where. " * 8


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts are run 16 tokens at a time; the list tells parts and steps in the order in which they are done."""
    from mmit.serve import lane

    done: list[str] = []
    monkeypatch.setattr(lane, "PART", {"cpu": 16})

    def noting(name: str) -> Callable[..., Any]:
        whole = getattr(decoding, name)

        def noted(*args: Any) -> Any:
            done.append(name)
            return whole(*args)

        return noted

    for name in ("feed", "step"):
        monkeypatch.setattr(decoding, name, noting(name))
    return done


@pytest.mark.parametrize("config", [LLAMA, WINDOW, MIXED, LONGROPE, MAMBA])
def test_long_prompts_in_parts_change_no_answer(config: dict[str, Any], own: Any, short_parts: list[str]) -> None:
    sees = config is LLAMA
    model = build(vision=sees, config=({} if config in (MAMBA, LONGROPE) else LLAMA) | config)
    asked = [(messages(q + LONG[: 40 * n], *([n] if sees else [])), 3 + 4 * n) for n, q in enumerate(QUESTIONS)]
    expected = [model.chat(messages=m, max_new_tokens=limit) for m, limit in asked]
    short_parts.clear()
    engine = own(model, max_running=3)
    waiting = [engine.submit(Ask("tiny", m, max_tokens=limit)) for m, limit in asked]
    assert [text_of(a) for a in waiting] == expected
    in_parts = model.support.shared  # others run a prompt at once
    assert ("feed" in short_parts) == in_parts


def test_answers_go_on_between_the_parts_of_a_long_prompt(own: Any, short_parts: list[str]) -> None:
    engine = own(build(vision=False), max_running=4)
    first = engine.submit(Ask("tiny", messages("Hello"), max_tokens=400))
    until(lambda: "step" in short_parts)
    long, short = (engine.submit(Ask("tiny", messages(text), max_tokens=2)) for text in (LONG, "Why?"))
    (end,) = ends_of(long)
    assert end.completion_tokens == 2 and ends_of(short)[0].completion_tokens == 2  # which waited behind it
    first.cancel()
    between = "".join(name[0] for name in short_parts).strip("s").split("f")[1:-1]
    assert len(between) + 1 == (end.prompt_tokens - end.cached_tokens - 1) // 16 >= 5
    assert set(between) == {"s"}  # a step after every part


def test_a_prompt_that_is_run_in_parts_is_cancelled_between_them(own: Any, short_parts: list[str], slow: Slow) -> None:
    engine = own(build(vision=False), max_running=4)
    first = engine.submit(Ask("tiny", messages("Hello"), max_tokens=5))
    until(lambda: slow.steps == 1)
    long = engine.submit(Ask("tiny", messages(LONG), max_tokens=2))
    last = engine.submit(Ask("tiny", messages("Why?"), max_tokens=2))
    slow.open.set()
    until(lambda: "feed" in short_parts)
    long.cancel()
    assert [ends_of(a)[0].reason for a in (first, last)] == ["length", "length"]
    (end,) = ends_of(long)
    assert end.completion_tokens in (0, 1, 2)  # it may have been quicker
    until(lambda: engine.state().running == engine.state().waiting == 0)
    assert sum(engine.state().ended.values()) == 3


def test_an_error_in_a_part_ends_that_answer_alone(
    own: Any, short_parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(vision=False)
    expected = model.chat(text="Hello", max_new_tokens=60)
    engine = own(model, max_running=4)

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoding, "feed", broken)
    first = engine.submit(Ask("tiny", messages("Hello"), max_tokens=60))
    until(lambda: engine.state().waiting == 0)  # else both join at once, and nothing runs that would have to wait
    long = engine.submit(Ask("tiny", messages(LONG), max_tokens=60))
    assert [(e.reason, e.error) for e in ends_of(long)] == [("error", "out of memory")]
    assert text_of(first) == expected
    until(lambda: engine.state().running == 0)


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmit.serve import engine as module

    monkeypatch.setattr(module, "PREFIX_BYTES", 200_000)
    monkeypatch.setattr(module, "FEATURE_BYTES", 20_000)
    engine, draw = own(build(), max_running=8, max_waiting=3000), random.Random(0)

    def some(count: int) -> None:
        running = []
        for n in range(count):
            options: dict[str, Any] = {"max_tokens": draw.randint(1, 12), "n": draw.choice([1, 1, 1, 3])}
            options |= draw.choice([{}, {"temperature": 1.0}, {"logprobs": 2}, {"stop": ("e",)}, {"timeout_s": 0.01}])
            shown = [draw.randrange(400)] if draw.random() < 0.5 else []
            running.append(engine.submit(Ask("tiny", messages(f"{draw.choice(QUESTIONS)} {n}", *shown), **options)))
            if draw.random() < 0.2:
                draw.choice(running).cancel()
            if len(running) > 20:
                assert len(ends_of(running.pop(0))) >= 1
        for answering in running:
            assert len(ends_of(answering)) == answering.ask.n

    def memory() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    some(600)
    before, threads = memory(), threading.active_count()
    some(2000)
    until(lambda: engine.state().running == engine.state().waiting == 0)
    assert memory() < before * 1.05
    assert threading.active_count() == threads
    lane = engine._lanes["tiny"]
    assert (lane.state, lane.answers, lane.fed) == (None, [], [])
