"""`mmit build` commands that ask teachers: outputs for instructions, and what a build's folder holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.build_config import check_keys, read_config
from mmit.errors import ConfigError
from mmit.text import echo, terminal

if TYPE_CHECKING:
    from mmit.build.write import Counts
    from mmit.teachers import Desk, Request

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the build.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write; a stopped build goes on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only the first so many rows.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the number of requests, tokens and the price.")]
Executor = Annotated[str, typer.Option(help="Who works: local, ray (this machine's cores) or ray:ADDRESS.")]
Workers = Annotated[int, typer.Option(min=0, help="Actors of --executor ray; 0 for one a core.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Drop and count requests that a replayed journal lacks.")]


@dataclass(frozen=True, slots=True)
class Build:
    """What a command that asks teachers is given."""

    config: Path
    out: Path
    limit: int | None
    dry_run: bool
    lenient: bool
    executor: str
    workers: int


def command(stage: Callable[[Build], None], *, limited: bool = True) -> Callable[..., None]:
    """Return the command of a stage: its docstring is the help, its options those of all stages.

    Args:
        stage: runs the build.
        limited: False for a stage that reads no rows, and so has no --limit.
    """

    def run(
        config: Config,
        *,
        out: Out,
        limit: Limit = None,
        dry_run: DryRun = False,
        lenient: Lenient = False,
        executor: Executor = "local",
        workers: Workers = 0,
    ) -> None:
        stage(Build(config, out, limit, dry_run, lenient, executor, workers))

    run.__name__, run.__doc__ = stage.__name__, stage.__doc__
    if not limited:  # typer makes its options of the signature
        signature = inspect.signature(run, eval_str=True)
        kept = [parameter for name, parameter in signature.parameters.items() if name != "limit"]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return run


def add_to(app: typer.Typer) -> None:
    """Add the commands to `mmit build`."""
    app.command("outputs")(command(outputs))
    app.command("status")(status)


def outputs(build: Build) -> None:
    """Let teachers write outputs for given instructions."""
    from mmit.build.annotated import Dropped
    from mmit.build.outputs import from_records, from_rows, requests
    from mmit.build.outputs import outputs as stage
    from mmit.build.rows import open_rows
    from mmit.build.session import SHARED, draw_of

    settings = read_config(build.config, (*SHARED, "rows", "records", "fields", "system"))
    if bool(settings.get("rows")) == bool(settings.get("records")):
        raise ConfigError(
            "give exactly one of rows and records", where=str(build.config), remedy="Name the instructions."
        )
    if settings.get("records"):
        items = from_records(str(build.config.parent / settings["records"]))
    else:
        described = dict(settings["rows"])
        fields = settings.get("fields") or {}
        check_keys(fields, ("instruction", "input"), "fields")
        rows, licence, source = open_rows(described, folder=str(build.config.parent), limit=build.limit)
        items = from_rows(rows, fields, source=source, licence=licence)
    if build.limit is not None:
        from itertools import islice

        items = islice(items, build.limit)
    draw = draw_of(settings)
    seed, system = settings.get("seed", 0), settings.get("system") or ""
    every = settings.get("choose", "all") == "all"
    if build.dry_run:
        asked = requests([item for item in items if not isinstance(item, Dropped)], draw, seed=seed, system=system)
        show_forecast(asked, settings, build.config, every=every)
        return
    with opened(build, settings) as desk:
        made = stage(items, desk, draw, seed=seed, system=system, all_teachers=every)
        finish(made, desk, build, settings)


def status(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a build.")]) -> None:
    """Show what a build has done: accepted, dropped by reason, tokens and cost by teacher."""
    from mmit.build.session import status as read_status

    found = read_status(folder)
    echo(f"{folder}: {'finished' if found['finished'] else 'not finished; the same command goes on'}")
    for task, number in sorted(found.get("accepted", {}).items()):
        echo(f"  {task}: {number:,} records")
    for reason, number in sorted(found.get("dropped", {}).items(), key=lambda item: -item[1]):
        echo(f"  dropped {number:,}: {reason}")
    for teacher, purposes in found["ledger"].items():
        for purpose, account in purposes.items():
            echo(f"  {teacher}, {purpose}: {account_line(account)}")


def account_line(account: Mapping[str, Any]) -> str:
    """Return an account of the ledger in words."""
    line = f"{account['requests']:,} requests in {account['attempts']:,} attempts, "
    line += f"{account['prompt_tokens']:,} + {account['new_tokens']:,} tokens"
    if account["unstated"]:
        line += f" ({account['unstated']:,} replies state none)"
    return line + (f", cost {account['cost']:.4f}" if account["cost"] else "")


@contextmanager
def opened(build: Build, settings: Mapping[str, Any]) -> Iterator[Desk]:
    """Open the desk of a build with a bar of its replies."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmit.build.session import session

    columns = (TextColumn("replies"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = terminal(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=None)

        def progress(count: int, total: int) -> None:
            bar.update(shown, completed=count, total=total)
            if not console.is_terminal and count % 100 == 0:
                echo(f"{count:,} replies", err=True)

        options: dict[str, Any] = {"lenient": build.lenient, "executor": build.executor, "workers": build.workers}
        with session(settings, build.out, folder=str(build.config.parent), progress=progress, **options) as desk:
            if desk.journal.entries:
                echo(f"{build.out}: going on, {len(desk.journal.entries):,} replies are there already")
            try:
                yield desk
            except KeyboardInterrupt:
                echo(
                    f"{build.out}: stopped with {len(desk.journal.entries):,} replies; the same command goes on",
                    err=True,
                )
                raise


def finish(
    made: Any,
    desk: Desk,
    build: Build,
    settings: Mapping[str, Any],
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> Counts:
    """Write the folder of a build and say what is in it.

    Args:
        made: the records, in their order.
        desk: that the teachers were asked through.
        build: where it is written, and its config.
        settings: of that config.
        facts: further lines to say and to keep, asked for once the records are written.

    Returns:
        what the folder holds.
    """
    from mmit.build.session import thought_facts, write_session

    counts = write_session(made, desk, build.out, settings, folder=build.config.parent, facts=facts)
    show_counts(counts)
    if held := thought_facts(desk).get("thoughts"):
        echo(f"{held['replies']:,} replies held thoughts, {'kept' if held['kept'] else 'left out'}")
    if desk.unrecorded:
        echo(f"{len(desk.unrecorded):,} requests are not in the replayed journal")
    for key, value in facts().items():
        echo(f"{key}: {value}")
    echo(f"wrote {build.out}/mixture.yaml ({counts.summary}, {desk.fetched:,} requests)")
    return counts


def show_counts(counts: Counts) -> None:
    """Print the records by task and what was dropped by reason."""
    for task, number in sorted(counts.accepted.items()):
        echo(f"{task}: {number:,} records")
    for reason, number in counts.dropped.most_common(8):
        echo(f"dropped {number:,}: {reason}")


def show_forecast(asked: list[Request], settings: Mapping[str, Any], config: Path, *, every: bool = False) -> None:
    """Print what the requests would take.

    Args:
        asked: the requests.
        settings: of the config, whose section teacher says who is asked and at which price.
        config: its file, which relative paths start beside.
        every: each teacher is asked all of them.
    """
    from mmit.build.session import forecast
    from mmit.teachers import open_teachers

    teachers = open_teachers(settings.get("teacher"), folder=str(config.parent)) if asked else []
    found = forecast(asked * (len(teachers) if every else 1), teachers)
    price = "no price given" if found["cost"] is None else f"at most {found['cost']:.4f}"
    echo(
        f"{found['requests']:,} requests with {found['images']:,} images, about {found['prompt_tokens']:,} prompt "
        f"tokens without images, at most {found['new_tokens']:,} new tokens; {price}"
    )
