"""From any Hugging Face chat template (Jinja) to slots: template text, content, image, in order.

Owns the rendering of a template with a sentinel in place of every content, and the reading of the result:
what is template text, where images stand, what the template trims, which text ends an answer, what of an answer it
writes itself (the marks around a thought, calls of tools). Real content is never rendered, so no template can swallow,
move or reinterpret it; one that would is refused with the reason. Tools and calls are rendered as they are, since a
template writes them as JSON: they may hold no control token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, cast

from mmit.data.chat_builtin import Part, Piece
from mmit.data.chat_render import (
    FIELD,
    INLINE,
    PART,
    SENTINEL,
    Extras,
    Failure,
    Outline,
    Refusal,
    Renderer,
    Shape,
    Style,
    TooMuch,
    Way,
    sentinel,
)
from mmit.data.content import piece_tokenizer
from mmit.errors import ConfigError, MmitError, RecordError

NO_EXTRAS = Extras()
ASK, ANSWER = Outline("user", "t"), Outline("assistant", "t")
TALK: Shape = (ASK, ANSWER)
KEPT = 200_000  # slots that may wait in memory for conversations of the same shape


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


class Item(NamedTuple):
    """A part of a turn (from 0): "k" a thought, "t" a text, "i" an image, "c" the first call."""

    turn: int
    kind: str


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
        self._tokenizer, self._pieces = tokenizer, piece_tokenizer(tokenizer)
        self._renderer = Renderer(source, tokenizer, args=self.args, date=date)
        self._slots: dict[Any, tuple[Slot, ...]] = {}
        self._held = 0
        self._stops: dict[str, int | None] = {}
        self._openings: dict[str, str] = {}
        self._thought_known = False
        self._writes_tools: dict[bool, bool] = {}
        self._ready, self._add_ends, self.thinks = False, add_ends, bool(args)
        self.image_token: str | None = None
        self._unclear: tuple[str, str] = ("", "")
        self._find_styles(image_token)
        self.end, self._own_end = self._find_end()
        self._ready = True

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
        key = (shape, extras, generate, self.thinks)
        if key not in self._slots:
            found = self._read(shape, extras, generate)
            self._held += len(found)
            if self._held > KEPT:
                self._slots.clear()
                self._held = len(found)
            self._slots[key] = found
        return self._slots[key]

    @property
    def thought_way(self) -> Way:
        """Where the template reads thoughts that stand in a field of their own."""
        return self._renderer.thought

    def in_list(self, turn: Outline) -> bool:
        """Tell whether the content of a turn is given as a list of parts."""
        return self._renderer.style(turn) == "list"

    def rendered(self, shape: Shape, words: Sequence[str | None], extras: Extras = NO_EXTRAS) -> str:
        """Render with real words, one for each item. Raises RecordError."""
        return self._render_messages(self._renderer.messages(shape, words), extras, shape=shape)

    def _read(self, shape: Shape, extras: Extras, generate: bool) -> tuple[Slot, ...]:
        self._check_extras(shape, extras)
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
        items = _items(shape)
        spans, rendered = self._locate(shape, items, extras, prompt=prompt)
        if prompt and rendered == self._locate(shape, items, extras)[1]:
            return None
        rules = self._strip_rules(shape, items, extras, _gaps(spans, rendered), prompt=prompt)
        last_answer = max((n for n, turn in enumerate(shape) if turn.role == "assistant"), default=-1)
        slots: list[Slot] = []
        position, before = 0, None
        for number, (item, span) in enumerate(zip(items, spans, strict=True)):
            if span is None:
                if item.turn == last_answer and not prompt and shape[-1].role == "assistant":
                    problem = f"the template cuts the thought of turn {item.turn + 1}, so that it cannot be learnt"
                    self._fail(problem, "Use a template that keeps it, or remove the thought from the record.")
                continue
            slots += self._between(rendered[position : span[0]], shape, before, item)
            if item.kind in "kt":
                left, right = rules[number]
                slots.append(Slot("content", "", item.turn, "thought" if item.kind == "k" else "text", left, right))
            elif item.kind == "i":
                slots.append(Slot("image", turn=item.turn))
            position, before = span[1], item
        if prompt:
            slots.append(Slot("template", rendered[position:]))
        else:
            slots += self._between(rendered[position:], shape, before, None)
        return tuple(slot for slot in slots if slot.text or slot.kind != "template")

    # --- what the text between two items is ---------------------------------------------------------------------

    def _between(self, gap: str, shape: Shape, before: Item | None, after: Item | None) -> list[Slot]:
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
        if stop is not None and (last and self._own_end or self._ends(gap, stop)):
            return [Slot("template", gap[:stop], turn, "end")], gap[stop:]
        if last or (self._add_ends and not self._own_end):
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
        if not self._own_end:  # the next role's token, where roles have tokens of their own
            return self.end != self._tokenizer.eos_token and written != self._first_control(self._opening("user"))
        # One token closes the turns of all roles, but the last answer has another (gpt-oss).
        closes = written == self._first_control(self._opening("user")) and len(self._pieces.control_spans(gap)) > 1
        return closes

    def _after_calls(self, gap: str, shape: Shape, turn: int, *, last: bool) -> tuple[list[Slot], str]:
        """Split off the rest of an answer's calls and its end."""
        at = gap.find(self.end.strip()) if self._own_end else -1
        if at >= 0:
            stop = at + len(self.end.strip())
        elif last:
            stop = len(gap.rstrip()) if self._pieces.control_spans(gap) else 0
        else:  # up to where the conversation would end if these calls were its last words
            alone = self._renderer.messages(shape[: turn + 1], [sentinel(n) for n in range(len(_items(shape)))])
            tail = self._render_messages(alone, NO_EXTRAS).rpartition(sentinel(len(_items(shape[: turn + 1])) - 1))[2]
            at = stop = _common(tail, gap)
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
                items = _items(shape)
                spans, rendered = self._locate(shape, items, NO_EXTRAS, prompt=True)
                without = self._locate(shape, items, NO_EXTRAS)[1]
                assert spans[-1] is not None
                found = rendered[spans[-1][1] :] if rendered != without else self._answers_head()
                self._openings[previous] = found
            except MmitError:
                self._openings[previous] = self._opening("user") if previous == "tool" else self._answers_head()
        return self._openings[previous]

    def _answers_head(self) -> str:
        """What stands between a question and its answer, where the template has no generation prompt."""
        spans, rendered = self._locate(TALK, _items(TALK), NO_EXTRAS)
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

    # --- rendering with sentinels -------------------------------------------------------------------------------

    def _locate(
        self,
        shape: Shape,
        items: Sequence[Item],
        extras: Extras,
        *,
        pad: tuple[str, str] = ("", ""),
        prompt: bool = False,
    ) -> tuple[list[tuple[int, int] | None], str]:
        """Render with sentinels, texts padded by `pad`; returns where each item stands, None for a cut thought."""
        in_list = [item.kind == "i" and self._renderer.style(shape[item.turn]) == "list" for item in items]
        if any(in_list) and self.image_token is None:
            problem, remedy = self._unclear
            self._fail(problem or "the template writes nothing for an image in a list of parts", remedy)
        marks = [pad[0] + sentinel(n) + pad[1] if item.kind in "kt" else sentinel(n) for n, item in enumerate(items)]
        rendered = self._render_messages(self._renderer.messages(shape, marks), extras, shape=shape, prompt=prompt)
        found: dict[int, list[tuple[int, int]]] = {}
        for match in SENTINEL.finditer(rendered):
            found.setdefault(int(match[1]), []).append(match.span())
        images = _places(rendered, cast("str", self.image_token)) if any(in_list) else []
        spans: list[tuple[int, int] | None] = []
        position = image = 0
        for number, item in enumerate(items):
            if in_list[number]:
                while image < len(images) and images[image][0] < position:
                    image += 1
                places = images[image : image + 1]
                count = len(images)
            else:
                places = found.get(number, [])
                count = len(places)
                if item.kind == "k" and not places:
                    spans.append(None)
                    continue
                places = places if count == 1 and places[0][0] >= position else []
            if not places:
                self._misplaced(item, shape[item.turn].role, count)
            spans.append(places[0])
            position = places[0][1]
        if len(images) != sum(in_list):
            problem = f"the template writes {self.image_token!r} more often than there are images"
            self._fail(problem, _name_token("the text that stands for exactly one image"))
        return spans, rendered

    def _misplaced(self, item: Item, role: str, count: int) -> NoReturn:
        nouns = {"t": "the text", "i": "an image", "k": "the thought", "c": "the tool calls"}
        what = f"{nouns[item.kind]} of turn {item.turn + 1} ({role})"
        if item.kind == "i" and count:
            problem = f"the template moves {what} to another place"
            self._fail(problem, "Put the images of a turn before its text, or use another template.")
        if count > 1:
            self._fail(f"the template writes {what} {count} times", "Use a template that writes it once.")
        remedy = "Use a template that writes every turn unchanged."
        if role == "system":
            remedy = "Fold the system text into the first user turn, or use another template."
        if item.kind == "c" or role == "tool":
            remedy = "Use a template that knows tools."
        self._fail(f"the template drops or alters {what}", remedy)

    def _strip_rules(
        self,
        shape: Shape,
        items: Sequence[Item],
        extras: Extras,
        plain: Sequence[tuple[str, str] | None],
        *,
        prompt: bool,
    ) -> list[tuple[str | None, str | None]]:
        """Find, for each text, which whitespace the template strips from its left and its right."""
        stripped: list[tuple[set[str], set[str]]] = [(set(), set()) for _ in items]
        for space in " \n\t":
            for side, pad in enumerate(((space, ""), ("", space))):
                padded = _gaps(*self._locate(shape, items, extras, pad=pad, prompt=prompt))
                for number, item in enumerate(items):
                    if item.kind not in "kt" or plain[number] is None or padded[number] is None:
                        continue
                    before, after = plain[number][side], padded[number][side]  # type: ignore[index]
                    if after == before:
                        stripped[number][side].add(space)
                    elif after != (before + space if side == 0 else space + before):
                        self._fail("the template rewrites whitespace inside contents", "Use another template.")
        return [(_chars(left), _chars(right)) for left, right in stripped]

    def _render_messages(
        self, messages: Sequence[Mapping[str, Any]], extras: Extras, *, shape: Shape = (), prompt: bool = False
    ) -> str:
        try:
            return self._renderer.render(messages, extras, prompt=prompt)
        except Refusal as refusal:
            remedy = "Change the record's turns, or use another chat format."
            if shape and shape[0].role == "system" and self._takes(shape[1:]):
                remedy = "The template takes no system turn: fold its text into the first user turn."
            problem = f"the template refuses this conversation: {refusal.problem}"
            raise RecordError(problem, where="" if self._ready else self.where, remedy=remedy) from refusal
        except TooMuch as error:
            raise _Exceeded(error.problem, where=self.where, remedy="Correct the template.") from None
        except Failure as failure:
            self._fail(failure.problem, "Correct the template, or change the record's turns.")

    def _takes(self, shape: Shape) -> bool:
        marks = [sentinel(n) for n in range(len(_items(shape)))]
        try:
            self._renderer.render(self._renderer.messages(shape, marks), NO_EXTRAS)
        except MmitError:
            return False
        return True

    # --- thoughts, tools ----------------------------------------------------------------------------------------

    def _check_extras(self, shape: Shape, extras: Extras) -> None:
        """Find out how the template takes thoughts, calls and tools when they are first met; refuse what it drops."""
        if not self._thought_known and any(turn.thought is not None and turn.inline is None for turn in shape):
            self._find_thought()
        for text in (extras.tools, *(turn.calls for turn in shape)):
            spelt = [text[a:b] for a, b in self._pieces.control_spans(text)] if text else []
            if spelt:
                problem = f"tools or tool calls hold the control token '{spelt[0].strip()}'"
                self._fail(problem, "Write it in another way: it would end or begin a turn.")
        if any(turn.calls for turn in shape):
            self._find_calls(shape, extras)
        if extras.tools:
            has_system = shape[0].role == "system"
            if has_system not in self._writes_tools:
                talk: Shape = (Outline("system", "t"), *TALK) if has_system else TALK
                marks = self._renderer.messages(talk, [sentinel(n) for n in range(len(_items(talk)))])
                bare = self._render_messages(marks, Extras(args=extras.args))
                self._writes_tools[has_system] = bare != self._render_messages(marks, extras)
            if not self._writes_tools[has_system]:
                self._fail("the template does not write the record's tools", "Use a template that knows tools.")

    def _find_thought(self) -> None:
        shape: Shape = (ASK, ANSWER._replace(thought="k"))
        items = _items(shape)
        for way in (FIELD, PART, INLINE):
            self._renderer.thought = cast("Way", way)
            try:
                spans, rendered = self._locate(shape, items, NO_EXTRAS)
            except MmitError:
                continue
            if spans[1] is not None and "'type'" not in rendered and '"type"' not in rendered:
                break
        self._thought_known = True

    def _find_calls(self, shape: Shape, extras: Extras) -> None:
        """Give arguments as objects, or as JSON text to a template that joins them to text."""
        items = _items(shape)
        self._renderer.calls_as_text = False
        marks = self._renderer.messages(shape, [sentinel(n) for n in range(len(items))])
        try:
            self._renderer.render(marks, extras)
        except MmitError:
            self._renderer.calls_as_text = True

    # --- found out once -----------------------------------------------------------------------------------------

    def _find_end(self) -> tuple[str, bool]:
        """The text that ends an answer, and whether the template writes it itself."""
        items = _items(TALK)
        spans, rendered = self._locate(TALK, items, NO_EXTRAS)
        assert spans[1] is not None and spans[0] is not None
        after = rendered[spans[1][1] :]
        stop = self._control_end(after)
        if stop is not None:
            return after[:stop], True
        end = self._role_end() if self._add_ends else ""
        end = end or self._tokenizer.eos_token
        if not end:
            self._fail(
                "nothing ends an answer: neither the template nor the tokenizer has an end token",
                "Set tokenizer.eos_token.",
            )
        return end, False

    def _role_end(self) -> str:
        """The token that begins a user turn after an answer, where each role has a token of its own (GLM); else ""."""
        try:
            spans, rendered = self._locate((*TALK, *TALK), _items((*TALK, *TALK)), NO_EXTRAS)
        except MmitError:
            return ""
        edges = [edge for span in spans if span for edge in span]
        user, assistant = rendered[edges[3] : edges[4]], rendered[edges[1] : edges[2]]
        found = self._first_control(user)
        own = found and user.lstrip().startswith(found) and found != self._first_control(assistant)
        return found if own and self._first_control(assistant) and found != self._tokenizer.bos_token else ""

    def _find_styles(self, image_token: str | None) -> None:
        """Find how the template wants contents: lists with images, else strings, else lists of texts."""
        # Whether the user's list must be able to hold images, the user's style, the others' style.
        candidates: list[tuple[bool, Style, Style]] = [
            (True, "list", "list"),
            (True, "list", "string"),
            (False, "string", "string"),
            (False, "list", "list"),
        ]
        problem: MmitError | None = None
        for wants_images, user, assistant in candidates:
            self._renderer.styles = {"system": assistant, "user": user, "assistant": assistant, "tool": assistant}
            self.image_token, self._unclear = None, ("", "")
            try:
                self._check_style(TALK)
                if wants_images:
                    self.image_token = self._find_image_token(image_token)
            except _Exceeded:
                raise
            except MmitError as error:
                problem = error if user == "string" else problem  # what went wrong in the common style
                continue
            if not wants_images or self.image_token or self._unclear[0]:
                break
        else:
            raise cast("MmitError", problem)
        if image_token is not None and self.image_token is None:
            unwritten = f"the template never writes the image token {image_token!r}"
            self._fail(unwritten, "Leave image_token out: images then stand where the record has them.")
        for role in ("system", "tool"):
            self._find_style(role, assistant)

    def _find_style(self, role: str, assistant: Style) -> None:
        """The style of system or tool turns; a template may refuse them, and the record that has one is told so."""
        turn = Outline(cast("Any", role), "t")
        shape: Shape = (turn, *TALK) if role == "system" else (*TALK, turn, ANSWER)
        for style in (assistant, "string" if assistant == "list" else "list"):
            self._renderer.styles[role] = style
            try:
                self._check_style(shape)
                return
            except _Exceeded:
                raise
            except MmitError:
                continue
        self._renderer.styles[role] = assistant

    def _check_style(self, shape: Shape) -> None:
        """Raise unless every text is written once and no list is printed as Python or JSON."""
        _, rendered = self._locate(shape, _items(shape), NO_EXTRAS)
        if "list" in self._renderer.styles.values() and ("'type'" in rendered or '"type"' in rendered):
            self._fail("the template prints a list of parts as code", "Use a template for lists of parts.")

    def _find_image_token(self, wanted: str | None) -> str | None:
        """Return the text the template writes for an image part, None if it writes nothing.

        Where several tokens come for an image, it is the one between a first and a last, or the only padding token; a
        template of which that cannot be told is of use for records without images.
        """

        # Image parts carry no sentinel, so the texts are numbered as if they were the only items.
        texts = [sentinel(0), sentinel(1)]
        without = self._render_messages(self._renderer.messages(TALK, texts), NO_EXTRAS)
        shape: Shape = (Outline("user", "it"), ANSWER)
        with_image = self._render_messages(self._renderer.messages(shape, [None, *texts]), NO_EXTRAS)
        written = _inserted(without, with_image)
        if not written.strip():
            return None
        known = getattr(self._tokenizer, "image_token", None)
        for token in (wanted, known if isinstance(known, str) else None):
            if token and with_image.count(token) == 1 and token not in without:
                return token
        tokens = [t.strip() for t in self._tokens(written) or written.split()]
        if wanted is None:
            single = tokens if len(tokens) == 1 else [t for t in tokens if "pad" in t.lower()]
            if len(tokens) == 3 and len(single) != 1 and len(set(tokens)) == 3:
                single = tokens[1:2]
            if len(single) == 1 and written.count(single[0]) == 1:
                return single[0]
        problem = f"cannot tell which part of {written!r} stands for the image"
        self._unclear = problem, _name_token(f"one of: {', '.join(tokens)}")
        return None

    def _tokens(self, text: str) -> list[str]:
        return [text[a:b] for a, b in self._pieces.control_spans(text)]

    def _fail(self, problem: str, remedy: str) -> NoReturn:
        if self._ready:  # a template that writes the simplest conversation: the record is at fault
            raise RecordError(f"{self.where}: {problem}", remedy=remedy)
        raise ConfigError(problem, where=self.where, remedy=remedy)


