"""From any Hugging Face chat template (Jinja) to slots: template text, content, image, in order.

Renders a template with a sentinel in place of every content, and reads the result: what is template text, where images
stand, what the template trims, which text ends an answer, what of an answer it writes itself (the marks around a
thought, calls of tools). Real content is never rendered, so no template can swallow, move or reinterpret it; one that
would is refused with the reason. Tools and calls are rendered as they are, since a template writes them as JSON: they
may hold no control token. How a template wants its messages is found in `template_styles`, where its items are in
`template_locate`, and what stands between them in `template_gaps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from mmit.data.chat_render import Extras, Outline, Renderer, Shape, Way, sentinel
from mmit.data.content import piece_tokenizer
from mmit.data.template_gaps import Gaps, Slot
from mmit.data.template_locate import ANSWER, ASK, NO_EXTRAS, TALK, Locator, gaps_of, items_of
from mmit.data.template_styles import find_calls, find_styles, find_thought
from mmit.errors import MmitError

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
        rules = self._locator.strip_rules(shape, items, extras, gaps_of(spans, rendered), prompt=prompt)
        last_answer = max((n for n, turn in enumerate(shape) if turn.role == "assistant"), default=-1)
        slots: list[Slot] = []
        position, before = 0, None
        for number, (item, span) in enumerate(zip(items, spans, strict=True)):
            if span is None:
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
        for text in (extras.tools, *(turn.calls for turn in shape)):
            spelt = [text[a:b] for a, b in self._pieces.control_spans(text)] if text else []
            if spelt:
                problem = f"tools or tool calls hold the control token '{spelt[0].strip()}'"
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
