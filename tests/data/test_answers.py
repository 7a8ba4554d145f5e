from __future__ import annotations

import random

import pytest
from small_tokenizers import FAMILIES, family

from mmit.data.answers import AnswerText
from mmit.data.thoughts import split_thought

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
