"""From any Hugging Face chat template (Jinja) to slots: template text, content, image, in order.

Renders a template with a sentinel in place of every content, and reads the result: what is template text, where images
stand, what the template trims, which text ends an answer, what of an answer it writes itself (the marks around a
thought, calls of tools). Real content is never rendered, so no template can swallow, move or reinterpret it; one that
would is refused with the reason. Tools and calls are rendered as they are, since a template writes them as JSON: they
may hold no control token. How a template wants its messages and where its items are is found in `template_locate`; what
stands between them is told apart here, by Gaps: an answer's own text, its end, or the template's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from mmit.data.chat_builtin import Part, Piece
from mmit.data.chat_render import Extras, Outline, Renderer, Shape, sentinel
from mmit.data.content import piece_tokenizer
from mmit.data.template_locate import (
    ANSWER,
    ASK,
    NO_EXTRAS,
    TALK,
    Item,
    Locator,
    common,
    find_calls,
    find_styles,
    find_thought,
    gaps_of,
    items_of,
)
from mmit.errors import MmitError

if TYPE_CHECKING:
    from mmit.data.content import PieceTokenizer


KEPT = 200_000  # slots that may wait in memory for conversations of the same shape


class ChatTemplate:
    """A chat template bound to a tokenizer.

    Attributes:
        source: the Jinja text. args: its arguments. date: the day that strftime_now gives, ISO; None if it is not used.
        end: the template's text that ends an answer, up to and including the first control token. Where the template
            writes none after the last answer: the token of the next role if the roles have tokens of their own, else
            the tokenizer's EOS, which then ends every answer.
        image_token: the text the template writes for an image part, replaced by the image; None if the
            template knows no image parts, so that images stand in the content where the record has them.
        thinks: prompts for generation end as the template's own generation prompt does, before a thought.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        *,
        where: str,
        image_token: str | None = None,
        args: Mapping[str, Any] | None = None,
        date: str | None = None,
        add_ends: bool = True,
    ) -> None:
        self.source, self.where, self.args, self.date = source, where, dict(args or {}), date
        self._pieces = piece_tokenizer(tokenizer)
        self._renderer = Renderer(source, tokenizer, args=self.args, date=date)
        self._locator = Locator(self._renderer, where=where)
        self._slots: dict[Any, tuple[Slot, ...]] = {}
        self._held = 0
        self._thought_known = False
        self._writes_tools: dict[bool, bool] = {}
        self.thinks = bool(args)
        find_styles(self._locator, tokenizer, image_token)
        self.image_token = self._locator.image_token
        self._gaps = Gaps(self._locator, tokenizer, self._pieces, add_ends=add_ends)
        self.end = self._gaps.end
        self._locator.ready = True

    @property
    def renders(self) -> int:
        """How often the template was rendered so far."""
        return self._renderer.renders

    def slots(self, shape: Shape, extras: Extras = NO_EXTRAS, *, generate: bool) -> tuple[Slot, ...]:
        """Return the slots of a conversation of this shape, content slots in the order of its items.

        With `generate` they end before the answer to come. That cut is made in the rendering of a whole
        conversation, so the prompt is by construction how training begins, which `add_generation_prompt` does
        not promise; with `thinks` the prompt is the template's own. Raises RecordError if the template refuses these
        turns or cannot write them.
        """
        # A rendering takes a process and milliseconds. Most conversations of a data set have one of a few shapes.
        key = (shape, extras, generate, self.thinks)
        if key not in self._slots:
            found = self._read(shape, extras, generate)
            self._held += len(found)
            # By slots and not by shapes: one conversation of a thousand turns is worth a thousand short ones.
            if self._held > KEPT:
                self._slots.clear()
                self._held = len(found)
            self._slots[key] = found
        return self._slots[key]

    @cached_property
    def thought_marks(self) -> tuple[str, str] | None:
        """What the template writes around a thought; None for <think>, and where it has no marks of its own."""
        shape: Shape = (ASK, ANSWER._replace(thought="k"))
        try:
            slots = self.slots(shape, generate=False)
        except MmitError:
            return None
        at = next((n for n, slot in enumerate(slots) if (slot.kind, slot.part) == ("content", "thought")), 0)
        around = slots[at - 1 : at + 2] if at else ()
        if len(around) < 3 or any(slot.part != "thought" for slot in around):
            return None
        opening, closing = around[0].text.strip(), around[2].text.strip()
        return (opening, closing) if opening and closing and "<think>" not in opening else None

    def in_list(self, turn: Outline) -> bool:
        """Tell whether the content of a turn is given as a list of parts."""
        return self._renderer.style(turn) == "list"

    def rendered(self, shape: Shape, words: Sequence[str | None], extras: Extras = NO_EXTRAS) -> str:
        """Render with real words, one for each item. Raises RecordError."""
        return self._locator.render(self._renderer.messages(shape, words), extras, shape=shape)

    def _read(self, shape: Shape, extras: Extras, generate: bool) -> tuple[Slot, ...]:
        self._check_extras(shape, extras)
        # A prompt is cut out of the rendering with an answer: training then begins exactly so.
        slots = self._slots_of((*shape, ANSWER) if generate else shape, extras)
        assert slots is not None
        if not generate:
            return slots
        slots = slots[: max(n for n, slot in enumerate(slots) if slot.kind == "content")]
        own = self._slots_of(shape, extras, prompt=True) if self.thinks or extras.args else None
        # Whitespace alone is as training has it.
        same = own is None or own[-1].text.strip() == slots[-1].text.strip()
        return slots if same else cast("Any", own)

    def _slots_of(self, shape: Shape, extras: Extras, *, prompt: bool = False) -> tuple[Slot, ...] | None:
        """Slots of a rendering; None if there should be a generation prompt and the template writes none."""
        items = items_of(shape)
        spans, rendered = self._locator.locate(shape, items, extras, prompt=prompt)
        if prompt and rendered == self._locator.locate(shape, items, extras)[1]:
            return None
        # Which whitespace a template strips from a content is asked of the template, with padded sentinels, and applied
        # to the words later.
        rules = self._locator.strip_rules(shape, items, extras, gaps_of(spans, rendered), prompt=prompt)
        last_answer = max((n for n, turn in enumerate(shape) if turn.role == "assistant"), default=-1)
        slots: list[Slot] = []
        position, before = 0, None
        for number, (item, span) in enumerate(zip(items, spans, strict=True)):
            if span is None:
                # Templates cut thoughts of earlier answers on purpose, and training follows them; of the last answer, a
                # cut thought is lost.
                if item.turn == last_answer and not prompt and shape[-1].role == "assistant":
                    problem = f"the template cuts the thought of turn {item.turn + 1}, so that it cannot be learnt"
                    self._locator.fail(problem, "Use a template that keeps it, or remove the thought from the record.")
                continue
            slots += self._gaps.between(rendered[position : span[0]], shape, before, item)
            if item.kind in "kt":
                left, right = rules[number]
                slots.append(Slot("content", "", item.turn, "thought" if item.kind == "k" else "text", left, right))
            elif item.kind == "i":
                slots.append(Slot("image", turn=item.turn))
            position, before = span[1], item
        if prompt:
            slots.append(Slot("template", rendered[position:]))
        else:
            slots += self._gaps.between(rendered[position:], shape, before, None)
        return tuple(slot for slot in slots if slot.text or slot.kind != "template")

    def _check_extras(self, shape: Shape, extras: Extras) -> None:
        """Find out how the template takes thoughts, calls and tools when they are first met; refuse what it drops."""
        if not self._thought_known and any(turn.thought is not None and turn.inline is None for turn in shape):
            find_thought(self._locator)
            self._thought_known = True
        self._check_args(extras.args)
        for text in (extras.tools, extras.args, *(turn.calls for turn in shape)):
            # Rendered as they are, unlike contents: so here a control token would be one.
            spelt = [text[a:b] for a, b in self._pieces.control_spans(text)] if text else []
            if spelt:
                problem = f"tools, tool calls or template arguments hold the control token '{spelt[0].strip()}'"
                self._locator.fail(problem, "Write it in another way: it would end or begin a turn.")
        if any(turn.calls for turn in shape):
            find_calls(self._locator, shape, extras)
        if extras.tools:
            has_system = shape[0].role == "system"
            if has_system not in self._writes_tools:
                talk: Shape = (Outline("system", "t"), *TALK) if has_system else TALK
                marks = self._renderer.messages(talk, [sentinel(n) for n in range(len(items_of(talk)))])
                bare = self._locator.render(marks, Extras(args=extras.args))
                self._writes_tools[has_system] = bare != self._locator.render(marks, extras)
            if not self._writes_tools[has_system]:
                self._locator.fail("the template does not write the record's tools", "Use a template that knows tools.")

    def _check_args(self, args: str) -> None:
        """Refuse a record's text or tools in an argument that the template never names; flags may be ignored."""
        for name, value in json.loads(args or "{}").items():
            # SmolTalk2 keeps tools and instructions there: unread, its answers would call what no prompt has shown.
            told = " " in value.strip() if isinstance(value, str) else isinstance(value, (list, dict)) and bool(value)
            if told and not re.search(rf"\b{re.escape(name)}\b", self.source):
                remedy = "Use a template that does, or put it into the row's tools or a system turn."
                self._locator.fail(f"the template does not read the record's template argument '{name}'", remedy)


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
        """Split the text between two items into what belongs to an answer and the rest.

        Args:
            gap: the text. shape: the conversation.
            before, after: the items around it; None at its beginning and end.

        Returns:
            slots whose texts make the gap, in order.
        """
        if before is not None and after is not None and before.turn == after.turn:
            # Between two parts of one turn: what stands there is written by the template around the answer's own, and
            # learnt with it.
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
            # Where the calls end cannot be seen in the text alone; the same calls as the last words of a conversation
            # show it.
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
        # The opening with less and less of its beginning, for templates that write only the end of it here.
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
            # Gaps hold tools and calls, all of them different, so this would grow with the data.
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
