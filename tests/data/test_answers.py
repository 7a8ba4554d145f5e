from __future__ import annotations

import functools
import random

import pytest

from mmit.data.answers import AnswerText
from mmit.data.thoughts import split_thought
from tests.data.small_tokenizers import FAMILIES, family

TEXT = "Grüße, naïve 你好 — 😀👩‍🔬 and so on."


def ids_of(name: str, text: str) -> list[int]:
    return family(name)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "word_piece"])
def test_what_is_shown_has_no_half_characters_and_is_never_taken_back(name: str) -> None:
    ids, reader = ids_of(name, TEXT), AnswerText(family(name))
    shown = [reader.settled(ids[:n]) for n in range(len(ids) + 1)]
    assert not any("\ufffd" in text for text in shown)
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:], strict=False))
    assert shown[-1] == reader.whole(ids) == TEXT
    assert len(set(shown)) > 10  # it does not wait for the end


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stop", [(), ("e", "xyz"), (" a", "in the")])
def test_any_ids_stream_to_the_whole_answer(name: str, stop: tuple[str, ...]) -> None:
    """Random ids hold broken bytes, control tokens and spaces in every order."""
    draw = random.Random(0)
    reader, size = AnswerText(family(name), stop), len(family(name))
    for _ in range(150):
        ids = [draw.randrange(size) for _ in range(draw.randrange(14))]
        ends = (n for n in range(len(ids) + 1) if reader.ended(ids[:n]))
        ids = ids[: next(ends, len(ids))]  # decoding ends with the token that completes a stop text
        whole, sent = reader.whole(ids), ""
        for n in range(len(ids) + 1):
            text = reader.settled(ids[:n])
            if text.startswith(sent):
                sent = text
            assert whole.startswith(sent), (ids, n)
        assert not any(text in whole for text in stop)


def test_control_tokens_and_outer_whitespace_are_no_text() -> None:
    tokenizer = family("byte_level")
    ids = ids_of("byte_level", " two\n") + tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    assert AnswerText(tokenizer).whole(ids) == "two"
    assert AnswerText(tokenizer).settled(ids) == "two"


def test_stop_texts_are_found_across_tokens_and_held_back_while_they_may_still_come() -> None:
    ids = ids_of("byte_level", "one two three")
    reader = AnswerText(family("byte_level"), ["two t"])
    assert reader.whole(ids) == "one" and reader.ended(ids)
    upto = len(ids_of("byte_level", "one two"))
    assert reader.settled(ids[:upto]) == "one" and not reader.ended(ids[:upto])
    assert reader.whole(ids[:upto]) == "one two"
    assert AnswerText(family("byte_level"), "two t").stop == ("two t",)


@pytest.mark.parametrize(
    ("said", "whole"),
    [
        ("<reason> hmm 2 </reason> No.", "<think>\nhmm 2\n</think>\n\nNo."),
        ("<reason>hmm, cut", "<think>\nhmm, cut"),
        ("<reasonable> No.", "<reasonable> No."),
        ("No. <reason>hmm</reason>", "No. <reason>hmm</reason>"),
        ("<reason></reason>No.", "<think>\n\n</think>\n\nNo."),
    ],
)
def test_thoughts_between_marks_that_are_text(said: str, whole: str) -> None:
    tokenizer = family("byte_level")
    reader = AnswerText(tokenizer, ["END"], marks=[("<reason>", "</reason>")])
    ids = tokenizer(said + "END of it", add_special_tokens=False)["input_ids"]
    assert reader.whole(ids) == whole and reader.ended(ids)
    shown = [reader.settled(ids[:n]) for n in range(len(ids) + 1)] + [whole]
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:], strict=False))
    assert split_thought(whole)[1] == ("" if "cut" in said else "No." if whole.startswith("<think>") else whole)


LONG = (TEXT + " What is in the picture?\n\n A cat  sits on <think> the mat. \U0001f600\U0001f600\U0001f600 ") * 12


def long_ids(name: str, draw: random.Random) -> list[int]:
    """Ids of a text with random ids sprinkled in: broken bytes, control tokens, spaces, runs of bytes."""
    ids, size = ids_of(name, LONG)[: draw.randrange(100, 300)], len(family(name))
    for _ in range(draw.choice((0, 3, 40))):
        place = draw.randrange(len(ids))
        ids[place:place] = [draw.randrange(size) for _ in range(draw.randrange(1, 6))]
    return ids


def decoding_once(reader: AnswerText) -> None:
    """The same ids are decoded once, not for each question about them."""
    decode = functools.lru_cache(1)(lambda ids: AnswerText._decoded(reader, list(ids)))
    reader._decoded = lambda ids: decode(tuple(ids))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strip", [True, False])
def test_a_growing_answer_is_read_as_the_whole_one(name: str, strip: bool) -> None:
    draw = random.Random(1)
    for stop in [(), ("zzz", " the mat. zz")] * 2:
        whole = AnswerText(family(name), stop, strip=strip)
        growing, ids = whole.growing(), long_ids(name, draw)
        decoding_once(whole)
        for n in range(0, len(ids) + 1, draw.choice((1, 1, 3))):
            assert growing.settled(ids[:n]) == whole.settled(ids[:n]), (ids, n)
            assert growing.whole(ids[:n]) == whole.whole(ids[:n]) and growing.ended(ids[:n]) == whole.ended(ids[:n])
        assert growing._growing is not None and growing._growing[1]._check_at  # without falling back on the whole text


def test_a_growing_answer_with_a_thought_is_read_as_the_whole_one() -> None:
    tokenizer = family("byte_level")
    marks = tokenizer.convert_tokens_to_ids(["<think>", "<tool>"])
    ids = [marks[0], *ids_of("byte_level", LONG)[:150], marks[1], *ids_of("byte_level", LONG)[:150]]
    for whole in (
        AnswerText(tokenizer, thought=(marks[:1], marks[1:])),
        AnswerText(tokenizer, marks=[("<think>", "<tool>")]),
    ):
        growing = whole.growing()
        for n in range(len(ids) + 1):
            assert growing.settled(ids[:n]) == whole.settled(ids[:n]) and growing.whole(ids[:n]) == whole.whole(ids[:n])


class Counting:
    """A tokenizer that counts what it decodes, and may put something in front that the length decides."""

    def __init__(self, *, odd: bool = False) -> None:
        self.odd, self.decoded, self.all_special_ids = odd, 0, [0]

    def decode(self, ids: list[int], **_: object) -> str:
        self.decoded += len(ids)
        return ("!" if self.odd and len(ids) > 70 else "") + "".join(chr(97 + i) for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(97 + token)


def test_the_work_of_a_growing_answer_grows_with_its_length_alone() -> None:
    tokenizer, ids = Counting(), [1 + n % 20 for n in range(4000)]
    growing = AnswerText(tokenizer).growing()
    for n in range(len(ids)):
        growing.settled(ids[: n + 1])
    assert tokenizer.decoded < 60 * len(ids)
    assert growing.whole(ids) == tokenizer.decode(ids)


def test_a_tokenizer_that_decodes_otherwise_is_noticed() -> None:
    tokenizer, ids = Counting(odd=True), [1 + n % 20 for n in range(300)]
    growing = AnswerText(tokenizer).growing()
    texts = [growing.whole(ids[: n + 1]) for n in range(len(ids))]
    assert texts[200:] == [tokenizer.decode(ids[: n + 1]) for n in range(200, 300)]
