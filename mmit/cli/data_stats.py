"""`mmit data stats`: what is in a data set, as a table, as JSON and as pictures."""

from __future__ import annotations

import json
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
    TokenizerOption,
)
from mmit.errors import MmitError
from mmit.io import write_atomic
from mmit.text import echo, plain, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from mmit.data.stats import SourceStats, Stats

SHOWN = 20  # sources in the table; all of them are in the JSON


def stats(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA_OR_CONFIG...", help="Data files or shards, or a run's YAML.")
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write stats.json and the histograms (PNG).")
    ] = None,
    format: FormatOption = None,
    image_root: ImageRootOption = None,
    config: ConfigOption = None,
    tokenizer: TokenizerOption = None,
    chat: ChatOption = None,
    image_token: sources.ImageTokenOption = None,
    image_tokens: ImageTokensOption = None,
    sample: Annotated[
        int, typer.Option(min=2, help="Prompts compared with each other; takes time by its square.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Decides which prompts are compared.")] = 0,
) -> None:
    """Count records, lengths, image sizes, supervised tokens; measure how varied the prompts are."""

    from mmit.data.stats import collect

    if len(data) > 1 and any(map(sources.is_config, data)):
        raise typer.BadParameter("give data files, or one config")
    settings = sources.settings_of(data[0], config)
    files = [file for path in data for file in sources.files_of(path, settings, format=format, image_root=image_root)]
    given: dict[str, Any] = {"tokenizer": tokenizer, "chat": chat, "image_token": image_token}
    encoder = sources.encoder_of(settings, image_tokens=image_tokens, **given)
    with terminal(stderr=True).status("reading") as status:
        found = collect(
            sources.watched(chain.from_iterable(file.rows() for file in files), status.update),
            encode=None if encoder is None else lambda record: [e for _, e in encoder.samples(record)],
            image_tokens=None if encoder is None else encoder.image_tokens,
            sample=sample,
            seed=seed,
        )
    if not found.sources:
        named = ", ".join(map(str, data))
        raise MmitError(f"there is no record, and {found.bad} bad rows", where=named, remedy="See mmit data check.")
    show(found, terminal(highlight=False))
    if encoder is not None and encoder.image_tokens is None and found.whole.images:
        echo("an image counts as one token: --image-tokens was not given")
    if out is not None:
        _write(found, out)


def show(found: Stats, console: Console) -> None:
    """Print the table of sources and the rest in lines."""
    from rich.table import Table
    from rich.text import Text

    whole = found.whole
    table = Table("source", "records", "text only", "images", "prompt", "answer", header_style="bold")
    if whole.tokens:
        table.add_column("tokens")
        table.add_column("learned from")
    for column in table.columns[1:]:
        column.justify = "right"
    ordered = sorted(found.sources.items(), key=lambda item: -item[1].records)
    for name, source in ordered[:SHOWN]:
        table.add_row(Text(plain(name), overflow="fold"), *_row(source))
    if len(ordered) > SHOWN:
        table.add_row(f"{len(ordered) - SHOWN} more")
    if len(ordered) > 1:
        table.add_section()
        table.add_row("all", *_row(whole))
    console.print(table)
    told = "prompt, answer: median and 95 % quantile in characters; tokens: of a sample, likewise"
    console.print(Text(told, "dim"))
    for line in _lines(found):
        console.print(Text(plain(line)))


def _row(source: SourceStats) -> list[str]:
    cells = [f"{source.records:,}", f"{source.text_only:,}", f"{source.images:,}"]
    cells += [_spread(source.prompts), _spread(source.answers)]
    if source.tokens:
        share = source.supervised / max(source.text_tokens + source.image_tokens, 1)
        cells += [_spread(source.tokens), f"{share:.1%}"]
    return cells


def _spread(values: list[int]) -> str:
    from mmit.data.stats import summary

    found = summary(values)
    return f"{found['median']:,.0f} / {found['p95']:,.0f}" if found else "-"


def _lines(found: Stats) -> list[str]:
    data: dict[str, Any] = found.to_json()
    images, diversity, out = data["images"], data["diversity"], []
    whole = found.whole
    if compared := data["whole"].get("pairs"):
        lengths = f"chosen {_spread(whole.chosen)}, rejected {_spread(whole.rejected)}"
        longer, shorter = (compared[key] / len(whole.chosen) for key in ("chosen_longer", "chosen_shorter"))
        told = f"chosen longer in {longer:.0%}, shorter in {shorter:.0%}"
        out.append(f"{len(whole.chosen):,} pairs: {lengths}; {told}")
    if labels := data["whole"].get("labels"):
        out.append(f"labelled answers: {labels['good']:,} good, {labels['bad']:,} bad")
    if images["width"]:
        sides = [
            f"{images[side]['median']:,.0f} ({images[side]['min']:,.0f} to {images[side]['max']:,.0f})"
            for side in ("width", "height")
        ]
        out.append(f"{images['different']:,} different images: width {sides[0]}, height {sides[1]}")
    if images["unreadable"]:
        out.append(f"images that cannot be read: {images['unreadable']:,}; see mmit data check --images")
    if found.bad:
        out.append(f"bad rows, not counted above: {found.bad:,}; see mmit data check")
    if found.not_encoded:
        out.append(f"records that cannot be encoded: {found.not_encoded:,}; see mmit data check")
    out.append("licences: " + ", ".join(f"{name} {count:,}" for name, count in found.licences.most_common(5)))
    pairs = f"{diversity['different_pairs']:,} pairs of first word and object in {diversity['prompts']:,} prompts"
    if common := ", ".join(f"{root} {count:,}" for root, count, _ in found.top_roots()[:8]):
        out.append(f"{pairs} (heuristic); commonest: {common}")
    if nearest := diversity["rouge_l_nearest"]:
        out.append(
            f"ROUGE-L with the nearest of {diversity['rouge_l_sample']:,} prompts: median {nearest['median']:.2f}, "
            f"{diversity['rouge_l_share_above_0.7']:.0%} above 0.7"
        )
    return out


def _write(found: Stats, folder: Path) -> None:
    from mmit.data.stats_plots import plot

    pictures = plot(found, folder)
    write_atomic(folder / "stats.json", json.dumps(found.to_json(), ensure_ascii=False, indent=1) + "\n")
    echo(f"written to {folder}: stats.json, {', '.join(path.name for path in pictures)}")
