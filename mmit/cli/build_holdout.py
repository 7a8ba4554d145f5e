"""`mmit build holdout`: hold clusters of tasks out of records that are there, and refuse what leaks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.build_config import read_config
from mmit.errors import ConfigError, nearest
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.records import Record

KEYS = tuple("base records holdout check leaks cap allow_licences seed".split())
INNER = {"holdout": ("clusters", "tasks", "images")}
LEAKS = ("refuse", "drop")
_SHOWN = 10


def holdout(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the hold-out.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look for leaks and write nothing.")] = False,
) -> None:
    """Hold clusters of tasks out of records, and refuse leaks; ends with 1 where there are some."""
    from mmit.build.holdout import CHECKS, Plan, held_out
    from mmit.build.write import Stated, write_build
    from mmit.records import read_jsonl

    settings = read_config(config, KEYS, INNER)
    leaks = settings.get("leaks", "refuse")
    if leaks not in LEAKS:
        raise ConfigError(f"is '{leaks}'", where=f"{config}: leaks", remedy=nearest(str(leaks), LEAKS))
    files = _files(settings.get("records"), config)
    named = settings.get("holdout") or {}
    plan = Plan(
        clusters=_names(named.get("clusters"), "clusters", config),
        tasks=_names(named.get("tasks"), "tasks", config),
        images=named.get("images"),
        check=_names(settings.get("check", list(CHECKS)), "check", config),
        seed=settings.get("seed", 0),
    )

    def opened() -> Iterator[Record]:
        return chain.from_iterable(read_jsonl(file) for file in files)

    made, found = held_out(opened, plan, drop_leaks=leaks == "drop")
    for leak in found[:_SHOWN]:
        echo(f"leak ({leak.kind}): {leak.train} gives {leak.held_out} away: {leak.what}", err=True)
    if found:
        kinds = ", ".join(f"{sum(leak.kind == kind for leak in found):,} by {kind}" for kind in plan.check)
        echo(f"{len(found):,} leaks: {kinds}. Set leaks: drop, or holdout.images, to leave them out.", err=True)
        raise typer.Exit(1)
    if dry_run:
        echo("no leaks")
        return
    counts = write_build(
        made,
        out,
        Stated(settings, {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}),
        base=config.parent / settings["base"] if settings.get("base") else None,
        cap=settings.get("cap"),
        allow_licences=settings.get("allow_licences"),
    )
    for task, number in sorted(counts.accepted.items()):
        echo(f"{task}: {number:,} records{', held out' if task in counts.held_out else ''}")
    for reason, number in counts.dropped.most_common(5):
        echo(f"dropped {number:,}: {reason}")
    echo(f"wrote {out}/mixture.yaml ({counts.summary})")


def _files(named: Any, config: Path) -> list[Path]:
    """The JSONL files of a config's `records`: files, and folders of builds. Raises ConfigError."""
    files: list[Path] = []
    for name in _names([named] if isinstance(named, str) else named, "records", config):
        path = config.parent / name
        inside = [*sorted(path.glob("records/*.jsonl")), *sorted(path.glob("held_out/*.jsonl"))]
        if path.is_dir() and not inside:
            problem = "the folder holds no records/*.jsonl"
            raise ConfigError(problem, where=str(path), remedy="Name the --out of a build, or JSONL files.")
        if not path.exists():
            remedy = "Check records; it starts at the config's folder."
            raise ConfigError("no such file or folder", where=str(path), remedy=remedy)
        files += inside if path.is_dir() else [path]
    if not files:
        raise ConfigError("'records' is missing", where=str(config), remedy="Name folders of builds, or JSONL files.")
    return files


def _names(value: Any, key: str, config: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"'{key}' is no list of names", where=str(config), remedy=f"Write {key}: [a, b].")
    return tuple(value)
