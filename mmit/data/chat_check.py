"""Whether mmit's text of a record is what its chat template writes for the same messages.

The template is rendered with the record's real words, as `apply_chat_template` of transformers renders it (the
renderer is the same, and tests compare the two), and the texts are compared. Two things differ on purpose and are not
told: an end that mmit adds where the template writes none, and the BOS in front of a whole text.
"""

from __future__ import annotations

from mmit.data.chat import ChatFormat, TemplateFormat
from mmit.records import Record, short

IMAGE = "[image]"


def difference(record: Record, chat: ChatFormat) -> str:
    """Say where the text first differs from the template's; "" if it does not, or if the format has no template."""
    if not isinstance(chat, TemplateFormat):
        return ""
    expected = expected_text(record, chat)
    ours = text_of(record, chat)
    if ours == expected:
        return ""
    pairs = zip(ours, expected, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(expected)))
    begin = max(at - 20, 0)
    return (
        f"at character {at} mmit has '{short(ours[begin : at + 40])}', "
        f"the template '{short(expected[begin : at + 40])}'"
    )


def text_of(record: Record, chat: TemplateFormat) -> str:
    """mmit's text, without ends that it adds, an image as the template's image token."""
    mark = chat.template.image_token or IMAGE
    pieces = chat.pieces(record)
    return "".join(mark if p.kind == "image" else p.text for p in pieces if p.part != "added")


def expected_text(record: Record, chat: TemplateFormat) -> str:
    """What the template writes for the record's messages."""
    shape, extras, said = chat.outline(record)
    words: list[str | None] = []
    for outline, turn in zip(shape, said, strict=True):
        in_list = chat.template.in_list(outline)
        words += [turn.thought] if outline.thought == "k" else []
        words += [(None if in_list else IMAGE) if part is None else part.text for part in turn.parts]
        words += [""] if turn.calls else []
    return chat.template.rendered(shape, words, extras)
