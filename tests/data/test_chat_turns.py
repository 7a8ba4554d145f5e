"""Turns as the formats read them: however a text is cut into parts, its thought is found and its marks move along."""

from __future__ import annotations

import random

import pytest

from mmit.data.chat_builtin import Said, Words
from mmit.data.chat_render import Extras, Outline
from mmit.data.chat_turns import extras_of, flat, has_thought, may_open, outline_of
from mmit.records import Image, Record, Text, Turn

PIC = Image("a.png")


def own() -> tuple[tuple[str, str], ...]:
    return (("[THINK]", "[/THINK]"),)


def said(*parts: str | Text | Image, role: str = "assistant", **more: object) -> Turn:
    return Turn(role, tuple(Text(p) if isinstance(p, str) else p for p in parts), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(10))
def test_how_a_text_is_cut_makes_no_difference(seed: int) -> None:
    rng, text = random.Random(seed), "<think>a b</think> an answer, and more of it"
    cuts = sorted(rng.sample(range(1, len(text)), 4))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert flat(said(*parts), 1) == flat(said(text), 1)
    weighted = flat(said(*(Text(p, weight=0.5) for p in parts), role="user"), 1)
    assert weighted.parts[0] is not None and weighted.parts[0].text == text
    assert [weight for _, weight in weighted.parts[0].spans] == [0.5] * 5
    assert weighted.parts[0].spans[-1][0] == len(text)


def test_images_keep_their_place_and_empty_texts_leave_none() -> None:
    assert flat(said("", PIC, "a", "", "b", PIC, role="user"), 0).parts == (None, Words("ab"), None)
    assert flat(said("", role="user"), 0).parts == ()


@pytest.mark.parametrize(
    ("text", "thought", "inline", "rest"),
    [
        ("<think>\nt\n</think>\n\na", "t", ("<think>\n", "\n</think>\n\n"), "a"),
        ("<think>t</think>a", "t", ("<think>", "</think>"), "a"),
        (" <think>t1 <think> t2</think>a</think>", "t1 <think> t2", (" <think>", "</think>"), "a</think>"),
        ("[THINK]t[/THINK]a", "t", None, "a"),  # marks of another model: the format writes its own
        ("<think></think>", "", ("<think>", "</think>"), None),
        ("a <think>t</think>", None, None, "a <think>t</think>"),  # not at the beginning: letters
        ("<think>t", None, None, "<think>t"),
    ],
)
def test_a_thought_opens_an_answer(text: str, thought: str | None, inline: object, rest: str | None) -> None:
    found = flat(said(text), 1, own)
    assert (found.thought, found.inline) == (thought, inline)
    assert found.parts == (() if rest is None else (Words(rest),))


def test_only_an_answer_thinks_and_a_thought_of_its_own_goes_first() -> None:
    assert flat(said("<think>t</think>q", role="user"), 0).thought is None
    both = flat(said("<think>u</think>a", thinking="t"), 1)
    assert both.thought == "t" and both.inline is None and both.parts == (Words("<think>u</think>a"),)
    # Weights of its own would be lost with the text that is taken out.
    assert flat(said(Text("<think>t</think>a", weight=1.0), Text("b", weight=0.0)), 1).thought is None


def test_marks_of_boxes_move_with_the_text_behind_a_thought() -> None:
    turn = said("<think>t</think>at ", Text("<box>", token=True), " here")
    found = flat(turn, 1)
    words = found.parts[0]
    assert found.thought == "t" and words is not None
    assert [words.text[start:end] for start, end in words.marks] == ["<box>"]
    # Of a thought that holds the mark, nothing is taken out.
    assert flat(said("<think>t ", Text("<box>", token=True), "</think>a"), 1).thought is None


def test_marks_are_asked_for_only_where_they_may_stand() -> None:
    asked: list[int] = []

    def marks() -> tuple[tuple[str, str], ...]:
        asked.append(1)
        return own()

    assert not may_open("An answer.", marks) and not may_open("", marks) and may_open("x <think>", marks)
    assert not asked
    assert may_open(" [THINK]", marks) and not may_open("(a", marks) and asked


def test_a_record_has_a_thought_only_where_it_says_something() -> None:
    ask = said("q", role="user")
    for answer, found in [
        (said("a"), False),
        (said("<think> </think>a"), False),
        (said("a", thinking=" "), False),
        (said("a", thinking="t"), True),
        (said("<think>t</think>a"), True),
    ]:
        assert has_thought(Record((ask, answer))) is found


def test_an_outline_has_no_words() -> None:
    turn = Said("assistant", (None, Words("secret")), 1, "my thought", None, ({"type": "function"},), (("name", "f"),))
    outline = outline_of(turn)
    assert outline == Outline("assistant", "it", "k", None, '[{"type": "function"}]', (("name", "f"),))
    assert (
        outline_of(turn._replace(thought="")).thought == "" and outline_of(turn._replace(thought=None)).thought is None
    )
    record = Record((said("q", role="user"),), tools=({"name": "ü"},), template_args={"n": 1})
    assert extras_of(record) == Extras('[{"name": "ü"}]', '{"n": 1}') and extras_of(Record(())) == Extras()
