"""Chat formats of a user's own: `module:name` of a function that writes the pieces, like those in `chat_builtin`.

In: a spec. Out: the function and the text that ends an answer. Tries the function on three conversations, and refuses
one that loses a text, whose prompt is not how its own conversations begin, or that does not end an answer.
"""

from __future__ import annotations

from typing import Any

from mmit.data.chat_builtin import Piece, Said, Words
from mmit.errors import ConfigError, MmitError
from mmit.plugins import own_function

GIVES = "list[mmit.data.chat_builtin.Piece]"


def own_writer(spec: str) -> tuple[Any, str]:
    """Import a function (turns, end, generate) -> pieces; its attribute `end` is "" for the tokenizer's EOS.

    Raises ConfigError: it cannot be imported or called so, or its pieces are wrong.
    """
    where = "model.chat.format"
    write = own_function(spec, positional=("turns", "end", "generate"), gives=GIVES, where=where)
    end = getattr(write, "end", "")
    if not isinstance(end, str):
        problem = f"{spec}.end is a {type(end).__name__}"
        raise ConfigError(problem, where=where, remedy="give the text that ends an answer, or leave it out for the EOS")
    question = Said("user", (None, Words("first question")), 0)
    answer = Said("assistant", (Words("first answer"),), 1)
    more = (Said("user", (Words("second question"),), 2), Said("assistant", (Words("second answer"),), 3))
    for turns in ([question, answer], [question, answer, *more]):
        _try(spec, write, turns, end=end or "</s>", where=where)
    return write, end


def _try(spec: str, write: Any, turns: list[Said], *, end: str, where: str) -> None:
    whole, prompt = _pieces(spec, write, turns, end, False, where), _pieces(spec, write, turns[:-1], end, True, where)
    said = [(turn.number, None if part is None else part.text) for turn in turns for part in turn.parts]
    found = [(p.turn, None if p.kind == "image" else p.text) for p in whole if p.kind != "template"]
    texts = [(turn, text) for turn, text in said if text is not None]
    if [one for one in found if one[1] is not None] != texts or len(found) != len(said):
        content = 'Piece("content", part.text, turn.number, "text", part.spans, part.marks)'
        remedy = f'write each part once and in order: Piece("image") for None, or {content}'
        raise ConfigError(f"{spec} does not write every part of every turn", where=where, remedy=remedy)
    answers = [turn.number for turn in turns if turn.role == "assistant"]
    ended = [p.turn for p in whole if p.kind == "template" and p.part == "end" and p.text == end]
    if ended != answers:
        remedy = 'write Piece("template", end, turn.number, "end") after each answer'
        raise ConfigError(f"{spec} does not end every answer with `end`", where=where, remedy=remedy)
    if not _text(whole).startswith(_text(prompt).rstrip(" ")):
        problem = f"{spec} writes a prompt, {_text(prompt)!r}, that its own conversations do not begin with"
        remedy = f"with generate=True give what stands before the answer; the conversation is {_text(whole)!r}"
        raise ConfigError(problem, where=where, remedy=remedy)


def _pieces(spec: str, write: Any, turns: list[Said], end: str, generate: bool, where: str) -> list[Piece]:
    try:
        pieces = write(list(turns), end, generate)
    except MmitError:
        raise
    except Exception as error:
        problem = f"{spec} raised {type(error).__name__}: {error}"
        raise ConfigError(problem, where=where, remedy="it is called with (turns, end, generate)") from error
    if not isinstance(pieces, list) or not all(isinstance(piece, Piece) for piece in pieces):
        raise ConfigError(f"{spec} returned no list of pieces", where=where, remedy=f"return {GIVES}")
    return pieces


def _text(pieces: list[Piece]) -> str:
    return "".join("<image>" if piece.kind == "image" else piece.text for piece in pieces)
