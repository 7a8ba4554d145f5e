"""What the text of a chat template between two contents is: an answer's own, its end, or the template's.

Owns Slot and the end of an answer: found in the template, else the token of the next role, else the tokenizer's EOS.
In: the text between two items of a rendered conversation. Out: template slots, those of an answer with its turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmit.data.chat_builtin import Part, Piece
from mmit.data.chat_render import Outline, Shape, sentinel
from mmit.data.template_locate import ASK, NO_EXTRAS, TALK, Item, Locator, common, items_of
from mmit.errors import MmitError

if TYPE_CHECKING:
    from mmit.data.content import PieceTokenizer


@dataclass(frozen=True, slots=True)
class Slot:
    """One stretch of a rendered conversation.

    `text` is the template's own; content has none yet. `turn` is the turn it is a part of, -1 for text between turns.
    `left` and `right` are what the template strips from the two ends of the content, as the argument of str.strip: ""
    nothing, None all whitespace.
    """

    kind: Literal["template", "content", "image"]
    text: str = ""
    turn: int = -1
    part: Part = ""
    left: str | None = ""
    right: str | None = ""
    piece: Piece = field(init=False, compare=False, repr=False)  # of content without its text

    def __post_init__(self) -> None:
        object.__setattr__(self, "piece", Piece(self.kind, self.text, self.turn, self.part))


class Gaps:
    """Splits the text between contents.

    Attributes:
        end: the text that ends an answer. own_end: the template writes it itself.
    """

    def __init__(self, locator: Locator, tokenizer: Any, pieces: PieceTokenizer, *, add_ends: bool) -> None:
        self._locator, self._tokenizer, self._pieces, self._add_ends = locator, tokenizer, pieces, add_ends
        self._stops: dict[str, int | None] = {}
        self._openings: dict[str, str] = {}
        self.end, self.own_end = self._find_end()

    def between(self, gap: str, shape: Shape, before: Item | None, after: Item | None) -> list[Slot]:
        """Split the text between two items into what belongs to an answer and the rest."""
        if before is not None and after is not None and before.turn == after.turn:
            part: Part = "thought" if before.kind == "k" else "calls" if after.kind == "c" else "text"
            own = shape[before.turn].role == "assistant"
            return [Slot("template", gap, before.turn, part) if own else Slot("template", gap)]
        out: list[Slot] = []
        if before is not None and shape[before.turn].role == "assistant":
            if before.kind == "c":
                out, gap = self._after_calls(gap, shape, before.turn, last=after is None)
            else:
                out, gap = self._after_answer(gap, before.turn, last=after is None)
        if after is not None and shape[after.turn].role == "assistant":
            turn = shape[after.turn]
            if turn.thought is not None or after.kind == "c":
                previous = shape[after.turn - 1].role if after.turn else ""
                cut = self._head_end(gap, previous)
                part = "calls" if after.kind == "c" else "thought"
                return [*out, Slot("template", gap[:cut]), Slot("template", gap[cut:], after.turn, part)]
        return [*out, Slot("template", gap)]

    def _after_answer(self, gap: str, turn: int, *, last: bool) -> tuple[list[Slot], str]:
        """Split off what ends an answer; returns it and the rest."""
        stop = self._control_end(gap)
        if stop is not None and (last and self.own_end or self._ends(gap, stop)):
            return [Slot("template", gap[:stop], turn, "end")], gap[stop:]
        if last or (self._add_ends and not self.own_end):
            # Without an end the model would never learn to stop.
            return [Slot("template", self.end, turn, "added")], gap
        return [], gap

    def _ends(self, gap: str, stop: int) -> bool:
        """Tell whether the first control token after an answer in the middle ends it."""
        written = gap[:stop].strip()
        if written == self.end.strip():
            return True
        begins = [stop for _, stop in self._pieces.control_spans(written)][:1] == [len(written)]
        if not begins or written == self._tokenizer.bos_token:
            return False
        if not self.own_end:  # the next role's token, where roles have tokens of their own
            return self.end != self._tokenizer.eos_token and written != self._first_control(self._opening("user"))
        # One token closes the turns of all roles, but the last answer has another (gpt-oss).
        closes = written == self._first_control(self._opening("user")) and len(self._pieces.control_spans(gap)) > 1
        return closes

    def _after_calls(self, gap: str, shape: Shape, turn: int, *, last: bool) -> tuple[list[Slot], str]:
        """Split off the rest of an answer's calls and its end."""
        at = gap.find(self.end.strip()) if self.own_end else -1
        if at >= 0:
            stop = at + len(self.end.strip())
        elif last:
            stop = len(gap.rstrip()) if self._pieces.control_spans(gap) else 0
        else:  # up to where the conversation would end if these calls were its last words
            alone = self._locator.renderer.messages(
                shape[: turn + 1], [sentinel(n) for n in range(len(items_of(shape)))]
            )
            tail = self._locator.render(alone, NO_EXTRAS).rpartition(sentinel(len(items_of(shape[: turn + 1])) - 1))[2]
            at = stop = common(tail, gap)
        if stop == 0:
            return [Slot("template", gap, turn, "calls"), Slot("template", self.end, turn, "added")], ""
        at = stop if at < 0 else at
        return [Slot("template", gap[:at], turn, "calls"), Slot("template", gap[at:stop], turn, "end")], gap[stop:]

    def _head_end(self, gap: str, previous: str) -> int:
        """Where in the text before an answer the answer begins: after what a generation prompt writes."""
        opening = self._opening("tool" if previous == "tool" else "user")
        if gap.startswith(opening):
            return len(opening)
        if not opening or opening.startswith(gap):
            return len(gap)
        for length in range(len(opening) - 1, 2, -1):
            at = gap.rfind(opening[-length:])
            if at >= 0:
                return at + length
        return len(gap)

    def _opening(self, previous: str) -> str:
        """What a generation prompt writes after the content of a user's or a tool's turn; "" if that is not known."""
        if previous not in self._openings:
            call = Outline("assistant", "", calls='[{"type": "function", "function": {"name": "f", "arguments": {}}}]')
            shape: Shape = (ASK,) if previous != "tool" else (ASK, call, Outline("tool", "t"))
            try:
                items = items_of(shape)
                spans, rendered = self._locator.locate(shape, items, NO_EXTRAS, prompt=True)
                without = self._locator.locate(shape, items, NO_EXTRAS)[1]
                assert spans[-1] is not None
                found = rendered[spans[-1][1] :] if rendered != without else self._answers_head()
                self._openings[previous] = found
            except MmitError:
                self._openings[previous] = self._opening("user") if previous == "tool" else self._answers_head()
        return self._openings[previous]

    def _answers_head(self) -> str:
        """What stands between a question and its answer, where the template has no generation prompt."""
        spans, rendered = self._locator.locate(TALK, items_of(TALK), NO_EXTRAS)
        assert spans[0] is not None and spans[1] is not None
        return rendered[spans[0][1] : spans[1][0]].partition("<think>")[0]

    def _first_control(self, text: str) -> str:
        return next((text[a:b].strip() for a, b in self._pieces.control_spans(text)), "")

    def _control_end(self, text: str) -> int | None:
        if text not in self._stops:
            if len(self._stops) > 10_000:
                self._stops.clear()
            end = next((end for _, end in self._pieces.control_spans(text)), None)
            # Some tokens swallow the white space on their right, which is no part of their name.
            self._stops[text] = end and len(text[:end].rstrip())
        return self._stops[text]

    def _find_end(self) -> tuple[str, bool]:
        """The text that ends an answer, and whether the template writes it itself."""
        items = items_of(TALK)
        spans, rendered = self._locator.locate(TALK, items, NO_EXTRAS)
        assert spans[1] is not None and spans[0] is not None
        after = rendered[spans[1][1] :]
        stop = self._control_end(after)
        if stop is not None:
            return after[:stop], True
        end = self._role_end() if self._add_ends else ""
        end = end or self._tokenizer.eos_token
        if not end:
            self._locator.fail(
                "nothing ends an answer: neither the template nor the tokenizer has an end token",
                "Set tokenizer.eos_token.",
            )
        return end, False

    def _role_end(self) -> str:
        """The token that begins a user turn after an answer, where each role has a token of its own (GLM); else ""."""
        try:
            spans, rendered = self._locator.locate((*TALK, *TALK), items_of((*TALK, *TALK)), NO_EXTRAS)
        except MmitError:
            return ""
        edges = [edge for span in spans if span for edge in span]
        user, assistant = rendered[edges[3] : edges[4]], rendered[edges[1] : edges[2]]
        found = self._first_control(user)
        own = found and user.lstrip().startswith(found) and found != self._first_control(assistant)
        return found if own and self._first_control(assistant) and found != self._tokenizer.bos_token else ""
