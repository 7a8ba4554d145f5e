"""`mmit build select`: the best records by a judge's score or a model's loss, unlike each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.cli.build_config import read_config
from mmit.cli.build_teachers import Build, finish, opened, show_counts, show_forecast
from mmit.errors import ConfigError, nearest
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.build.annotated import Dropped
    from mmit.build.select import Keep, Scored
    from mmit.build.write import Counts
    from mmit.records import Record
    from mmit.teachers import Desk, Draw, Request

KEYS = ("records", "licence", "score", "keep", "diversity", "control")
INNER = {
    "score": ("by", "scale"),
    "keep": ("least", "most", "share", "number", "order"),
    "diversity": ("rouge_l", "near_duplicates"),
}
BY = ("judge", "loss", "none")
ORDERS = ("highest", "lowest")


def select(build: Build) -> None:
    """Keep the best records by a judge's score or a model's loss, unlike each other; a random control beside them."""
    from mmit.build.select import select as chosen
    from mmit.build.session import SHARED, draw_of

    settings = read_config(build.config, (*SHARED, *KEYS), INNER)
    by, scale = _score(settings, str(build.config))
    keep = _keep(settings, highest=by != "loss")
    control = settings.get("control", False)
    if not isinstance(control, bool):
        raise ConfigError(f"is {control!r}", where=f"{build.config}: control", remedy="Write true or false.")
    records, dropped = _records(settings, build.config, build.limit)
    draw = draw_of(settings, max_tokens=16)
    if build.dry_run:
        show_forecast(_requests(records, by, draw, scale), settings, build.config)
        return
    if by == "none":
        counts, scored = _unscored(settings, build.config, build.out, dropped, records, keep)
    else:
        with opened(build, settings) as desk:
            scored = _scored(records, desk, by, draw, scale)
            counts = finish([*dropped, *chosen(scored, keep)], desk, build, settings)
    if control:
        _write_control(settings, build.config, build.out, scored, sum(counts.accepted.values()))


def _unscored(
    settings: Mapping[str, Any], config: Path, out: Path, dropped: list[Dropped], records: list[Record], keep: Keep
) -> tuple[Counts, list[Scored]]:
    """Select by diversity alone, without a teacher."""
    from mmit.build.select import Scored
    from mmit.build.select import select as chosen
    from mmit.build.write import Stated, write_build

    scored = [Scored(record) for record in records]
    made = [*dropped, *chosen(scored, keep)]
    counts = write_build(made, out, Stated(settings), **_writing(settings, config))
    show_counts(counts)
    echo(f"wrote {out}/mixture.yaml ({counts.summary})")
    return counts, scored


def _write_control(settings: Mapping[str, Any], config: Path, out: Path, scored: list[Scored], count: int) -> None:
    """Write a random choice of the same size into a folder of its own."""
    from mmit.build.select import control
    from mmit.build.write import Stated, write_build

    folder = out / "control"
    folder.mkdir(exist_ok=True)
    made = control(scored, count, seed=settings.get("seed", 0))
    counts = write_build(made, folder, Stated(settings), resumed=True, **_writing(settings, config))
    echo(f"wrote {folder}/mixture.yaml ({counts.summary}, drawn at random)")


def _writing(settings: Mapping[str, Any], config: Path) -> dict[str, Any]:
    base = config.parent / settings["base"] if settings.get("base") else None
    return {"base": base, "cap": settings.get("cap"), "allow_licences": settings.get("allow_licences")}


def _scored(records: list[Record], desk: Desk, by: str, draw: Draw, scale: tuple[float, float]) -> list[Scored]:
    from mmit.build.select import judged, losses

    return losses(records, desk) if by == "loss" else judged(records, desk, draw, scale)


def _requests(records: list[Record], by: str, draw: Draw, scale: tuple[float, float]) -> list[Request]:
    from mmit.build.select import judge_request, loss_requests

    if by == "none":
        return []
    if by == "loss":
        return [request for record in records for request in loss_requests(record)]
    return [judge_request(record, draw, scale) for record in records]


def _score(settings: Mapping[str, Any], where: str) -> tuple[str, tuple[float, float]]:
    score = settings.get("score") or {}
    by, scale = score.get("by", "judge"), score.get("scale", [1, 5])
    if by not in BY:
        raise ConfigError(f"unknown score '{by}'", where=f"{where}: score.by", remedy=nearest(str(by), BY))
    if by == "none" and settings.get("teacher"):
        remedy = "Leave teacher out, or name what it does: score: {by: judge}"
        raise ConfigError("a teacher, but no score", where=f"{where}: score.by", remedy=remedy)
    numbers = isinstance(scale, Sequence) and all(isinstance(n, (int, float)) for n in scale)
    if not numbers or len(scale) != 2 or not scale[0] < scale[1]:
        raise ConfigError(f"is {scale!r}", where=f"{where}: score.scale", remedy="Write scale: [1, 5]")
    return by, (scale[0], scale[1])


def _keep(settings: Mapping[str, Any], *, highest: bool) -> Keep:
    from mmit.build.select import Keep

    given, unlike = dict(settings.get("keep") or {}), dict(settings.get("diversity") or {})
    for name, value in [*given.items(), *unlike.items()]:
        flag = name in ("order", "near_duplicates")
        if not flag and (isinstance(value, bool) or not isinstance(value, int if name == "number" else (int, float))):
            raise ConfigError(f"{name} is {value!r}", where="keep", remedy="Give a number.")
    if not isinstance(unlike.get("near_duplicates", False), bool):
        raise ConfigError("is no truth value", where="diversity.near_duplicates", remedy="Write true or false.")
    order = given.pop("order", "highest" if highest else "lowest")
    if order not in ORDERS:
        raise ConfigError(f"unknown order '{order}'", where="keep.order", remedy=nearest(str(order), ORDERS))
    return Keep(**given, highest=order == "highest", **unlike)


def _records(settings: Mapping[str, Any], config: Path, limit: int | None) -> tuple[list[Record], list[Dropped]]:
    """Read the records of files and of folders of builds; lines that cannot be read are drops."""
    from itertools import islice

    from mmit.build.annotated import Dropped
    from mmit.build.select import with_licence
    from mmit.errors import RecordError
    from mmit.records import read_jsonl

    named = settings.get("records")
    listed = named if isinstance(named, list) else [named]
    bad: list[RecordError] = []
    records: list[Record] = []
    for name in listed:
        if not isinstance(name, str) or not name:
            remedy = "Name a JSONL file of records, a folder of a build, or a list of these."
            raise ConfigError("'records' is missing", where=str(config), remedy=remedy)
        path = config.parent / name
        files = sorted((path / "records").glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ConfigError("holds no records", where=str(path), remedy="Give the --out of a build.")
        for file in files:
            records += islice(read_jsonl(file, on_bad=bad.append), limit)
    dropped = [Dropped("selected", error.where, "", "the row cannot be read", error.problem) for error in bad]
    return with_licence(records[:limit], settings.get("licence")), dropped
