"""`mmit build conversations`: texts about images from their captions and boxes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.cli.build_config import check_keys, read_config
from mmit.cli.build_teachers import (
    Config,
    DryRun,
    Executor,
    Lenient,
    Limit,
    Out,
    Workers,
    finish,
    opened,
    show_forecast,
)
from mmit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mmit.build.annotated import Dropped
    from mmit.build.scenes import Scene


def conversations(
    config: Config,
    *,
    out: Out,
    limit: Limit = None,
    dry_run: DryRun = False,
    lenient: Lenient = False,
    executor: Executor = "local",
    workers: Workers = 0,
) -> None:
    """Let a teacher write conversations, descriptions and reasoning about images from their captions and boxes."""
    from mmit.build.conversations import KINDS, requests
    from mmit.build.conversations import conversations as stage
    from mmit.build.facts import FactCheck
    from mmit.build.scenes import Scene
    from mmit.build.session import SHARED, draw_of

    settings = read_config(config, (*SHARED, "rows", "records", "fields", "kinds", "rounds", "facts"))
    kinds, rounds = settings.get("kinds", list(KINDS)), settings.get("rounds", 3)
    if not isinstance(kinds, list) or not kinds or len(set(map(str, kinds))) < len(kinds):
        raise ConfigError(f"is {kinds!r}", where=f"{config}: kinds", remedy=f"Write kinds: [{', '.join(KINDS)}]")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind '{kind}'", where=f"{config}: kinds", remedy=nearest(str(kind), KINDS))
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 20:
        raise ConfigError(f"is {rounds!r}", where=f"{config}: rounds", remedy="Give a whole number from 1 to 20.")
    facts = settings.get("facts") or []
    if not isinstance(facts, list) or not all(isinstance(name, str) for name in facts):
        raise ConfigError(f"is {facts!r}", where=f"{config}: facts", remedy="List fields: facts: [colour, shape]")
    items = _scenes(settings, config, limit, facts)
    usable = [item for item in items if isinstance(item, Scene)]
    draw = draw_of(settings, temperature=0.7, max_tokens=1024)
    options: dict[str, Any] = {"kinds": kinds, "rounds": rounds, "seed": settings.get("seed", 0)}
    if dry_run:
        show_forecast(requests(usable, draw, **options), settings, config)
        return
    check = FactCheck(scene.facts for scene in usable) if facts else None
    with opened(settings, out, config, lenient=lenient, executor=executor, workers=workers) as desk:
        made = stage(items, desk, draw, check=check, **options)
        finish(made, desk, out, settings, config, (lambda: {"facts": check.report()}) if check else dict)


def _scenes(settings: Any, config: Path, limit: int | None, facts: list[str]) -> list[Scene | Dropped]:
    from itertools import islice

    from mmit.build.rows import open_rows
    from mmit.build.scenes import FIELDS, scenes_of_records, scenes_of_rows

    if bool(settings.get("rows")) == bool(settings.get("records")):
        raise ConfigError("give exactly one of rows and records", where=str(config), remedy="Name the images.")
    if settings.get("records"):
        return list(islice(scenes_of_records(str(config.parent / settings["records"]), facts=facts), limit))
    fields = settings.get("fields") or {}
    check_keys(fields, tuple(FIELDS), f"{config}: fields")
    described = dict(settings["rows"])
    if not described.get("package"):
        described.setdefault("images", [fields.get("image", FIELDS["image"])])
    rows, licence, source = open_rows(described, folder=str(config.parent), limit=limit)
    return list(scenes_of_rows(rows, fields, source=source, licence=licence, facts=facts))
