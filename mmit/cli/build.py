"""`mmit build`: instruction data from annotated sets by templates; and what is in a bank of templates."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli import build_conversations, build_grow, build_holdout, build_select, build_teachers
from mmit.cli.build_config import read_config
from mmit.errors import ConfigError
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.templates import Bank

app = typer.Typer(help="Build instruction data: annotated sets by templates, and teachers.", no_args_is_help=True)
templates_app = typer.Typer(help="Look at a bank of templates.", no_args_is_help=True)
app.add_typer(templates_app, name="templates")
build_teachers.add_to(app)
app.command("self-instruct")(build_teachers.command(build_grow.self_instruct, limited=False))
app.command("self-chat")(build_teachers.command(build_conversations.self_chat))
app.command("holdout")(build_holdout.holdout)
app.command("conversations")(build_teachers.command(build_conversations.conversations))
app.command("select")(build_teachers.command(build_select.select))

BankArgument = Annotated[str, typer.Argument(metavar="BANK", help="A file, promptsource:FILE or flan:FILE#KEY.")]
KEYS = tuple(
    "base rows bank templates inversion options shots shot_answers boxes cap holdout allow_licences seed".split()
)
INNER = {
    "templates": ("split", "per_row", "count"),
    "options": ("share", "styles", "answer"),
    "holdout": ("clusters", "images"),
}


@app.command("annotated")
def annotated(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the build.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first so many rows.")] = None,
    executor: build_teachers.Executor = "local",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that render; 0: none besides this one, on Ray one a core.")
    ] = 0,
    allow_licence: Annotated[
        list[str] | None, typer.Option(metavar="SPDX", help="A licence that is allowed beside allow_licences.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show some records and write nothing.")] = False,
) -> None:
    """Turn annotated rows into instruction records by templates."""
    from mmit.build.annotated import Made, checked, renderer
    from mmit.build.executor import Lines, cluster_of, run
    from mmit.build.licences import check_stated
    from mmit.build.rows import open_rows
    from mmit.build.write import Stated, write_build
    from mmit.templates import open_banks

    settings = read_config(config, KEYS, INNER)
    if allow_licence:
        settings["allow_licences"] = [*(settings.get("allow_licences") or ()), *allow_licence]
    folder = config.parent
    banks = open_banks(settings.get("bank"), folder)
    described = dict(settings.get("rows") or {})
    opened = partial(open_rows, described, folder=str(folder), limit=limit)
    _, licence, source = opened()
    recipe = _recipe(settings)
    stage = renderer(lambda: opened()[0], banks, recipe, source=source, licence=licence)
    rows = _counted(checked(opened()[0], banks))
    if dry_run:
        made = (item for row in rows for item in stage([row]) if isinstance(item, Made))
        for item in islice(made, 5):
            user, answer = item.record.turns
            echo(f"[{item.task}] {user.text!r} -> {answer.text!r}")
        return
    stated = {f"rows ({source})": licence, **{bank.where: bank.licence for bank in banks}}
    check_stated(stated, settings.get("allow_licences"))
    counts = write_build(
        run(Lines(stage, out), rows, workers=workers, cluster=cluster_of(executor)),
        out,
        Stated(settings, {bank.where: _digest(bank) for bank in banks}),
        base=folder / settings["base"] if settings.get("base") else None,
        cap=settings.get("cap"),
        allow_licences=settings.get("allow_licences"),
    )
    for task, number in sorted(counts.accepted.items()):
        note = ", held out" if task in counts.held_out else ""
        echo(f"{task}: {number:,} records, {len(counts.templates[task])} templates{note}")
    for reason, number in counts.dropped.most_common(5):
        echo(f"dropped {number:,}: {reason}")
    echo(f"wrote {out}/mixture.yaml ({counts.summary})")


def _counted(rows: Iterator[Any]) -> Iterator[Any]:
    """Say how far a long build is."""
    for count, row in enumerate(rows, 1):
        if count % 100_000 == 0:
            echo(f"{count:,} rows", err=True)
        yield row


@templates_app.command("check")
def check(bank: BankArgument) -> None:
    """Check a bank: ids, fields, wordings, separators; every template compiles."""
    from mmit.templates import open_banks

    for opened in open_banks(bank, Path()):
        splits = {split: sum(t.split == split for t in opened.templates) for split in ("train", "held_out")}
        turned = sum(t.inverted for t in opened.templates)
        echo(f"{opened.task}: {splits['train']} for training, {splits['held_out']} held out, {turned} inverted")
        for name, reason in opened.skipped.items():
            echo(f"  not read: {name} ({reason})")


@templates_app.command("show")
def show(
    bank: BankArgument,
    *,
    row: Annotated[str, typer.Option(metavar="FILE#N", help="The row of a table, JSON or Parquet file to render.")],
    image: Annotated[list[str] | None, typer.Option(metavar="FIELD", help="A field that holds images.")] = None,
    seed: Annotated[int, typer.Option(help="Decides what a template draws.")] = 0,
) -> None:
    """Render one row with every template of a bank."""
    from mmit.build.rows import open_rows
    from mmit.errors import RecordError
    from mmit.records import Text
    from mmit.templates import open_banks, render

    path, _, number = row.partition("#")
    rows, _, source = open_rows({"path": path, "images": image or []})
    found = next((fields for at, fields in rows if at == int(number or 1)), None)
    if found is None or isinstance(found, RecordError):
        raise found or ConfigError(f"there is no row {number}", where=source, remedy="Count rows from 1.")
    for opened in open_banks(bank, Path()):
        for template in opened.templates:
            out = render(template, found, rng=random.Random(seed), row=row)
            asked = "".join(part.text if isinstance(part, Text) else "[image]" for part in out.parts)
            echo(f"--- {opened.task}/{template.id}\n{asked}\n=> {out.target}")


def _recipe(settings: Mapping[str, Any]) -> Any:
    from mmit.build.annotated import Recipe
    from mmit.templates.options import OptionStyle

    wordings, options = settings.get("templates") or {}, settings.get("options") or {}
    aside = settings.get("holdout") or {}
    return Recipe(
        seed=settings.get("seed", 0),
        split=wordings.get("split", "train"),
        per_row=wordings.get("per_row", 1),
        count=wordings.get("count"),
        inversion=settings.get("inversion", 0.0),
        options=OptionStyle(
            options.get("share", 0.0), tuple(options.get("styles") or ("dashes",)), options.get("answer", "text")
        ),
        shots=settings.get("shots") or {0: 1.0},
        shot_answers=settings.get("shot_answers", "right"),
        boxes=settings.get("boxes"),
        held_out=tuple(aside.get("clusters") or ()),
        set_aside=aside.get("images", 0.1),
    )


def _digest(bank: Bank) -> str:
    return hashlib.sha256("".join(template.digest for template in bank.templates).encode()).hexdigest()[:16]
