"""Shows an encoded record token by token, so that loss weights can be checked by eye: the deeper the shade, the more.

Takes what `encode` returns and its tokenizer; gives a rich Text for the terminal or an HTML page of its own.
Every token is shown, white space and invisible characters made visible; nothing a record holds reaches the
terminal or the page as code. Reads only: it neither encodes nor changes a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mmit.data.chat_writer import IMAGE_SLOT
from mmit.pages import page
from mmit.text import escape

if TYPE_CHECKING:
    from mmit.data.chat_builtin import Origin
    from mmit.data.chat_writer import Encoded

_VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "⇥"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One token as it is shown, or several that only together make a character, or one image."""

    ids: tuple[int, ...]
    text: str
    origin: Origin
    weight: float

    @property
    def supervised(self) -> bool:
        """Whether it carries loss."""
        return self.weight > 0


def cells(encoded: Encoded, tokenizer: Any) -> list[Cell]:
    """Return the tokens of a record with their text, every invisible character made visible."""
    out: list[Cell] = []
    rows = zip(encoded.ids, encoded.origin, encoded.weights, strict=True)
    for is_image, chunk in groupby(rows, key=lambda row: row[0] == IMAGE_SLOT):
        kept = list(chunk)
        if is_image:
            out += [Cell((IMAGE_SLOT,), "[image]", "image", 0.0)] * len(kept)
            continue
        ids = [i for i, _, _ in kept]
        for start, end, text in _decode_each(ids, [row[1:] for row in kept], tokenizer):
            _, origin, weight = kept[start]
            out.append(Cell(tuple(ids[start:end]), _visible(text), origin, weight))
    return out


def to_rich(encoded: Encoded, tokenizer: Any, *, image_tokens: int | None = None) -> Text:
    """Return a record for the terminal: supervised tokens on green between «», template dim, a legend below.

    A weight other than 1 stands behind «, and its green is paler or brighter. `image_tokens` is what one image becomes
    inside the model, shown as [image x16].
    """
    out = Text()
    previous = 0.0
    for cell in cells(encoded, tokenizer):
        if cell.weight != previous:
            out.append("»" * (previous > 0) + "«" * cell.supervised, style="bold green")
            if cell.weight not in (0, 1):
                out.append(f"{cell.weight:g}:", style="italic green")
        elif len(out) and not out.plain.endswith("\n"):
            out.append("│", style="dim")
        out.append(_label(cell, image_tokens), style=_rich_style(cell))
        previous = cell.weight
    if previous > 0:
        out.append("»", style="bold green")
    if not out.plain.endswith("\n"):
        out.append("\n")
    return out.append(legend(encoded, image_tokens=image_tokens) + ", «supervised», │ between tokens", style="italic")


def to_html(encoded: Encoded, tokenizer: Any, *, title: str = "Record", image_tokens: int | None = None) -> str:
    """Return a record as an HTML page of its own; the id of a token shows when the mouse rests on it.

    Args:
        encoded: ids, weights and origins. tokenizer: the one it was encoded with.
        title: of the page. image_tokens: tokens of an image, where all have as many.
    """
    tokens = html_tokens(encoded, tokenizer, image_tokens=image_tokens)
    counts = legend(encoded, image_tokens=image_tokens)
    note = f'{counts}; <span class="supervised">supervised</span>, <span class="template">template</span>, '
    note += '<span class="content">content</span>'
    return page(title, f"<pre>{tokens}</pre>", f'<p class="small">{note}</p>', kind="record")


def html_tokens(encoded: Encoded, tokenizer: Any, *, image_tokens: int | None = None) -> str:
    """Return the tokens as spans of the classes supervised, template, content and image, for a page of one's own."""
    spans = []
    for cell in cells(encoded, tokenizer):
        kind = "supervised" if cell.supervised else cell.origin
        hint = f"{cell.origin}, id {' '.join(map(str, cell.ids))}" if cell.origin != "image" else "image slot"
        shade = ""
        if cell.weight not in (0, 1):
            hint += f", weight {cell.weight:g}"
            shade = f' style="background: rgba(47, 158, 68, {min(0.1 + 0.25 * cell.weight, 0.9):.2f})"'
        spans.append(f'<span class="{kind}" title="{hint}"{shade}>{escape(_label(cell, image_tokens))}</span>')
    return "".join(spans)


def legend(encoded: Encoded, *, image_tokens: int | None = None) -> str:
    """Return the counts of a record in one line."""
    images = encoded.ids.count(IMAGE_SLOT)
    weights = [weight for weight in encoded.weights if weight > 0]
    uneven = any(weight != 1 for weight in weights)
    counts = [
        f"{len(encoded.ids) - images} text tokens",
        f"{len(weights)} supervised" + (f" (weights {sum(weights):g} in all)" if uneven else ""),
        f"{images} image slot{'' if images == 1 else 's'}",
    ]
    if image_tokens is not None:
        counts.append(f"{len(encoded.ids) + images * (image_tokens - 1)} positions in the model")
    return ", ".join(counts)


def _label(cell: Cell, image_tokens: int | None) -> str:
    if cell.origin == "image" and image_tokens is not None:
        return f"[image x{image_tokens}]"
    return cell.text


def _rich_style(cell: Cell) -> str:
    if cell.supervised:
        return "black on " + ("dark_sea_green" if cell.weight < 1 else "green" if cell.weight == 1 else "bright_green")
    return {"image": "black on blue", "template": "dim", "content": ""}[cell.origin]


def _decode_each(ids: Sequence[int], groups: Sequence[Any], tokenizer: Any) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, text) of every token.

    Each is decoded behind the one before it, since decoders drop the first space of a text. Tokens that each
    hold a part of a character's bytes come together, within one of `groups`.
    """
    window = start = 0
    for end in range(1, len(ids) + 1):
        before = _decode(ids[window:start], tokenizer)
        text = _decode(ids[window:end], tokenizer)
        new = text[len(before) :] if text.startswith(before) else ""
        unfinished = new.endswith("\ufffd") and end - start < 4
        if unfinished and end < len(ids) and groups[end] == groups[start]:
            continue
        # A token that adds nothing is still a token: show its name in the vocabulary.
        yield start, end, new or "".join(map(str, tokenizer.convert_ids_to_tokens(list(ids[start:end]))))
        window, start = start, end


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _visible(text: str) -> str:
    """Show white space by signs, and what cannot be seen (escapes, writing directions) by its code."""
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
