"""A chat template rendered with sentinels: where each text, image, thought and call of a conversation comes out.

Owns Item, the Locator, and the errors that say what a template does to a content: drops it, moves it, writes it twice,
rewrites its whitespace. Real content is never rendered here.

How a template wants its messages (lists or strings, image tokens, thoughts, calls) is found out by trying, once for a
template, and set on the Locator and its Renderer. One that writes no form of the simplest conversation is refused with
the reason of the common form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

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


class Item(NamedTuple):
    """A part of a turn (from 0): "k" a thought, "t" a text, "i" an image, "c" the first call."""

    turn: int
    kind: str


class Exceeded(ConfigError):
    """The template takes more time or memory than it may; no other style will do better."""


class Locator:
    """Renders conversations of a template and finds their items in the text.

    Attributes:
        renderer: the template; how it wants contents is set on it (see `template_locate`).
        image_token: the text the template writes for an image part, None if it knows none.
        unclear: (problem, remedy) where there is such a text and it cannot be told.
        ready: the template writes the simplest conversation, so that a failure is a record's fault from now on.
    """

    def __init__(self, renderer: Renderer, *, where: str) -> None:
        self.renderer, self.where = renderer, where
        self.image_token: str | None = None
        self.unclear: tuple[str, str] = ("", "")
        self.ready = False

    def locate(
        self,
        shape: Shape,
        items: Sequence[Item],
        extras: Extras,
        *,
        pad: tuple[str, str] = ("", ""),
        prompt: bool = False,
    ) -> tuple[list[tuple[int, int] | None], str]:
        """Render with sentinels and find them.

        Args:
            shape: the conversation without its words. items: its parts, of `items_of`. extras: tools and arguments.
            pad: text around each sentinel of a text, to see what is stripped. prompt: end where an answer begins.

        Returns:
            (start, end) of each item in the text, None for a thought that was cut, and the text.

        Raises:
            ConfigError, or RecordError once the template is `ready`: an item is dropped, moved, altered or doubled.
        """
        in_list = [item.kind == "i" and self.renderer.style(shape[item.turn]) == "list" for item in items]
        if any(in_list) and self.image_token is None:
            problem, remedy = self.unclear
            self.fail(problem or "the template writes nothing for an image in a list of parts", remedy)
        # Sentinels are numbered, so that a template that writes contents in another order, or twice, is found out.
        marks = [pad[0] + sentinel(n) + pad[1] if item.kind in "kt" else sentinel(n) for n, item in enumerate(items)]
        rendered = self.render(self.renderer.messages(shape, marks), extras, shape=shape, prompt=prompt)
        found: dict[int, list[tuple[int, int]]] = {}
        for match in SENTINEL.finditer(rendered):
            found.setdefault(int(match[1]), []).append(match.span())
        # Known limit: a template that writes its image token by itself, as an example in a system prompt say, has more
        # of them than images, and is refused below.
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
                # The one item that a template may leave out: many show only the thought of the last answer.
                if item.kind == "k" and not places:
                    spans.append(None)
                    continue
                # Once and in order. A content that moved would be taught at a place where it never stands again.
                places = places if count == 1 and places[0][0] >= position else []
            if not places:
                self._misplaced(item, shape[item.turn].role, count)
            spans.append(places[0])
            position = places[0][1]
        # Image parts carry no sentinel, so they are told by their token alone, and must be as many as were given.
        if len(images) != sum(in_list):
            problem = f"the template writes {self.image_token!r} more often than there are images"
            self.fail(problem, name_token("the text that stands for exactly one image"))
        return spans, rendered

    def _misplaced(self, item: Item, role: str, count: int) -> NoReturn:
        nouns = {"t": "the text", "i": "an image", "k": "the thought", "c": "the tool calls"}
        what = f"{nouns[item.kind]} of turn {item.turn + 1} ({role})"
        if item.kind == "i" and count:
            problem = f"the template moves {what} to another place"
            self.fail(problem, "Put the images of a turn before its text, or use another template.")
        if count > 1:
            self.fail(f"the template writes {what} {count} times", "Use a template that writes it once.")
        remedy = "Use a template that writes every turn unchanged."
        if role == "system":
            remedy = "Fold the system text into the first user turn, or use another template."
        if item.kind == "c" or role == "tool":
            remedy = "Use a template that knows tools."
        self.fail(f"the template drops or alters {what}", remedy)

    def strip_rules(
        self,
        shape: Shape,
        items: Sequence[Item],
        extras: Extras,
        plain: Sequence[tuple[str, str] | None],
        *,
        prompt: bool,
    ) -> list[tuple[str | None, str | None]]:
        """Find, for each text, which whitespace the template strips from its left and its right.

        Args:
            shape, items, extras, prompt: as of `locate`.
            plain: what stands around each item without padding, of `gaps_of`.

        Returns:
            arguments of str.lstrip and str.rstrip for each item: "" strips nothing, None any whitespace.

        Raises:
            ConfigError, or RecordError once the template is `ready`: whitespace inside a content is rewritten.
        """
        stripped: list[tuple[set[str], set[str]]] = [(set(), set()) for _ in items]
        # Each by itself: a template may strip newlines and keep blanks.
        for space in " \n\t":
            # Around the sentinel and on one side at a time: what both sides lose at once could not be told apart where
            # two texts stand next to each other.
            for side, pad in enumerate(((space, ""), ("", space))):
                padded = gaps_of(*self.locate(shape, items, extras, pad=pad, prompt=prompt))
                for number, item in enumerate(items):
                    if item.kind not in "kt" or plain[number] is None or padded[number] is None:
                        continue
                    before, after = plain[number][side], padded[number][side]  # type: ignore[index]
                    if after == before:
                        stripped[number][side].add(space)
                    elif after != (before + space if side == 0 else space + before):
                        self.fail("the template rewrites whitespace inside contents", "Use another template.")
        return [(_chars(left), _chars(right)) for left, right in stripped]

    def render(
        self, messages: Sequence[Mapping[str, Any]], extras: Extras, *, shape: Shape = (), prompt: bool = False
    ) -> str:
        """Render messages.

        Args:
            messages: as transformers has them. extras: tools and template arguments.
            shape: the conversation, to try a remedy before it is named. prompt: end where an answer begins.

        Raises:
            RecordError: the template refuses the conversation. Exceeded: it takes too much time or memory.
            ConfigError, or RecordError once the template is `ready`: it fails.
        """
        try:
            return self.renderer.render(messages, extras, prompt=prompt)
        except Refusal as refusal:
            remedy = "Change the record's turns, or use another chat format."
            # Tried without the system turn, so that the remedy is one that works.
            if shape and shape[0].role == "system" and self._takes(shape[1:]):
                remedy = "The template takes no system turn: fold its text into the first user turn."
            problem = f"the template refuses this conversation: {refusal.problem}"
            raise RecordError(problem, where="" if self.ready else self.where, remedy=remedy) from refusal
        # No other form of the messages will take less, so it is not tried again.
        except TooMuch as error:
            raise Exceeded(error.problem, where=self.where, remedy="Correct the template.") from None
        except Failure as failure:
            self.fail(failure.problem, "Correct the template, or change the record's turns.")

    def _takes(self, shape: Shape) -> bool:
        marks = [sentinel(n) for n in range(len(items_of(shape)))]
        try:
            self.renderer.render(self.renderer.messages(shape, marks), NO_EXTRAS)
        except MmitError:
            return False
        return True

    def fail(self, problem: str, remedy: str) -> NoReturn:
        """Raise RecordError, or ConfigError where the template itself is at fault."""
        if self.ready:  # a template that writes the simplest conversation: the record is at fault
            raise RecordError(f"{self.where}: {problem}", remedy=remedy)
        raise ConfigError(problem, where=self.where, remedy=remedy)


def items_of(shape: Shape) -> list[Item]:
    """List the items of all turns in the order in which they are written."""
    out = []
    for number, turn in enumerate(shape):
        kinds = ("k" if turn.thought == "k" else "") + turn.kinds + ("c" if turn.calls else "")
        out += [Item(number, kind) for kind in kinds]
    return out


def name_token(what: str) -> str:
    """The remedy where an image token has to be named."""
    return f"Name {what}: model.chat.image_token in a config, --image-token of a command, image_token= in Python."


def _places(text: str, mark: str) -> list[tuple[int, int]]:
    out, at = [], text.find(mark)
    while at >= 0:
        out.append((at, at + len(mark)))
        at = text.find(mark, at + len(mark))
    return out


def gaps_of(spans: Sequence[tuple[int, int] | None], rendered: str) -> list[tuple[str, str] | None]:
    """The text before and after each item, up to its neighbours."""
    there = [span for span in spans if span is not None]
    ends = [0, *(span[1] for span in there)]
    starts = [*(span[0] for span in there), len(rendered)]
    texts = [rendered[a:b] for a, b in zip(ends, starts, strict=True)]
    pairs = iter(zip(texts, texts[1:], strict=False))
    return [None if span is None else next(pairs) for span in spans]


def _chars(stripped: set[str]) -> str | None:
    # Blank, newline and tab: a template that strips all three calls strip() without an argument, which strips any
    # whitespace.
    return None if len(stripped) == 3 else "".join(sorted(stripped))


def common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def find_styles(locator: Locator, tokenizer: Any, image_token: str | None) -> None:
    """Find how the template wants contents: lists with images, else strings, else lists of texts."""
    # Whether the user's list must be able to hold images, the user's style, the others' style.
    candidates: list[tuple[bool, Style, Style]] = [
        (True, "list", "list"),
        (True, "list", "string"),
        (False, "string", "string"),
        (False, "list", "list"),
    ]
    problem: MmitError | None = None
    # Lists first, because a template that knows images knows them as parts; a template for strings prints a list as
    # code, which shows.
    for wants_images, user, assistant in candidates:
        locator.renderer.styles = {"system": assistant, "user": user, "assistant": assistant, "tool": assistant}
        # Forgotten between candidates: a token that was found for one style says nothing about the next.
        locator.image_token, locator.unclear = None, ("", "")
        try:
            _check_style(locator, TALK)
            if wants_images:
                locator.image_token = _find_image_token(locator, tokenizer, image_token)
        except Exceeded:
            raise
        except MmitError as error:
            problem = error if user == "string" else problem  # what went wrong in the common style
            continue
        # A template for lists that writes nothing for an image is tried on as one for strings: the image then stands in
        # the text.
        if not wants_images or locator.image_token or locator.unclear[0]:
            break
    else:
        raise cast("MmitError", problem)
    if image_token is not None and locator.image_token is None:
        unwritten = f"the template never writes the image token {image_token!r}"
        locator.fail(unwritten, "Leave image_token out: images then stand where the record has them.")
    for role in ("system", "tool"):
        _find_style(locator, role, assistant)


def _find_style(locator: Locator, role: str, assistant: Style) -> None:
    """The style of system or tool turns; a template may refuse them, and the record that has one is told so."""
    turn = Outline(cast("Any", role), "t")
    shape: Shape = (turn, *TALK) if role == "system" else (*TALK, turn, ANSWER)
    # As the other turns first. Some templates read lists of the user's alone.
    for style in (assistant, "string" if assistant == "list" else "list"):
        locator.renderer.styles[role] = style
        try:
            _check_style(locator, shape)
            return
        except Exceeded:
            raise
        except MmitError:
            continue
    locator.renderer.styles[role] = assistant


def _check_style(locator: Locator, shape: Shape) -> None:
    """Raise unless every text is written once and no list is printed as Python or JSON."""
    _, rendered = locator.locate(shape, items_of(shape), NO_EXTRAS)
    if "list" in locator.renderer.styles.values() and ("'type'" in rendered or '"type"' in rendered):
        locator.fail("the template prints a list of parts as code", "Use a template for lists of parts.")


def _find_image_token(locator: Locator, tokenizer: Any, wanted: str | None) -> str | None:
    """Return the text the template writes for an image part, None if it writes nothing.

    Where several tokens come for an image, it is the one between a first and a last, or the only padding token; a
    template of which that cannot be told is of use for records without images.
    """

    # Image parts carry no sentinel, so the texts are numbered as if they were the only items.
    texts = [sentinel(0), sentinel(1)]
    # The same conversation with and without an image: what is more in the second is what stands for it.
    without = locator.render(locator.renderer.messages(TALK, texts), NO_EXTRAS)
    shape: Shape = (Outline("user", "it"), ANSWER)
    with_image = locator.render(locator.renderer.messages(shape, [None, *texts]), NO_EXTRAS)
    written = _inserted(without, with_image)
    if not written.strip():
        return None
    known = getattr(tokenizer, "image_token", None)
    for token in (wanted, known if isinstance(known, str) else None):
        if token and with_image.count(token) == 1 and token not in without:
            return token
    tokens = [
        t.strip()
        for t in [written[a:b] for a, b in piece_tokenizer(tokenizer).control_spans(written)] or written.split()
    ]
    if wanted is None:
        # Around the one token that is the image many families write where it begins and ends.
        single = tokens if len(tokens) == 1 else [t for t in tokens if "pad" in t.lower()]
        if len(tokens) == 3 and len(single) != 1 and len(set(tokens)) == 3:
            single = tokens[1:2]
        if len(single) == 1 and written.count(single[0]) == 1:
            return single[0]
    problem = f"cannot tell which part of {written!r} stands for the image"
    locator.unclear = problem, name_token(f"one of: {', '.join(tokens)}")
    return None


def find_thought(locator: Locator) -> None:
    """Find where the template reads thoughts: in a field, in a part of the content, or in the text."""
    shape: Shape = (ASK, ANSWER._replace(thought="k"))
    items = items_of(shape)
    for way in (FIELD, PART, INLINE):
        locator.renderer.thought = cast("Way", way)
        try:
            spans, rendered = locator.locate(shape, items, NO_EXTRAS)
        except MmitError:
            continue
        if spans[1] is not None and "'type'" not in rendered and '"type"' not in rendered:
            break


def find_calls(locator: Locator, shape: Shape, extras: Extras) -> None:
    """Give arguments as objects, or as JSON text to a template that joins them to text."""
    items = items_of(shape)
    locator.renderer.calls_as_text = False
    marks = locator.renderer.messages(shape, [sentinel(n) for n in range(len(items))])
    try:
        locator.renderer.render(marks, extras)
    except MmitError:
        locator.renderer.calls_as_text = True


def _inserted(shorter: str, longer: str) -> str:
    """Return what `longer` has more than `shorter`, between their common beginning and end."""
    start = common(shorter, longer)
    end = 0
    while end < len(shorter) - start and shorter[-1 - end] == longer[len(longer) - 1 - end]:
        end += 1
    return longer[start : len(longer) - end]
