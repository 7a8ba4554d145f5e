"""How a chat template wants its messages, found out by trying: lists or strings, image tokens, thoughts, calls.

Sets what it finds on the Locator and its Renderer. Found once for a template (thoughts and calls when first met); one
that writes no form of the simplest conversation is refused with the reason of the common form.
"""

from __future__ import annotations

from typing import Any, cast

from mmit.data.chat_render import FIELD, INLINE, PART, Extras, Outline, Shape, Style, Way, sentinel
from mmit.data.content import piece_tokenizer
from mmit.data.template_locate import ANSWER, ASK, NO_EXTRAS, TALK, Exceeded, Locator, common, items_of, name_token
from mmit.errors import MmitError


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
    for wants_images, user, assistant in candidates:
        locator.renderer.styles = {"system": assistant, "user": user, "assistant": assistant, "tool": assistant}
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
