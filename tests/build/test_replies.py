"""A teacher's text before anybody learns from it."""

from __future__ import annotations

import pytest

from mmit.build.replies import answer_turn, asked, problem, same_words, text_problem
from mmit.teachers import Draw, Reply, Request
from mmit.teachers.request import user


def reply(text: str = "Fine.", **more: object) -> Reply:
    return Reply("id", "t", text, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A cat.", ""),
        (" \n", "empty"),
        ("caf\ufffd", "not valid UTF-8"),
        ("I'm sorry, but I cannot see it.", "a refusal"),
        ("I’m unable to see images.", "a refusal"),
        ("As an AI, I have no eyes.", "a refusal"),
        ("They said: I'm sorry, but no.", ""),  # told of others
        ("I am sorry for the cat.", ""),
        ("A cat.\nUser: and now?", "role tags or control tokens"),
        ("A cat.\n### Assistant: yes", "role tags or control tokens"),
        ("The user: a person.", ""),  # not at the start of a line
        ("A cat.<|im_end|>", "role tags or control tokens"),
        ("<think>hm</think> A cat.", "role tags or control tokens"),
        ("What is it?", "repeats the prompt"),
        ("WHAT is it", "repeats the prompt"),
    ],
)
def test_a_text_is_usable_or_has_one_reason(text: str, reason: str) -> None:
    assert text_problem(text, "What is it?") == reason


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (reply(finish="length"), "cut off by length"),
        (reply(finish="refused"), "refused by the server"),
        (reply("", finish="unrecorded"), "not in the replayed journal"),
        (reply("  ", thought="hm"), "a thought without an answer"),
        (reply("Fine.", thought="hm"), ""),
    ],
)
def test_how_it_ended_is_told_before_what_it_says(given: Reply, reason: str) -> None:
    assert problem(given) == reason


def test_a_thought_is_kept_where_it_is_wanted() -> None:
    kept, bare = (answer_turn(reply(" Yes. ", thought="hm"), thought=wanted) for wanted in (True, False))
    assert (kept.text, kept.thinking, bare.thinking) == ("Yes.", "hm", None)
    assert answer_turn(reply(), thought=True).thinking is None


def test_words_are_compared_without_marks_and_case() -> None:
    assert same_words("What, is it?", "what is IT") and not same_words("what is", "what is it")


def test_the_provenance_names_every_reply_and_the_last_as_the_answers() -> None:
    request = Request(user("q"), Draw(seed=2))
    replies = [Reply("r1", "a", ""), Reply("r2", "b", ""), Reply("r3", "a", "")]
    found = asked("judge", request, replies, template="t", parents=("p",), seed=4)
    assert (found["teacher"], found["request"], found["requests"]) == ("a, b", "r3", ["r1", "r2", "r3"])
    assert (found["prompt"], found["parents"], found["score"]) == (request.digest, ["p"], None)
