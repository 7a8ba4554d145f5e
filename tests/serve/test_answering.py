"""One request's answers: pieces that add up, ends that come once, prompts and pictures by what they are."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

import pytest
import torch

from mmit.data.answers import AnswerText
from mmit.data.packing import Sample
from mmit.data.prompts import Prompt, PromptImage
from mmit.errors import ConfigError
from mmit.models.sampling import Sampling
from mmit.records import Image
from mmit.serve.answering import Answer, Answering, Ask, End, Piece, TokenLogprob, prompt_of, with_pixels
from tests.data.small_tokenizers import family
from tests.test_generate import build, picture

NOTHING = Prompt(0, (), {}, 0)


def answer_of(*, stop: tuple[str, ...] = (), limit: int = 1000) -> Answer:
    answering = Answering(Ask("tiny", prompt="x"), prompt_tokens=7, image_tokens=4)
    reader = AnswerText(family("byte_level"), stop, strip=False).growing()
    return Answer(answering, 0, NOTHING, {}, reader, Sampling(), torch.Generator(), limit)


def read(answering: Answering) -> tuple[list[Piece], End]:
    *pieces, end = answering.events()
    assert isinstance(end, End) and all(isinstance(piece, Piece) for piece in pieces)
    return pieces, end  # type: ignore[return-value]


@pytest.mark.parametrize("stop", [(), ("e", "ab"), (" t",)])
@pytest.mark.parametrize("limit", [3, 1000])
def test_any_tokens_are_put_once_and_in_order(stop: tuple[str, ...], limit: int) -> None:
    """Random ids: the pieces are the reader's whole text, and tokens never run ahead of the text that holds them."""
    draw, size = random.Random(0), len(family("byte_level"))
    for _ in range(60):
        answer, reason = answer_of(stop=stop, limit=limit), None
        given = [draw.randrange(size) for _ in range(draw.randrange(1, 14))]
        for place, token in enumerate(given):
            reason = answer.add(token, TokenLogprob(str(place), b"", -1.0))
            if reason:
                break
        answer.end(reason or "stop")
        pieces, end = read(answer.answering)
        assert "".join(piece.text for piece in pieces) == answer.reader.whole(answer.ids)
        places = [int(token.text) for piece in pieces for token in piece.tokens]
        assert places == list(range(len(places)))
        # The token that completes a stop text is no part of the answer, and with it any whose text the stop text holds.
        assert len(places) == len(answer.ids) or answer.reader.ended(answer.ids)
        assert end.reason == (reason or "stop") and end.completion_tokens == len(answer.ids) <= limit
        assert (end.prompt_tokens, end.image_tokens) == (7, 4)


def test_an_answer_that_broke_off_puts_no_more_text() -> None:
    answer = answer_of(stop=("zzz",))
    for token in family("byte_level")("one zz", add_special_tokens=False)["input_ids"]:
        assert answer.add(token) is None
    answer.end("error", "the disk is full")
    pieces, end = read(answer.answering)
    assert "".join(piece.text for piece in pieces) == "one " and end.error == "the disk is full"


def test_nothing_follows_an_end_and_all_answers_are_awaited() -> None:
    answering = Answering(Ask("tiny", prompt="x", n=2), prompt_tokens=1, image_tokens=0)
    answering.put(End(1, "stop"))
    answering.put(Piece(1, "late"))
    answering.put(End(1, "error"))
    assert not answering.finished
    answering.put(Piece(0, "a"))
    answering.put(End(0, "length"))
    assert answering.finished and list(answering.events()) == [End(1, "stop"), Piece(0, "a"), End(0, "length")]
    assert answering.get() is None and not list(answering.events())


def test_a_listener_that_fails_is_asked_once() -> None:
    answering, calls = Answering(Ask("tiny", prompt="x"), prompt_tokens=1, image_tokens=0), []

    def listener() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no loop runs")

    answering.listen(listener)
    for event in (Piece(0, "a"), Piece(0, "b"), End(0, "stop")):
        answering.put(event)
    assert len(calls) == 2 and len(list(answering.events())) == 3


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        ({}, "messages or a prompt, one of them"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "one of them"),
        ({"prompt": ""}, "the prompt is empty\nGive a text to continue"),
    ],
)
def test_what_is_no_question_is_refused(ask: dict[str, Any], told: str) -> None:
    class Maker:
        @staticmethod
        def tokenizer(text: str) -> Any:
            return family("byte_level")(text, add_special_tokens=False)

    with pytest.raises(ConfigError, match=told):
        prompt_of(Ask("tiny", **ask), Maker())  # type: ignore[arg-type]


def test_pictures_are_named_by_their_pixels() -> None:
    """Equal pictures under two keys become one, and every sample still shows the picture that it showed."""
    preparation = build().preparation
    assert preparation is not None
    sources = {"a": picture(0), "b": picture(1), "again": picture(0).copy()}
    spread = preparation.spread(Image(sources["a"]), where="")
    pictures: dict[Hashable, PromptImage] = {key: PromptImage(Image(sources[key]), spread, "") for key in sources}
    samples = tuple(Sample((1,), (False,), keys) for keys in (("b", "a"), ("again",)))
    prompt, pixels = with_pixels(Prompt(0, samples, pictures, 1), preparation)
    (second, first), (third,) = (sample.images for sample in prompt.samples)
    assert first == third != second and pixels.keys() == prompt.pictures.keys() == {first, second}
    for name, key in ((first, "a"), (second, "b")):
        assert torch.equal(pixels[name], preparation.pixels(Image(sources[key]), where=""))
