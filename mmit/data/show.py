"""Sampled records as a page to look through: pictures, tokens by what the loss is taken on, lengths, provenance.

Takes rows with their encoded samples; gives one self-contained HTML page (pictures as data URIs, no scripts, light
and dark) or the same for the terminal. A row that is bad, or that the tokenizer refuses, is shown with its reason.
Nothing a record holds reaches the page or the terminal as code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.rule import Rule
from rich.text import Text as RichText

from mmit.data.chat_writer import IMAGE_SLOT
from mmit.data.images import image_size, load_rgb
from mmit.data.viewer import html_tokens, legend, to_rich
from mmit.errors import ImageError, RecordError
from mmit.pages import inline_image, page
from mmit.records import Image, Record, Text, Turn, short
from mmit.text import escape, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmit.data.chat_writer import Encoded

THUMBNAIL = 240  # pixels of the longer side


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row to show: its number in the data from 1, its encoded samples if any, and why there are none if not."""

    number: int
    row: Record | RecordError
    samples: tuple[Encoded, ...] = ()
    problem: str = ""


def to_page(
    items: Sequence[SampledRow],
    *,
    title: str,
    notes: Sequence[str] = (),
    tokenizer: Any = None,
    image_tokens: int | None = None,
) -> str:
    """Return sampled rows as one HTML page.

    Args:
        items: the rows. title: of the page. notes: paragraphs below it, as plain text.
        tokenizer: the one the samples were encoded with; None shows texts without tokens.
        image_tokens: tokens of an image, where all have as many.
    """
    cards = [_card(item, tokenizer, image_tokens=image_tokens) for item in items]
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    if any(item.samples for item in items):
        key = (
            '<span class="supervised">learned from</span><span class="content">read only</span>'
            '<span class="template">chat format</span><span class="image">image</span>'
            "<i>the bar shows their shares; rest on a token for its id, and its loss weight where that is not 1</i>"
        )
    else:
        key = '<span class="supervised">answer</span><span class="image">image</span>'
        key += "<i>without a tokenizer, no tokens</i>"
    header = f'<header class="page"><h1>{escape(title)}</h1>{told}</header>'
    legend_line = f'<div class="key"><div>{key}</div></div>'
    return page(title, header, legend_line, f"<main>{''.join(cards)}</main>", kind="records")


def _card(item: SampledRow, tokenizer: Any, *, image_tokens: int | None) -> str:
    if isinstance(item.row, RecordError):
        place = item.row.where or "bad row"
        remedy = f"<br>{escape(item.row.remedy)}" if item.row.remedy else ""
        return (
            f'<article class="bad"><h2><small>{item.number:,}</small> {escape(place)}</h2>'
            '<div class="facts">no record</div>'
            f'<div class="problem">{escape(item.row.problem)}{remedy}</div></article>\n'
        )
    record = item.row
    body = [f"<h2><small>{item.number:,}</small> {escape(record.where)}</h2>"]
    body.append(f'<div class="facts">{escape(" · ".join(facts(record, item.samples, image_tokens)))}</div>')
    if item.problem:
        body.append(f'<div class="problem">{escape(item.problem)}</div>')
    if item.samples:
        body.append(_bar(item.samples, image_tokens or 1))
    if record.images:
        body.append(f'<div class="pictures">{"".join(map(_figure, record.images))}</div>')
    if item.samples:
        for number, encoded in enumerate(item.samples, 1):
            body.append(f"<pre>{html_tokens(encoded, tokenizer, image_tokens=image_tokens)}</pre>")
            if len(item.samples) > 1:
                counted = legend(encoded, image_tokens=image_tokens)
                name = f"sample {number} of {len(item.samples)}"
                if record.rejected is not None:
                    name = ("chosen", "rejected")[number - 1]
                body.append(f'<div class="facts">{name}: {counted}</div>')
    else:
        body += map(_turn, record.turns)
        body += [_turn(record.rejected, "rejected")] if record.rejected is not None else []
    if record.meta:
        meta = json.dumps(record.meta, ensure_ascii=False, indent=1, default=str)
        body.append(f"<details><summary>meta</summary><pre>{escape(meta)}</pre></details>")
    return f"<article>{''.join(body)}</article>\n"


