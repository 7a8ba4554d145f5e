"""`mmit data show`: some records of a data set, drawn at random, in the terminal or as a page of HTML."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli import sources
from mmit.cli.sources import (
    ChatOption,
    ConfigOption,
    FormatOption,
    ImageRootOption,
    ImageTokensOption,
    RecordEncoder,
    TokenizerOption,
)
from mmit.errors import MmitError, RecordError
from mmit.io import write_atomic
from mmit.text import echo, terminal

if TYPE_CHECKING:
    from mmit.data.show import SampledRow
    from mmit.records import Record


def show(
    data: Annotated[Path, typer.Argument(metavar="DATA_OR_CONFIG", help="A data file or shards, or a run's YAML.")],
    *,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many records.")] = 20,
    seed: Annotated[int, typer.Option(help="Decides which records are drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="The page to write. [default: show.html]")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print them here instead of writing a page.")] = False,
    format: FormatOption = None,
    image_root: ImageRootOption = None,
    config: ConfigOption = None,
    tokenizer: TokenizerOption = None,
    chat: ChatOption = None,
    image_token: sources.ImageTokenOption = None,
    image_tokens: ImageTokensOption = None,
) -> None:
    """Show records with their images and, given a tokenizer, the tokens that the loss is taken on."""

    from mmit.data.rows import sample_rows
    from mmit.data.show import to_page, to_terminal

    if text and out is not None:
        raise typer.BadParameter("--text prints, it writes no page", param_hint="--out")
    settings = sources.settings_of(data, config)
    files = sources.files_of(data, settings, format=format, image_root=image_root)
    given: dict[str, Any] = {"tokenizer": tokenizer, "chat": chat, "image_token": image_token}
    encoder = sources.encoder_of(settings, image_tokens=image_tokens, **given)
    drawn, total = sample_rows(chain.from_iterable(file.weighed() for file in files), n, seed=seed)
    if not total:
        raise MmitError("there is no row", where=str(data), remedy="Check the file and its format.")
    items = [_shown(number, row, encoder) for number, row in drawn]
    notes = [f"{len(items):,} of {total:,} records, drawn with seed {seed}"]
    if encoder is not None:
        named = tokenizer or (settings.model.llm.name if settings else "")
        per_image = f", {encoder.image_tokens} tokens per image" if encoder.image_tokens else ""
        notes.append(f"tokenizer {named}, chat format {encoder.chat.name}{per_image}")
    tokens, per = (None, None) if encoder is None else (encoder.tokenizer, encoder.image_tokens)
    if text:
        console = terminal(highlight=False)
        for line in (*notes, *to_terminal(items, tokenizer=tokens, image_tokens=per)):
            console.print(line)
        return
    page = to_page(items, title=str(data), notes=notes, tokenizer=tokens, image_tokens=per)
    _write(page, out or Path("show.html"))


def _shown(number: int, row: Record | RecordError, encoder: RecordEncoder | None) -> SampledRow:
    from mmit.data.show import SampledRow

    if isinstance(row, RecordError) or encoder is None:
        return SampledRow(number, row)
    try:
        samples = tuple(encoded for _, encoded in encoder.samples(row))
    except RecordError as error:
        return SampledRow(number, row, problem=f"training refuses it: {error.problem}. {error.remedy}")
    longest = encoder.length(row)
    if encoder.max_length is not None and longest > encoder.max_length:
        problem = f"training refuses it: {longest:,} tokens where {encoder.max_length:,} fit"
        return SampledRow(number, row, samples, problem)
    return SampledRow(number, row, samples)


def _write(page: str, path: Path) -> None:
    write_atomic(path, page)
    echo(f"written to {path} ({len(page) / 1e6:.1f} MB): open it in a browser")
