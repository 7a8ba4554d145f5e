"""The chat formats that need no Jinja template, each a function from turns to pieces.

Owns Piece, the table BUILT_IN, and the import of a user's own function (`module:name`), which is tried on three
conversations first. Takes turns already checked and flattened by mmit/data/chat.py; gives pieces. Knows no tokenizer:
the text that ends an answer is an argument. A thought stands between <think> and </think> in front of its answer;
tools are refused, since these formats have no place for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, NamedTuple, NoReturn

from mmit.errors import ConfigError, RecordError
from mmit.plugins import calling, own_function

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Origin = Literal["template", "content", "image"]
Role = Literal["system", "user", "assistant", "tool"]
# What of a turn a piece is. "added" is an end that mmit writes where a template has none.
Part = Literal["", "text", "thought", "calls", "end", "added"]
# (end, weight) pairs: characters up to `end` have this weight, None for that of the turn.
Spans = tuple[tuple[int, float | None], ...]
# (start, end) of the control tokens that the record itself names in a text, in order.
Marks = tuple[tuple[int, int], ...]
OPEN, CLOSE = "<think>\n", "\n</think>\n\n"


class Words(NamedTuple):
    """Text of a turn; `spans` say where its loss weight changes, () if it does not, `marks` where tokens stand."""

    text: str
    spans: Spans = ()
    marks: Marks = ()

    def stripped(self, left: str | None, right: str | None) -> Words:
        """Strip both ends, as str.lstrip and str.rstrip with these arguments."""
        if not self.spans and not self.marks:
            return Words(self.text.lstrip(left).rstrip(right))
        kept = self.text.lstrip(left)
        cut = len(self.text) - len(kept)
        kept = kept.rstrip(right)
        spans = tuple((min(end - cut, len(kept)), weight) for end, weight in self.spans if end > cut)
        return Words(kept, spans, self.marks_from(cut))

    def marks_from(self, cut: int) -> Marks:
        """The marks of this text without its first `cut` characters, among which is none."""
        return tuple((start - cut, end - cut) for start, end in self.marks)


class Said(NamedTuple):
    """A turn as the formats see it: neighbouring texts are joined, None among the parts is an image.

    `inline` is the text around a thought that was written in the text of the turn, None for a thought of its own.
    """

    role: Role
    parts: tuple[Words | None, ...]
    number: int  # of the turn, from 0
    thought: str | None = None
    inline: tuple[str, str] | None = None
    calls: tuple[Any, ...] = ()
    more: tuple[tuple[str, str], ...] = ()  # name and tool_call_id of a tool turn


class Piece(NamedTuple):
    """A stretch of a conversation: the format's own text, a person's text, or the place of an image.

    `turn` is the turn that it is a part of, from 0, and -1 for text of the format between turns.
    """

    kind: Origin
    text: str = ""
    turn: int = -1
    part: Part = ""
    spans: Spans = ()
    marks: Marks = ()


def _template(text: str) -> Piece:
    return Piece("template", text)


def _parts(said: Said, parts: Sequence[Words | None] | None = None) -> list[Piece]:
    return [
        Piece("image") if part is None else Piece("content", part.text, said.number, "text", part.spans, part.marks)
        for part in (said.parts if parts is None else parts)
    ]


def _answer(said: Said, end: str) -> list[Piece]:
    out = []
    if said.thought is not None:
        opening, closing = said.inline or (OPEN, CLOSE)
        kinds: list[tuple[Origin, str]] = [("template", opening), ("content", said.thought), ("template", closing)]
        out = [Piece(kind, text, said.number, "thought") for kind, text in kinds]
    return [*out, *_parts(said), Piece("template", end, said.number, "end")]


def _leading_images(said: Said) -> tuple[list[Piece], list[Piece]]:
    count = next((i for i, part in enumerate(said.parts) if part is not None), len(said.parts))
    return _parts(said, said.parts[:count]), _parts(said, said.parts[count:])


def _plain(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    """LLaVA's pre-training format: image, caption, newline."""
    if [said.role for said in turns] != ["user", "assistant"][: 2 - generate]:
        _refuse_plain("has exactly one user turn and one answer, and no system turn", "Split the record.")
    if any(part is not None for part in turns[0].parts):
        _refuse_plain("writes no prompt, but the user turn has text", "Remove the text from the record.")
    return _parts(turns[0]) + ([] if generate else _answer(turns[1], end))


def _refuse_plain(rule: str, remedy: str) -> NoReturn:
    raise RecordError(f"the chat format 'plain' {rule}", remedy=f"{remedy} Or use another chat format.")


