"""A build that asks teachers: its folder, lock, journal and settings.

While it runs, the folder holds `journal.jsonl`; the records are written when the last reply is there. A build that was
stopped, by Ctrl-C, a full budget or a killed process, goes on with the same command. What decides the requests must be
the same then; budgets, rates, prices and allowed licences may change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.build.executor import Asker, RayPool, Spread, cluster_of
from mmit.build.write import Counts, Stated, write_build
from mmit.data.thoughts import split_thought
from mmit.errors import ConfigError, nearest
from mmit.processes import only_one
from mmit.teachers import Desk, Draw, Journal, Request, Teacher, open_teachers
from mmit.teachers.desk import check_budget, ledger
from mmit.teachers.journal import header, read_entries

if TYPE_CHECKING:
    from mmit.build.annotated import Dropped, Made

JOURNAL = "journal.jsonl"
SHARED = ("base", "seed", "teacher", "choose", "draw", "budget", "thoughts", "cap", "allow_licences")
THOUGHTS = ("drop", "keep")
_FREE = (
    "base",
    "budget",
    "cap",
    "allow_licences",
    "target",
    "patience",
    "thoughts",
)  # may change between two runs of one build
_DRAW = ("temperature", "top_p", "max_tokens", "presence_penalty")


@contextmanager
def session(
    settings: Mapping[str, Any],
    out: Path,
    *,
    folder: str,
    progress: Callable[[int, int], None] | None = None,
    lenient: bool = False,
    executor: str = "local",
    workers: int = 0,
) -> Iterator[Desk]:
    """Open the desk of a build's folder and hold the folder's lock.

    Args:
        folder: what a relative journal of a replay starts from. lenient: replays drop what they do not hold.
        executor: who asks: this process (local), or `workers` actors of Ray; see `mmit.build.executor`.

    Raises ConfigError: another process holds it, it holds something else, or its journal is of another config.
    """
    journal = out / JOURNAL
    # The lock is no content: it is there before the journal, also after a start that was refused.
    if out.exists() and any(path.name != ".lock" for path in out.iterdir()) and not journal.is_file():
        problem = "the folder is not empty and holds no journal"
        raise ConfigError(problem, where=str(out), remedy="Give --out a new folder, or remove this one.")
    teachers = open_teachers(settings.get("teacher"), folder=folder, lenient=lenient)
    thoughts = settings.get("thoughts", "drop")
    if thoughts not in THOUGHTS:
        raise ConfigError(f"is {thoughts!r}", where="thoughts", remedy="Write drop or keep.")
    weights = _weights(settings.get("choose"), teachers)
    budget = check_budget(settings.get("budget"))
    cluster = cluster_of(executor)
    if cluster is None and workers:
        remedy = "Add --executor ray, or set the teacher's in_flight or batch_size."
        raise ConfigError("counts the actors of --executor ray", where="--workers", remedy=remedy)
    with only_one(out / ".lock", "build", folder=out), ExitStack() as held:
        opened = Journal(journal, _decisive(settings))
        keep = thoughts == "keep"
        if cluster is not None:
            asker = Asker(settings.get("teacher"), os.path.abspath(folder), lenient=lenient)
            pool = held.enter_context(RayPool(asker, cluster, workers))
            teachers = [Spread(teacher, number, pool) for number, teacher in enumerate(teachers)]
        yield Desk(teachers, opened, weights=weights, budget=budget, progress=progress, keep_thoughts=keep)


def write_session(
    made: Iterable[Made | Dropped],
    desk: Desk,
    out: Path,
    settings: Mapping[str, Any],
    *,
    folder: Path,
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> Counts:
    """Run a build and write its folder.

    Args:
        made: the stage, which runs as it is read. desk: its teachers and journal. out: the folder.
        settings: of the config. folder: of the config, from which `base` is named.
        facts: what the stage says of itself once it is done.

    Raises:
        MmitError: what `write_build` and the stage raise.
    """
    stated = Stated(
        settings,
        inputs={teacher.name: teacher.identity for teacher in desk.teachers},
        facts=lambda: {"ledger": ledger(desk.journal.entries.values()), **thought_facts(desk), **facts()},
    )
    return write_build(
        made,
        out,
        stated,
        base=folder / settings["base"] if settings.get("base") else None,
        cap=settings.get("cap"),
        allow_licences=settings.get("allow_licences"),
        resumed=True,
    )


def thought_facts(desk: Desk) -> dict[str, Any]:
    """Return what a report says of thoughts: in how many replies, and what became of them; {} without any."""
    replies = (entry.reply for entry in desk.journal.entries.values())
    count = sum(bool(reply.thought or split_thought(reply.text)[0]) for reply in replies)
    return {"thoughts": {"replies": count, "kept": desk.keep_thoughts}} if count else {}


def draw_of(settings: Mapping[str, Any], **default: Any) -> Draw:
    """Return the draw of a config, `default` where it says nothing. Raises ConfigError."""
    given = settings.get("draw") or {}
    if not isinstance(given, Mapping):
        raise ConfigError("is no mapping", where="draw", remedy=f"Keys: {', '.join(_DRAW)}.")
    for key, value in given.items():
        if key not in _DRAW:
            raise ConfigError(f"unknown key '{key}'", where="draw", remedy=nearest(str(key), _DRAW))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"{key} is {value!r}", where="draw", remedy="Give a number, 0 or more.")
    return Draw(**(default | dict(given)))


def forecast(requests: Sequence[Request], teachers: Sequence[Teacher]) -> dict[str, Any]:
    """Return what requests would take: their number, tokens (about 4 characters each), and the highest price.

    Images are not counted: how many tokens one takes only its server knows.
    """
    read = sum(sum(len(turn.text) for turn in request.messages) for request in requests) // 4
    written = sum(request.draw.max_tokens for request in requests)
    prices = [teacher.price for teacher in teachers if teacher.price]
    cost = None
    if prices and len(prices) == len(teachers):
        most = {key: max(price.get(key, 0.0) for price in prices) for key in ("input", "output")}
        cost = (read * most["input"] + written * most["output"]) / 1e6
    images = sum(len(turn.parts) - bool(turn.text) for request in requests for turn in request.messages)
    return {"requests": len(requests), "prompt_tokens": read, "new_tokens": written, "images": images, "cost": cost}


def status(out: Path) -> dict[str, Any]:
    """Return what a build's folder holds. Raises ConfigError: it is no build's."""
    found: dict[str, Any] = {"finished": (out / "build.json").is_file(), "ledger": {}}
    if found["finished"]:
        stated = json.loads((out / "build.json").read_text(encoding="utf-8"))
        found |= {key: stated[key] for key in ("in", "accepted", "dropped", "licences") if key in stated}
    if (out / JOURNAL).is_file():
        found["settings"] = header(out / JOURNAL)["settings"]
        found["ledger"] = ledger(read_entries(out / JOURNAL))
    elif not found["finished"]:
        remedy = "Give the --out of a build."
        raise ConfigError("holds neither build.json nor journal.jsonl", where=str(out), remedy=remedy)
    return found


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _FREE and value is not None}
    listed = kept["teacher"] if isinstance(kept["teacher"], list) else [kept["teacher"]]
    kept["teacher"] = [
        one if isinstance(one, str) else {key: one[key] for key in ("open", "name", "only") if key in one}
        for one in listed
    ]
    return kept


def _weights(choose: Any, teachers: Sequence[Teacher]) -> list[float] | None:
    if choose in (None, "all", "in_turn"):
        return None
    numbers = isinstance(choose, list) and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and n >= 0 for n in choose
    )
    if not numbers or len(choose) != len(teachers) or not sum(choose):
        remedy = f"Write all, in_turn, or {len(teachers)} weights such as [3, 1]."
        raise ConfigError(f"is {choose!r}", where="choose", remedy=remedy)
    return list(choose)
