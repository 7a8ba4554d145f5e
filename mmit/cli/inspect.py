"""`mmit inspect`: one record as the model will see it, token by token, with its mask.

In: a data file or a training config. Out: the terminal, an HTML page, an SVG picture. Loads a tokenizer and, to
count image tokens, builds a vision encoder without its weights; never loads a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.sources import (
    File,
    ImageTokenOption,
    compares_of,
    conversations_of,
    files_of,
    loss_of,
    model_preparation,
    settings_of,
    tokenizer_and_chat,
)
from mmit.errors import ConfigError, RecordError
from mmit.io import write_atomic
from mmit.text import echo, plain, terminal

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.records import Record

SVG_WIDTH = 100


@dataclass(frozen=True)
class _Inspected:
    """One encoded conversation and what is said about it."""

    encoded: Any
    tokenizer: Any
    title: str
    notes: list[str]
    image_tokens: int | None


def inspect(
    data: Annotated[
        Path, typer.Argument(metavar="DATA_OR_CONFIG", help="A data file of any format, or the YAML of a run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values put on top of the config, as in mmit train.")
    ] = None,
    *,
    row: Annotated[int, typer.Option(min=1, help="Which record, counted from 1.")] = 1,
    pair: Annotated[
        int, typer.Option(min=1, help="Which question-answer pair, where data.split_turns makes them records.")
    ] = 1,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Take tokenizer, chat format and image tokens from here."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="Hub id, folder or .gguf file.")] = None,
    chat: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="hf, plain, vicuna_v1, chatml or a .jinja file. (default: hf)"),
    ] = None,
    image_token: ImageTokenOption = None,
    image_tokens: Annotated[int | None, typer.Option(min=1, metavar="M", help="Tokens per image.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the record as an HTML page.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the terminal's picture as SVG.")] = None,
) -> None:
    """Show a record's tokens, those the loss is taken on in colour."""
    settings = settings_of(data, config, overrides or ())
    if settings is None and tokenizer is None:
        raise typer.BadParameter("give --config FILE, or --tokenizer NAME (and --chat, --image-tokens)")
    record = _record(files_of(data, settings), row)
    given = {"tokenizer": tokenizer, "chat": chat, "image_token": image_token}
    shown = _encode(record, settings, pair=pair, image_tokens=image_tokens, **given)
    _print(shown)
    if html is not None:
        _write_html(shown, html)
    if svg is not None:
        _write_svg(shown, svg)


def _record(files: Sequence[File], row: int) -> Record:
    """Return the record of that number over all sources, bad rows counted; raises its error if it is bad."""
    rows = chain.from_iterable(file.weighed() for file in files)
    number = 0
    for number, item in enumerate(rows, 1):
        if number == row:
            if isinstance(item, RecordError):
                raise item
            return item
    where = ", ".join(str(file.path) for file in files)
    raise ConfigError(f"there is no row {row}: {number} rows", where=where, remedy=f"Give --row 1 to {number}.")


def _encode(
    record: Record,
    settings: Config | None,
    *,
    pair: int,
    tokenizer: str | None,
    chat: str | None,
    image_token: str | None,
    image_tokens: int | None,
) -> _Inspected:
    """Encode as training would; what is given on the command line goes before the config."""
    from mmit.data.chat import encode
    from mmit.data.chat_check import difference

    record.validate(for_training=True)
    tokens, form = tokenizer_and_chat(settings, tokenizer, chat, image_token=image_token)
    widths = [image_tokens or 1] * len(record.images)
    if image_tokens is None and settings is not None and record.images:
        if settings.model.vision is None:
            problem = "has images, but the model has no vision tower"
            raise RecordError(problem, where=record.where, remedy="set model.vision")
        preparation = model_preparation(settings.model)
        widths = [preparation.spread(image, where=record.where).tokens for image in record.images]
        image_tokens = None if preparation.tiled else preparation.tokens
    part, which = _conversation(record, pair, settings)
    try:
        encoded = encode(part, form, tokens, loss=loss_of(settings))
        differs = difference(part, form)
    except RecordError as error:  # encode sees turns only and cannot say whose they are
        raise type(error)(error.problem, where=error.where or record.where, remedy=error.remedy) from error
    notes = [f"{record.where}{which}, chat format {form.name}", *_pictures(record)]
    notes += [f"not what the chat template writes: {differs}"] if differs else []
    length = len(encoded.ids) - len(widths) + sum(widths)
    if image_tokens is None and settings is not None and widths:
        notes.append(f"image tokens: {', '.join(map(str, widths))}; {length} positions in the model")
    if settings is not None and length > settings.data.max_length:
        notes.append(f"training refuses it: {length} tokens, more than data.max_length={settings.data.max_length}")
    return _Inspected(encoded, tokens, record.where, notes, image_tokens)


def _conversation(record: Record, pair: int, settings: Config | None) -> tuple[Record, str]:
    """Return the record that is one training sample, and which of the record's samples that is."""
    split = settings is not None and settings.data.split_turns
    pairs = conversations_of(record, compares_of(settings), split_turns=split)
    if record.rejected is not None and pair <= len(pairs):
        return pairs[pair - 1], f", {('chosen', 'rejected')[pair - 1]} answer (--pair {pair})"
    if pair > len(pairs):
        hint = "" if split else " (data.split_turns is off, so a record is one sample)"
        raise ConfigError(
            f"there is no pair {pair}: {len(pairs)}{hint}", where=record.where, remedy=f"Give --pair 1 to {len(pairs)}."
        )
    return pairs[pair - 1], f", pair {pair} of {len(pairs)}" if split else ""


def _pictures(record: Record) -> list[str]:
    from mmit.records import short

    lines = []
    for number, image in enumerate(record.images, 1):
        name = "inside the record"
        if isinstance(image.source, str):
            # A path is needed in full only to find out why nothing is there.
            name = short(image.source, 60) if Path(image.source).is_file() else f"{image.source} (no such file)"
        lines.append(f"image {number}: {name}")
    return lines


def _print(shown: _Inspected, console: Any = None) -> None:
    from rich.text import Text

    from mmit.data.viewer import to_rich

    console = console or terminal(highlight=False)
    for note in shown.notes:
        console.print(Text(plain(note), "bold red" if note.startswith("training refuses") else "bold"))
    console.print(to_rich(shown.encoded, shown.tokenizer, image_tokens=shown.image_tokens))


def _write_html(shown: _Inspected, path: Path) -> None:
    from mmit.data.viewer import to_html

    page = to_html(shown.encoded, shown.tokenizer, title=shown.title, image_tokens=shown.image_tokens)
    _write(page, path)


def _write_svg(shown: _Inspected, path: Path) -> None:
    import io

    console = terminal(record=True, width=SVG_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    _print(shown, console)
    _write(console.export_svg(title=f"mmit inspect {shown.title}"), path)


def _write(text: str, path: Path) -> None:
    write_atomic(path, text)
    echo(f"written to {path}")