def facts(record: Record, samples: Sequence[Encoded], image_tokens: int | None) -> list[str]:
    """Lengths and provenance of a record, each in a few words."""
    out = [_of(len(record.turns), "turn")]
    if record.images:
        out.append(_of(len(record.images), "image"))
    if record.rejected is not None:
        out.append("chosen and rejected")
    if record.label is not None:
        out.append(f"labelled {'good' if record.label else 'bad'}")
    if samples:
        supervised, slots, tokens = _counts(samples)
        length = tokens + slots * ((image_tokens or 1) - 1)
        out += [
            _of(length, "token"),
            f"{supervised:,} learned from ({supervised / max(tokens - slots, 1):.0%} of text)",
        ]
        if len(samples) > 1:
            out.append(f"{len(samples)} samples")
    else:
        out.append(_of(sum(len(turn.text) for turn in record.turns), "character"))
    return [*out, f"licence {record.licence}" if record.licence else "licence not stated"]


def _counts(samples: Sequence[Encoded]) -> tuple[int, int, int]:
    """Supervised tokens, image slots and entries in all, over the samples."""
    slots = sum(encoded.ids.count(IMAGE_SLOT) for encoded in samples)
    return sum(sum(e.supervised) for e in samples), slots, sum(len(e.ids) for e in samples)


def _bar(samples: Sequence[Encoded], image_tokens: int) -> str:
    supervised, slots, tokens = _counts(samples)
    total = tokens + slots * (image_tokens - 1)
    shares = {"image": slots * image_tokens, "content": tokens - slots - supervised, "supervised": supervised}
    parts = "".join(f'<i class="{kind}" style="width:{100 * n / total:.2f}%"></i>' for kind, n in shares.items())
    told = ", ".join(f"{n / total:.0%} {name}" for n, name in zip(shares.values(), _SHARES, strict=True))
    return f'<div class="bar" title="{told}">{parts}</div>'


_SHARES = ("images", "read only", "learned from")


def _figure(image: Image) -> str:
    name = Path(image.source).name if isinstance(image.source, str) else "inside the record"
    try:
        picture = load_rgb(image)
    except ImageError as error:
        return f'<div class="problem">{escape(error.where)}: {escape(error.problem)}</div>'
    size = f"{picture.width} × {picture.height}"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    shown = inline_image(picture, alt=name, quality=82)
    return f"<figure>{shown}<figcaption>{escape(short(name))} · {size}</figcaption></figure>"


def _turn(turn: Turn, name: str = "") -> str:
    parts = [escape(part.text) if isinstance(part, Text) else '<span class="image">image</span>' for part in turn.parts]
    return f'<div class="turn {turn.role}"><b>{name or turn.role}</b>{"".join(parts)}</div>'


def _of(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# --- terminal -----------------------------------------------------------------------------------------------------


def to_terminal(
    items: Sequence[SampledRow], *, tokenizer: Any = None, image_tokens: int | None = None
) -> Iterator[RenderableType]:
    """Yield what to print with rich, record by record."""
    for item in items:
        record = item.row
        yield Rule(RichText(plain(f"{item.number}  {record.where or 'bad row'}"), "bold"), align="left")
        if isinstance(record, RecordError):
            yield RichText(plain(record.problem), "red")
            continue
        yield RichText(plain(" · ".join(facts(record, item.samples, image_tokens))), "dim")
        if item.problem:
            yield RichText(plain(item.problem), "red")
        for number, image in enumerate(record.images, 1):
            yield _image_line(number, image)
        if item.samples:
            yield from (to_rich(encoded, tokenizer, image_tokens=image_tokens) for encoded in item.samples)
            continue
        for turn in record.turns:
            shown = "".join(part.text if isinstance(part, Text) else "[image]" for part in turn.parts)
            yield RichText.assemble((f"{turn.role}: ", "bold"), (plain(shown), _ROLE_STYLES.get(turn.role, "")))
        if record.rejected is not None:
            yield RichText.assemble(("rejected: ", "bold"), (plain(record.rejected.text), "red"))


_ROLE_STYLES = {"assistant": "green", "system": "dim"}


def _image_line(number: int, image: Image) -> RichText:
    name = image.source if isinstance(image.source, str) else "inside the record"
    try:
        W, H = image_size(image)
    except ImageError as error:
        return RichText(plain(f"image {number}: {name}: {error.problem}"), "red")
    return RichText(plain(f"image {number}: {name} ({W} x {H})"))
