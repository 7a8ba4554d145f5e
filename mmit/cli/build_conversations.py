"""`mmit build self-chat` and `mmit build conversations`: talks that teachers play with themselves or write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.cli.build_config import check_keys, read_config
from mmit.cli.build_teachers import Build, finish, opened, show_forecast
from mmit.errors import ConfigError, RecordError, nearest

if TYPE_CHECKING:
    from mmit.build.annotated import Dropped
    from mmit.build.scenes import Scene
    from mmit.build.self_chat import Topic

STYLES = ("turns", "transcript")


def self_chat(build: Build) -> None:
    """Let a teacher play both sides of conversations about topics, with images or without."""
    from mmit.build.self_chat import self_chat as stage
    from mmit.build.self_chat import transcript_request, user_request
    from mmit.build.session import SHARED, draw_of

    settings = read_config(build.config, (*SHARED, "rows", "topic", "style", "rounds"))
    style, rounds = settings.get("style", "turns"), settings.get("rounds", 3)
    if style not in STYLES:
        raise ConfigError(
            f"unknown style '{style}'", where=f"{build.config}: style", remedy=nearest(str(style), STYLES)
        )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 20:
        raise ConfigError(f"is {rounds!r}", where=f"{build.config}: rounds", remedy="Give a whole number from 1 to 20.")
    draw = draw_of(settings, temperature=0.7, max_tokens=512 if style == "turns" else 1024)
    draw = type(draw)(**(vars(draw) | {"seed": settings.get("seed", 0)}))
    topics, dropped = _topics(settings, build.config, build.limit)
    if build.dry_run:
        first = [user_request(t, (), draw) if style == "turns" else transcript_request(t, draw, rounds) for t in topics]
        show_forecast(first * (2 * rounds if style == "turns" else 1), settings, build.config)
        return
    with opened(build, settings) as desk:

        def made() -> Any:
            yield from dropped
            yield from stage(topics, desk, draw, style=style, rounds=rounds)

        finish(made(), desk, build, settings)


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


def conversations(build: Build) -> None:
    """Let a teacher write conversations, descriptions and reasoning about images from their captions and boxes."""
    from mmit.build.conversations import KINDS, requests
    from mmit.build.conversations import conversations as stage
    from mmit.build.facts import FactCheck
    from mmit.build.scenes import Scene
    from mmit.build.session import SHARED, draw_of

    settings = read_config(build.config, (*SHARED, "rows", "records", "fields", "kinds", "rounds", "facts"))
    kinds, rounds = settings.get("kinds", list(KINDS)), settings.get("rounds", 3)
    if not isinstance(kinds, list) or not kinds or len(set(map(str, kinds))) < len(kinds):
        raise ConfigError(f"is {kinds!r}", where=f"{build.config}: kinds", remedy=f"Write kinds: [{', '.join(KINDS)}]")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"unknown kind '{kind}'", where=f"{build.config}: kinds", remedy=nearest(str(kind), KINDS)
            )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 20:
        raise ConfigError(f"is {rounds!r}", where=f"{build.config}: rounds", remedy="Give a whole number from 1 to 20.")
    facts = settings.get("facts") or []
    if not isinstance(facts, list) or not all(isinstance(name, str) for name in facts):
        raise ConfigError(f"is {facts!r}", where=f"{build.config}: facts", remedy="List fields: facts: [colour, shape]")
    items = _scenes(settings, build.config, build.limit, facts)
    usable = [item for item in items if isinstance(item, Scene)]
    draw = draw_of(settings, temperature=0.7, max_tokens=1024)
    options: dict[str, Any] = {"kinds": kinds, "rounds": rounds, "seed": settings.get("seed", 0)}
    if build.dry_run:
        show_forecast(requests(usable, draw, **options), settings, build.config)
        return
    check = FactCheck(scene.facts for scene in usable) if facts else None
    with opened(build, settings) as desk:
        made = stage(items, desk, draw, check=check, **options)
        finish(made, desk, build, settings, (lambda: {"facts": check.report()}) if check else dict)


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
