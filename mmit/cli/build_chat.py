"""`mmit build self-chat`: conversations that a teacher plays with itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.cli.build_config import read_config
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
from mmit.errors import ConfigError, RecordError, nearest

if TYPE_CHECKING:
    from mmit.build.annotated import Dropped
    from mmit.build.self_chat import Topic

STYLES = ("turns", "transcript")


def self_chat(
    config: Config,
    *,
    out: Out,
    limit: Limit = None,
    dry_run: DryRun = False,
    lenient: Lenient = False,
    executor: Executor = "local",
    workers: Workers = 0,
) -> None:
    """Let a teacher play both sides of conversations about topics, with images or without."""
    from mmit.build.self_chat import self_chat as stage
    from mmit.build.self_chat import transcript_request, user_request
    from mmit.build.session import SHARED, draw_of

    settings = read_config(config, (*SHARED, "rows", "topic", "style", "rounds"))
    style, rounds = settings.get("style", "turns"), settings.get("rounds", 3)
    if style not in STYLES:
        raise ConfigError(f"unknown style '{style}'", where=f"{config}: style", remedy=nearest(str(style), STYLES))
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 20:
        raise ConfigError(f"is {rounds!r}", where=f"{config}: rounds", remedy="Give a whole number from 1 to 20.")
    draw = draw_of(settings, temperature=0.7, max_tokens=512 if style == "turns" else 1024)
    draw = type(draw)(**(vars(draw) | {"seed": settings.get("seed", 0)}))
    topics, dropped = _topics(settings, config, limit)
    if dry_run:
        first = [user_request(t, (), draw) if style == "turns" else transcript_request(t, draw, rounds) for t in topics]
        show_forecast(first * (2 * rounds if style == "turns" else 1), settings, config)
        return
    with opened(settings, out, config, lenient=lenient, executor=executor, workers=workers) as desk:

        def made() -> Any:
            yield from dropped
            yield from stage(topics, desk, draw, style=style, rounds=rounds)

        finish(made(), desk, out, settings, config)


def _topics(settings: Any, config: Path, limit: int | None) -> tuple[list[Topic], list[Dropped]]:
    from mmit.build.annotated import Dropped
    from mmit.build.rows import open_rows
    from mmit.build.self_chat import TASK, Topic
    from mmit.records import Image

    described = dict(settings.get("rows") or {})
    rows, licence, source = open_rows(described, folder=str(config.parent), limit=limit)
    name = settings.get("topic", "topic")
    topics: list[Topic] = []
    dropped: list[Dropped] = []
    for number, row in rows:
        if isinstance(row, RecordError):
            dropped.append(Dropped(TASK, f"{source}:{number}", "", "the row cannot be read", row.problem))
            continue
        if not topics and not dropped and name not in row:
            raise ConfigError(f"the rows have no field '{name}'", where="topic", remedy=nearest(name, map(str, row)))
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            dropped.append(Dropped(TASK, f"{source}:{number}", "", "the topic is no text", repr(text)[:200]))
            continue
        images = tuple(part for part in row.values() if isinstance(part, Image))
        topics.append(Topic(str(row.get("id", number)), text.strip(), images, source, number, licence))
    return topics, dropped