class _Exceeded(ConfigError):
    """The template takes more time or memory than it may; no other style will do better."""


def _items(shape: Shape) -> list[Item]:
    """List the items of all turns in the order in which they are written."""
    out = []
    for number, turn in enumerate(shape):
        kinds = ("k" if turn.thought == "k" else "") + turn.kinds + ("c" if turn.calls else "")
        out += [Item(number, kind) for kind in kinds]
    return out


def _name_token(what: str) -> str:
    return f"Name {what}: model.chat.image_token in a config, --image-token of a command, image_token= in Python."


def _places(text: str, mark: str) -> list[tuple[int, int]]:
    out, at = [], text.find(mark)
    while at >= 0:
        out.append((at, at + len(mark)))
        at = text.find(mark, at + len(mark))
    return out


def _gaps(spans: Sequence[tuple[int, int] | None], rendered: str) -> list[tuple[str, str] | None]:
    """The text before and after each item, up to its neighbours."""
    there = [span for span in spans if span is not None]
    ends = [0, *(span[1] for span in there)]
    starts = [*(span[0] for span in there), len(rendered)]
    texts = [rendered[a:b] for a, b in zip(ends, starts, strict=True)]
    pairs = iter(zip(texts, texts[1:], strict=False))
    return [None if span is None else next(pairs) for span in spans]


def _chars(stripped: set[str]) -> str | None:
    return None if len(stripped) == 3 else "".join(sorted(stripped))


def _common(a: str, b: str) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _inserted(shorter: str, longer: str) -> str:
    """Return what `longer` has more than `shorter`, between their common beginning and end."""
    start = _common(shorter, longer)
    end = 0
    while end < len(shorter) - start and shorter[-1 - end] == longer[len(longer) - 1 - end]:
        end += 1
    return longer[start : len(longer) - end]
