"""The chat formats that need no Jinja template, each a function from turns to pieces.

Owns Piece and the table BUILT_IN. Takes turns already checked and flattened by mmit/data/chat.py; gives
pieces. Knows no tokenizer: the text that ends an answer is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, cast

from mmit.errors import RecordError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Origin = Literal["template", "content", "image"]
# A turn as the formats see it: role, and its parts with neighbouring texts joined; None is an image.
FlatTurn = tuple[Literal["system", "user", "assistant"], list[str | None]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a conversation: the format's own text, a person's text, or the place of an image."""

    kind: Origin
    text: str = ""
    supervised: bool = False


_IMAGE = Piece("image")


def _template(text: str) -> Piece:
    return Piece("template", text)


def _parts(parts: list[str | None]) -> list[Piece]:
    return [_IMAGE if part is None else Piece("content", part) for part in parts]


def _answer(parts: list[str | None], end: str) -> list[Piece]:
    return [Piece("content", cast(str, parts[0]), True), Piece("template", end, True)]


def _leading_images(parts: list[str | None]) -> tuple[list[str | None], list[str | None]]:
    count = next((i for i, part in enumerate(parts) if part is not None), len(parts))
    return parts[:count], parts[count:]


def _plain(turns: list[FlatTurn], end: str, generate: bool) -> list[Piece]:
    """LLaVA's pre-training format: image, caption, newline."""
    if [role for role, _ in turns] != ["user", "assistant"][: 2 - generate]:
        _refuse_plain("has exactly one user turn and one answer, and no system turn", "Split the record.")
    if any(part is not None for part in turns[0][1]):
        _refuse_plain("writes no prompt, but the user turn has text", "Remove the text from the record.")
    return _parts(turns[0][1]) + ([] if generate else _answer(turns[1][1], end))


def _refuse_plain(rule: str, remedy: str) -> NoReturn:
    raise RecordError(f"the chat format 'plain' {rule}", remedy=f"{remedy} Or use another chat format.")


def _vicuna_v1(turns: list[FlatTurn], end: str, generate: bool) -> list[Piece]:
    """Vicuna 1.1 as in LLaVA-1.5: `{system} USER: {q} ASSISTANT: {a}</s>USER: ...`.

    Images that open a user turn are followed by one newline, as LLaVA writes them.
    """
    out = []
    if turns[0][0] != "system":
        out.append(_template(VICUNA_SYSTEM + " "))
    for role, parts in turns:
        if role == "system":
            out += [*_parts(parts), _template(" ")] if parts else []
        elif role == "user":
            images, rest = _leading_images(parts)
            newline = [_template("\n")] if images and rest and not cast(str, rest[0]).startswith("\n") else []
            out += [_template("USER: "), *_parts(images), *newline, *_parts(rest), _template(" ASSISTANT:")]
        else:
            out += [_template(" "), *_answer(parts, end)]
    return out


def _chatml(turns: list[FlatTurn], end: str, generate: bool) -> list[Piece]:
    """ChatML without a default system prompt."""
    out = []
    for role, parts in turns:
        out.append(_template(f"<|im_start|>{role}\n"))
        out += _answer(parts, end) if role == "assistant" else [*_parts(parts), _template(end)]
        out.append(_template("\n"))
    return [*out, _template("<|im_start|>assistant\n")] if generate else out


def _qa(turns: list[FlatTurn], end: str, generate: bool) -> list[Piece]:
    """For models without a chat template: `{images}Question: {q}\\nAnswer: {a}{eos}`.

    System text comes first, on a line of its own; a turn of images alone writes no question.
    """
    out = []
    for role, parts in turns:
        if role == "system":
            out += [*_parts(parts), _template("\n")] if parts else []
        elif role == "user":
            images, rest = _leading_images(parts)
            question = [_template("Question: "), *_parts(rest), _template("\n")] if rest else []
            out += [*_parts(images), *question, _template("Answer:")]
        else:
            out += [_template(" "), *_answer(parts, end)]
    return out


# name -> (function that writes the pieces, text that ends an answer; "" for the tokenizer's EOS)
BUILT_IN: dict[str, tuple[Callable[[list[FlatTurn], str, bool], list[Piece]], str]] = {
    "plain": (_plain, "\n"),
    "vicuna_v1": (_vicuna_v1, ""),
    "chatml": (_chatml, "<|im_end|>"),
    "qa": (_qa, ""),
}
