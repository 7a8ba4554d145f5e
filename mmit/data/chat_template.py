"""From any Hugging Face chat template (Jinja) to slots: template text, content, image, in order.

Owns the rendering of a template with a sentinel in place of every content, and the reading of the result:
what is template text, where images stand, what the template trims, which text ends an answer. Real content is
never rendered, so no template can swallow, move or reinterpret it; one that would is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from mmit.data.content import piece_tokenizer
from mmit.data.template_process import Exceeded, Failed, Refused, render
from mmit.errors import ConfigError, MmitError, RecordError

Role = Literal["system", "user", "assistant"]
# The outline of a conversation: for each turn its role and its parts, "t" a text and "i" an image.
Shape = tuple[tuple[Role, str], ...]
# How a template wants `message["content"]`: one string, or a list of {"type": "text" | "image"} parts.
Style = Literal["string", "list"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One stretch of a rendered conversation.

    `text` is the template's own; content has none yet. `left` and `right` are what the template strips from
    the two ends of the content, as the argument of str.strip: "" nothing, None all whitespace.
    """

    kind: Literal["template", "content", "image"]
    text: str = ""
    supervised: bool = False
    left: str | None = ""
    right: str | None = ""


class ChatTemplate:
    """A chat template bound to a tokenizer.

    Attributes:
        source: the Jinja text.
        end: the template's text that ends an answer, up to and including the first control token; the
            tokenizer's EOS if the template writes none after the last answer.
        image_token: the text the template writes for an image part, replaced by the image; None if the
            template knows no image parts, so that images stand in the content where the record has them.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        *,
        where: str,
        image_token: str | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.where, self.args = source, where, dict(args or {})
        self._tokenizer, self._pieces = tokenizer, piece_tokenizer(tokenizer)
        self._slots: dict[tuple[Shape, bool], tuple[Slot, ...]] = {}
        self.image_token: str | None = None
        self._styles: dict[Role, Style] = {}
        self._find_styles(image_token)
        after_answer = self._gaps((("user", "t"), ("assistant", "t")))[-1]
        stop = self._control_end(after_answer)
        self.end = after_answer[:stop] if stop is not None else tokenizer.eos_token
        if not self.end:
            self._fail(
                "nothing ends an answer: neither the template nor the tokenizer has an end token",
                "Set tokenizer.eos_token.",
            )

    def slots(self, shape: Shape, *, generate: bool) -> tuple[Slot, ...]:
        """Return the slots of a conversation of this shape, content slots in the order of its texts.

        With `generate` they end before the answer to come. That cut is made in the rendering of a whole
        conversation, so the prompt is by construction how training begins, which `add_generation_prompt` does
        not promise. Raises RecordError if the template refuses these turns, ConfigError if it is unusable.
        """
        key = (shape, generate)
        if key not in self._slots:
            self._slots[key] = self._read(shape, generate)
        return self._slots[key]

    def _read(self, shape: Shape, generate: bool) -> tuple[Slot, ...]:
        if generate:
            shape = (*shape, ("assistant", "t"))
        items = _items(shape)
        gaps, rules = self._gaps(shape), self._strip_rules(shape)
        slots: list[Slot] = []
        for number, ((_, role, kind), gap) in enumerate(zip(items, gaps, strict=False)):
            after_answer = number > 0 and items[number - 1][1] == "assistant"
            slots += self._after_answer(gap, last=False) if after_answer else [Slot("template", gap)]
            if generate and number == len(items) - 1:
                return tuple(slot for slot in slots if slot.text or slot.kind != "template")
            left, right = rules[number]
            supervised = role == "assistant"
            slots.append(
                Slot("content", supervised=supervised, left=left, right=right) if kind == "t" else Slot("image")
            )
        slots += self._after_answer(gaps[-1], last=True)
        return tuple(slot for slot in slots if slot.text or slot.kind != "template")

    def _after_answer(self, gap: str, *, last: bool) -> list[Slot]:
        """Split the text after an answer into what ends the turn, supervised, and the rest."""
        stop = self._control_end(gap)
        if stop is not None and (last or gap[:stop].strip() == self.end.strip()):
            return [Slot("template", gap[:stop], supervised=True), Slot("template", gap[stop:])]
        if last:
            # Without an end the model would never learn to stop.
            return [Slot("template", self.end, supervised=True), Slot("template", gap)]
        return [Slot("template", gap)]

    def _control_end(self, text: str) -> int | None:
        end = next((end for _, end in self._pieces.control_spans(text)), None)
        # Some tokens swallow the white space on their right, which is no part of their name.
        return end and len(text[:end].rstrip())

    def _gaps(self, shape: Shape, *, pad: tuple[str, str] = ("", "")) -> list[str]:
        """Render with sentinels, each padded by `pad`, and return the text before, between and after them."""
        items = _items(shape)
        try:
            rendered = self._render(shape, pad)
        except _Refusal as refusal:
            self._explain(refusal, shape)
        gaps, position, images = [], 0, 0
        for number, (turn, role, kind) in enumerate(items):
            in_list = kind == "i" and self._styles[role] == "list"
            images += in_list
            mark = cast(str, self.image_token) if in_list else _sentinel(number)
            found = rendered.find(mark, position)
            if found < 0 or (not in_list and rendered.count(mark) != 1):
                self._misplaced(turn, role, kind, rendered.count(mark))
            gaps.append(rendered[position:found])
            position = found + len(mark)
        if images and rendered.count(cast(str, self.image_token)) != images:
            problem = f"the template writes {self.image_token!r} more often than there are images"
            self._fail(problem, "Name the text that stands for exactly one image with image_token=.")
        return [*gaps, rendered[position:]]

    def _misplaced(self, turn: int, role: str, kind: str, count: int) -> NoReturn:
        what = f"{'the text' if kind == 't' else 'an image'} of turn {turn} ({role})"
        if kind == "i" and count:
            problem = f"the template moves {what} to another place"
            self._fail(problem, "Put the images of a turn before its text, or use another template.")
        if count > 1:
            self._fail(f"the template writes {what} {count} times", "Use a template that writes it once.")
        remedy = "Use a template that writes every turn unchanged."
        if role == "system":
            remedy = "Fold the system text into the first user turn, or use another template."
        self._fail(f"the template drops or alters {what}", remedy)

    def _strip_rules(self, shape: Shape) -> list[tuple[str | None, str | None]]:
        """Find, for each text, which whitespace the template strips from its left and its right."""
        plain = self._gaps(shape)
        stripped: list[tuple[set[str], set[str]]] = [(set(), set()) for _ in plain[1:]]
        for space in " \n\t":
            for side, pad in enumerate(((space, ""), ("", space))):
                padded = self._gaps(shape, pad=pad)
                for number, kind in enumerate(kind for _, _, kind in _items(shape)):
                    before, after = plain[number + side], padded[number + side]
                    if kind == "t" and after == before:
                        stripped[number][side].add(space)
                    elif kind == "t" and after != (before + space if side == 0 else space + before):
                        self._fail("the template rewrites whitespace inside contents", "Use another template.")
        return [(_chars(left), _chars(right)) for left, right in stripped]

    def _render(self, shape: Shape, pad: tuple[str, str] = ("", "")) -> str:
        messages, number = [], 0
        for role, kinds in shape:
            marks = []
            for kind in kinds:
                marks.append(_sentinel(number) if kind == "i" else pad[0] + _sentinel(number) + pad[1])
                number += 1
            content: Any = "".join(marks)
            if self._styles[role] == "list":
                content = [
                    {"type": "text", "text": mark} if kind == "t" else {"type": "image"}
                    for kind, mark in zip(kinds, marks, strict=True)
                ]
            messages.append({"role": role, "content": content})
        # As apply_chat_template of transformers: the special tokens by name, which the arguments may replace.
        variables = {**self._tokenizer.special_tokens_map, "tools": None, "documents": None, **self.args}
        try:
            return render(self.source, {"messages": messages, "add_generation_prompt": False, **variables})
        except Refused as refused:
            raise _Refusal(str(refused)) from None
        except Failed as failed:
            error = _Exceeded if isinstance(failed, Exceeded) else ConfigError
            raise error(f"the template fails: {failed}", where=self.where, remedy="Correct the template.") from None

    def _explain(self, refusal: _Refusal, shape: Shape) -> NoReturn:
        """Turn a template's own raise_exception into an error with a remedy."""
        remedy = "Change the record's turns, or use another chat format."
        if shape[0][0] == "system":
            try:
                self._render(shape[1:])
            except MmitError:
                pass
            else:
                remedy = "The template takes no system turn: fold its text into the first user turn."
        problem = f"the template refuses this conversation: {refusal.problem}"
        raise RecordError(problem, where=self.where, remedy=remedy) from refusal

    def _find_styles(self, image_token: str | None) -> None:
        """Find how the template wants contents: lists with images, else strings, else lists of texts."""
        talk: Shape = (("user", "t"), ("assistant", "t"))
        # Whether the user's list must be able to hold images, the user's style, the others' style.
        candidates: list[tuple[bool, Style, Style]] = [
            (True, "list", "list"),
            (True, "list", "string"),
            (False, "string", "string"),
            (False, "list", "list"),
        ]
        problem: MmitError | None = None
        for wants_images, user, assistant in candidates:
            self._styles = {"system": assistant, "user": user, "assistant": assistant}
            self.image_token = None
            try:
                self._check_style(talk)
                if wants_images:
                    self.image_token = self._find_image_token(image_token)
            except (_Ambiguous, _Exceeded):
                raise
            except MmitError as error:
                problem = error if user == "string" else problem  # what went wrong in the common style
                continue
            if not wants_images or self.image_token:
                break
        else:
            raise cast(MmitError, problem)
        if image_token is not None and self.image_token is None:
            unwritten = f"the template never writes the image token {image_token!r}"
            self._fail(unwritten, "Leave image_token out: images then stand where the record has them.")
        with_system: Shape = (("system", "t"), *talk)
        other: Style = "string" if assistant == "list" else "list"
        for style in (assistant, other):
            self._styles["system"] = style
            try:
                self._check_style(with_system)
                return
            except _Exceeded:
                raise
            except MmitError:
                continue
        # A template may refuse system turns; the record that has one will be told so.
        self._styles["system"] = assistant

    def _check_style(self, shape: Shape) -> None:
        """Raise unless every text is written once and no list is printed as Python or JSON."""
        gaps = self._gaps(shape)
        if "list" in self._styles.values() and any("'type'" in gap or '"type"' in gap for gap in gaps):
            self._fail("the template prints a list of parts as code", "Use a template for lists of parts.")

    def _find_image_token(self, wanted: str | None) -> str | None:
        """Return the text the template writes for an image part, None if it writes nothing."""
        answer: tuple[Role, str] = ("assistant", "t")
        without = self._render((("user", "t"), answer))
        # Image parts carry no sentinel, so the texts are numbered as if they were the only items.
        with_image = self._render((("user", "it"), answer)).replace(_sentinel(1), _sentinel(0))
        with_image = with_image.replace(_sentinel(2), _sentinel(1))
        written = _inserted(without, with_image)
        if not written.strip():
            return None
        known = getattr(self._tokenizer, "image_token", None)
        for token in (wanted, known if isinstance(known, str) else None):
            if token and with_image.count(token) == 1 and token not in without:
                return token
        tokens = [written[a:b] for a, b in self._pieces.control_spans(written)] or written.split()
        if wanted is None and len(tokens) == 1:
            return tokens[0].strip()
        problem = f"cannot tell which part of {written!r} stands for the image"
        remedy = f"Name it with image_token=, one of: {', '.join(map(str.strip, tokens))}."
        raise _Ambiguous(problem, where=self.where, remedy=remedy)

    def _fail(self, problem: str, remedy: str) -> NoReturn:
        raise ConfigError(problem, where=self.where, remedy=remedy)


class _Refusal(RecordError):
    """The template called raise_exception."""


class _Ambiguous(ConfigError):
    """The template takes image parts, but what it writes for them cannot be read."""


class _Exceeded(ConfigError):
    """The template takes more time or memory than it may; no other style will do better."""


def _sentinel(number: int) -> str:
    # Mixed case, so that a template that changes case is found out; nothing that a filter would escape.
    return f"MmitSlot{number}End"


def _items(shape: Shape) -> Sequence[tuple[int, Role, str]]:
    """List (turn number from 1, role, "t" or "i") of every part."""
    return [(turn, role, kind) for turn, (role, kinds) in enumerate(shape, 1) for kind in kinds]


def _chars(stripped: set[str]) -> str | None:
    return None if len(stripped) == 3 else "".join(sorted(stripped))


def _inserted(shorter: str, longer: str) -> str:
    """Return what `longer` has more than `shorter`, between their common beginning and end."""
    start = 0
    while start < len(shorter) and shorter[start] == longer[start : start + 1]:
        start += 1
    end = 0
    while end < len(shorter) - start and shorter[-1 - end] == longer[len(longer) - 1 - end]:
        end += 1
    return longer[start : len(longer) - end]