def _vicuna_v1(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    """Vicuna 1.1 as in LLaVA-1.5: `{system} USER: {q} ASSISTANT: {a}</s>USER: ...`.

    Images that open a user turn are followed by one newline, as LLaVA writes them.
    """
    out = []
    if turns[0].role != "system":
        out.append(_template(VICUNA_SYSTEM + " "))
    for said in turns:
        if said.role == "system":
            out += [*_parts(said), _template(" ")] if said.parts else []
        elif said.role == "user":
            images, rest = _leading_images(said)
            # Not doubled where the text brings its own newline, as rows do whose marker stood on a line of its own.
            newline = [_template("\n")] if images and rest and not rest[0].text.startswith("\n") else []
            out += [_template("USER: "), *images, *newline, *rest, _template(" ASSISTANT:")]
        else:
            out += [_template(" "), *_answer(said, end)]
    return out


def _chatml(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    """ChatML without a default system prompt."""
    out = []
    for said in turns:
        out.append(_template(f"<|im_start|>{said.role}\n"))
        out += _answer(said, end) if said.role == "assistant" else [*_parts(said), _template(end)]
        out.append(_template("\n"))
    return [*out, _template("<|im_start|>assistant\n")] if generate else out


def _qa(turns: list[Said], end: str, generate: bool) -> list[Piece]:
    """For models without a chat template: `{images}Question: {q}\\nAnswer: {a}{eos}`.

    System text comes first, on a line of its own; a turn of images alone writes no question.
    """
    out = []
    for said in turns:
        if said.role == "system":
            out += [*_parts(said), _template("\n")] if said.parts else []
        elif said.role == "user":
            images, rest = _leading_images(said)
            question = [_template("Question: "), *rest, _template("\n")] if rest else []
            out += [*images, *question, _template("Answer:")]
        else:
            out += [_template(" "), *_answer(said, end)]
    return out


# name -> (function that writes the pieces, text that ends an answer; "" for the tokenizer's EOS)
BUILT_IN: dict[str, tuple[Callable[[list[Said], str, bool], list[Piece]], str]] = {
    "plain": (_plain, "\n"),
    "vicuna_v1": (_vicuna_v1, ""),
    "chatml": (_chatml, "<|im_end|>"),
    "qa": (_qa, ""),
}


def merged(pieces: list[Piece], answers: Set[int]) -> list[Piece]:
    """Drop empty pieces and join neighbouring template pieces of one part of a turn."""
    out: list[Piece] = []
    last: Piece | None = None
    for piece in pieces:
        if not piece.text and piece.kind != "image":
            if piece.kind == "content" and piece.turn in answers:
                raise RecordError("the chat template strips the answer to nothing", remedy="Give it some text.")
            continue
        same = last is not None and last.kind == "template" and (last.turn, last.part) == (piece.turn, piece.part)
        if last is not None and same and piece.kind == "template":
            out[-1] = last = piece._replace(text=last.text + piece.text)
        else:
            out.append(piece)
            last = piece
    return out


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
    # Real words, unlike the sentinels that templates get: a function in code sees the text, and may well depend on it.
    question = Said("user", (None, Words("first question")), 0)
    answer = Said("assistant", (Words("first answer"),), 1)
    more = (Said("user", (Words("second question"),), 2), Said("assistant", (Words("second answer"),), 3))
    # One turn and two, with an image: a function that only knows a first turn, or loses a part, shows in these.
    for turns in ([question, answer], [question, answer, *more]):
        _try(spec, write, turns, end=end or "</s>", where=where)
    return write, end


def _try(spec: str, write: Any, turns: list[Said], *, end: str, where: str) -> None:
    whole, prompt = _pieces(spec, write, turns, end, False, where), _pieces(spec, write, turns[:-1], end, True, where)
    said = [(turn.number, None if part is None else part.text) for turn in turns for part in turn.parts]
    found = [(p.turn, None if p.kind == "image" else p.text) for p in whole if p.kind != "template"]
    # Texts must agree word for word and in order. Images only in number: a format may move those of a turn to its
    # front.
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
    # A prompt that training never began with is one that the model has not learned to answer. A space at its end may
    # belong to the answer's first token.
    if not _text(whole).startswith(_text(prompt).rstrip(" ")):
        problem = f"{spec} writes a prompt, {_text(prompt)!r}, that its own conversations do not begin with"
        remedy = f"with generate=True give what stands before the answer; the conversation is {_text(whole)!r}"
        raise ConfigError(problem, where=where, remedy=remedy)


def _pieces(spec: str, write: Any, turns: list[Said], end: str, generate: bool, where: str) -> list[Piece]:
    with calling(spec, where=where, remedy="it is called with (turns, end, generate)", kind=ConfigError):
        pieces = write(list(turns), end, generate)
    if not isinstance(pieces, list) or not all(isinstance(piece, Piece) for piece in pieces):
        raise ConfigError(f"{spec} returned no list of pieces", where=where, remedy=f"return {GIVES}")
    return pieces


def _text(pieces: list[Piece]) -> str:
    return "".join("<image>" if piece.kind == "image" else piece.text for piece in pieces)
