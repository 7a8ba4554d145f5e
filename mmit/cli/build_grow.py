"""`mmit build self-instruct`: instructions grown from seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.cli.build_config import check_keys, read_config
from mmit.cli.build_teachers import Build, finish, opened, show_forecast
from mmit.errors import ConfigError
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.build.self_instruct import Task
    from mmit.records import Image

KEYS = ("seeds", "pictures", "prompt", "filters", "target", "requests", "patience", "licence", "style")
FILTERS = ("words", "rouge_l", "keywords", "needs_picture")
# Defaults of Self-Instruct and of Alpaca.
_DRAWS: dict[str, dict[str, Any]] = {
    "steps": {"temperature": 0.7, "top_p": 0.5, "max_tokens": 1024},
    "alpaca": {"temperature": 1.0, "max_tokens": 3072},
}
_PROMPTS: dict[str, dict[str, int]] = {"steps": {}, "alpaca": {"human": 3, "machine": 0, "new": 20}}


def self_instruct(build: Build) -> None:
    """Let a teacher grow instructions from seeds, about images where `pictures` names some."""
    from mmit.build.self_instruct import SelfInstruct
    from mmit.build.session import SHARED, draw_of

    inner = {"prompt": ("human", "machine", "new"), "filters": FILTERS}
    settings = read_config(build.config, (*SHARED, *KEYS), inner)
    seeds = read_seeds(settings, build.config)
    pictures, licences = _pictures(settings, build.config)
    plan = _plan(settings, pictures=bool(pictures))
    draw = draw_of(settings, **_DRAWS[plan.style])
    licences.append(settings.get("licence"))
    if build.dry_run:
        first = SelfInstruct(seeds, None, plan, draw=draw, pictures=pictures)  # type: ignore[arg-type]
        echo("the first round, without what its instructions will need:")
        show_forecast(first.first_round(), settings, build.config)
        more = "an answer with the image and one without" if pictures else "its class, its input and output"
        least = -(-plan.target // (plan.requests * plan.new))
        if plan.style != "alpaca":
            echo(f"each instruction that passes the filters takes 2 requests more ({more})")
        echo(f"{plan.target:,} records take {least:,} rounds or more")
        return
    with opened(build, settings) as desk:
        made = SelfInstruct(seeds, desk, plan, draw=draw, pictures=pictures, licences=licences)
        finish(made.run(), desk, build, settings)


def read_seeds(settings: Mapping[str, Any], config: Path) -> list[Task]:
    """Read seeds: mmit records, or rows of instruction and instances as Self-Instruct's seed_tasks.jsonl."""
    from mmit.build.self_instruct import Task
    from mmit.errors import RecordError
    from mmit.records import json_lines

    if not isinstance(settings.get("seeds"), str):
        raise ConfigError("'seeds' is missing", where=str(config), remedy="Name a JSONL file of seed tasks.")
    path = config.parent / settings["seeds"]
    seeds = []
    for number, row in json_lines(path):
        if isinstance(row, RecordError):
            raise row
        place = f"{path}:{number}"
        if isinstance(row, dict) and "turns" in row:
            text = "".join(part.get("text", "") for part in row["turns"][0].get("parts", []))
            seeds.append(Task(str(row.get("id") or number), text.strip()))
            continue
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
            remedy = 'Write {"instruction": "...", "instances": [{"input": "", "output": "..."}]} or mmit records.'
            raise ConfigError("the seed has no instruction", where=place, remedy=remedy)
        first = (row.get("instances") or [{}])[0]
        facts = (str(first.get("input") or ""), str(first.get("output") or ""), bool(row.get("is_classification")))
        seeds.append(Task(str(row.get("id") or number), row["instruction"].strip(), *facts))
    return seeds


def _pictures(settings: Mapping[str, Any], config: Path) -> tuple[list[Image], list[str | None]]:
    """Return the images of a file of records, each once, and the licences of the records."""
    if not settings.get("pictures"):
        return [], []
    from mmit.records import read_jsonl

    path = config.parent / settings["pictures"]
    images: dict[Any, Image] = {}
    licences: dict[str | None, None] = {}
    for record in read_jsonl(path):
        for image in record.images:
            images[image.source] = image
            licences[record.licence] = None
    if not images:
        raise ConfigError("holds no image", where=str(path), remedy="Name a JSONL file of records with images.")
    return list(images.values()), list(licences)


def _plan(settings: Mapping[str, Any], *, pictures: bool) -> Any:
    from mmit.build.self_instruct import KEYWORDS, InstructPlan

    style, filters = settings.get("style", "steps"), settings.get("filters") or {}
    prompt = _PROMPTS.get(style, {}) | (settings.get("prompt") or {})
    check_keys(filters, FILTERS, "filters")
    words = filters.get("words", [4, 150])
    if not isinstance(words, list) or len(words) != 2 or not all(isinstance(n, int) for n in words):
        raise ConfigError(f"is {words!r}", where="filters.words", remedy="Write words: [4, 150]")
    return InstructPlan(
        **{key: settings[key] for key in ("target", "requests", "patience", "seed") if settings.get(key) is not None},
        **prompt,
        style=style,
        words=(words[0], words[1]),
        rouge_l=filters.get("rouge_l", 0.7),
        # With images, words such as `image` are what a question is made of.
        keywords=tuple(filters.get("keywords", () if pictures else KEYWORDS)),
        needs_picture=filters.get("needs_picture", True),
    )
