"""The formats in code: what each writes, what marks its text, and a user's own function that is tried first."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from mmit.data.chat_builtin import BUILT_IN, Piece, Said, Words, merged, own_writer
from mmit.errors import ConfigError, RecordError

IMG = None
ASK = Said("user", (IMG, Words("q1")), 0)
REST = ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")
TALK = [ASK, *(Said(role, (Words(text),), n) for n, (role, text) in enumerate(REST, 1))]
MANY = [name for name in BUILT_IN if name != "plain"]


def text(pieces: list[Piece]) -> str:
    return "".join("<image>" if piece.kind == "image" else piece.text for piece in pieces)


def write(name: str, turns: list[Said], *, generate: bool = False) -> list[Piece]:
    return BUILT_IN[name][0](turns, BUILT_IN[name][1] or "</s>", generate)


@pytest.mark.parametrize("name", MANY)
def test_every_part_is_written_once_in_order_and_nothing_else_is_content(name: str) -> None:
    whole = write(name, [Said("system", (Words("be short"),), -1), *TALK])
    own = [(p.turn, p.text) for p in whole if p.kind == "content"]
    assert own == [(-1, "be short"), (0, "q1"), (1, "a1"), (2, "q2"), (3, "a2")]
    assert [p.turn for p in whole if p.part == "end"] == [1, 3]
    assert sum(p.kind == "image" for p in whole) == 1


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("until", [1, 3])
def test_a_prompt_is_how_the_conversation_begins(name: str, until: int) -> None:
    prompt = text(write(name, TALK[:until], generate=True))
    whole = text(write(name, TALK))
    assert whole.startswith(prompt) and whole[len(prompt) :].lstrip(" ").startswith(f"a{(until + 1) // 2}")


@pytest.mark.parametrize("name", MANY)
def test_a_thought_stands_in_front_of_its_answer_and_in_its_own_marks(name: str) -> None:
    def answer(**more: Any) -> str:
        return text(write(name, [ASK, Said("assistant", (Words("a"),), 1, **more)]))

    assert answer(thought="t").replace("<think>\nt\n</think>\n\na", "a") == answer() != answer(thought="t")
    assert "<think>t</think>a" in answer(thought="t", inline=("<think>", "</think>"))


def test_plain_is_for_one_image_and_its_caption() -> None:
    caption = Said("assistant", (Words("a cat"),), 1)
    assert text(write("plain", [Said("user", (IMG,), 0), caption])) == "<image>a cat\n"
    assert text(write("plain", [Said("user", (IMG,), 0)], generate=True)) == "<image>"
    with pytest.raises(RecordError, match="the user turn has text"):
        write("plain", [ASK, caption])
    with pytest.raises(RecordError, match="exactly one user turn"):
        write("plain", TALK)


def test_vicuna_puts_a_newline_between_leading_images_and_text_alone() -> None:
    def asked(*parts: Words | None) -> str:
        return text(write("vicuna_v1", [Said("user", parts, 0)], generate=True)).split("USER: ")[1]

    assert asked(IMG, IMG, Words("q")) == "<image><image>\nq ASSISTANT:"
    assert asked(IMG, Words("\nq")) == "<image>\nq ASSISTANT:"
    assert asked(Words("q"), IMG) == "q<image> ASSISTANT:" and asked(IMG) == "<image> ASSISTANT:"


@pytest.mark.parametrize(
    ("left", "right", "kept", "spans", "marks"),
    [
        (None, None, "ab <x> c", ((1, 1.0), (8, None)), ((3, 6),)),
        ("", "", "  ab <x> c  ", ((3, 1.0), (12, None)), ((5, 8),)),
        (" ", "", "ab <x> c  ", ((1, 1.0), (10, None)), ((3, 6),)),
    ],
)
def test_stripping_moves_spans_and_marks_with_the_text(
    left: str | None, right: str | None, kept: str, spans: Any, marks: Any
) -> None:
    words = Words("  ab <x> c  ", ((3, 1.0), (12, None)), ((5, 8),))
    assert words.stripped(left, right) == Words(kept, spans, marks)


def test_template_pieces_of_one_part_are_joined_and_an_answer_must_not_vanish() -> None:
    end = Piece("template", "</s>", 1, "end")
    pieces = [Piece("template", "a"), Piece("template", ""), Piece("template", "b"), end, Piece("template", "\n")]
    assert merged(pieces, frozenset()) == [Piece("template", "ab"), end, Piece("template", "\n")]
    empty = Piece("content", "", 1, "text")
    assert merged([empty], frozenset()) == []
    with pytest.raises(RecordError, match="strips the answer to nothing"):
        merged([empty], {1})


def own(monkeypatch: pytest.MonkeyPatch, write: Any, **attributes: Any) -> tuple[Any, str]:
    module = ModuleType("own_formats")
    for name, value in attributes.items():
        setattr(write, name, value)
    module.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_formats", module)
    return own_writer("own_formats:write")


def sound(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    out = []
    for said in turns:
        out.append(Piece("template", f"{said.role}:"))
        out += [Piece("image") if p is None else Piece("content", p.text, said.number, "text") for p in said.parts]
        out += [Piece("template", end, said.number, "end")] if said.role == "assistant" else []
    return [*out, Piece("template", "assistant:")] if generate else out


def without_images(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    return [piece for piece in sound(turns, end, generate) if piece.kind != "image"]


def without_ends(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    return [piece for piece in sound(turns, end, generate) if piece.part != "end"]


def another_prompt(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    return [*sound(turns, end, generate), *([Piece("template", "Go!")] if generate else [])]


def first_turn_alone(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    return sound(turns[:2], end, generate)


def no_list(turns: list[Said], end: str, generate: bool) -> str:
    return ""


def failing(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    raise KeyError("oops")


def test_a_sound_function_is_taken_with_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own(monkeypatch, sound) == (sound, "")
    assert own(monkeypatch, sound, end="<eot>") == (sound, "<eot>")


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (without_images, "does not write every part"),
        (first_turn_alone, "does not write every part"),
        (without_ends, "does not end every answer"),
        (another_prompt, "writes a prompt"),
        (no_list, "returned no list of pieces"),
        (failing, "raised KeyError"),
    ],
)
def test_a_function_that_loses_something_is_refused_before_any_record(
    monkeypatch: pytest.MonkeyPatch, write: Any, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        own(monkeypatch, write)
    assert caught.value.where == "model.chat.format" and caught.value.remedy
