"""The folder that every build writes: what `mmit data check | show | stats` and `mmit train` read as it is.

    records/TASK.jsonl      mmit records, one file a task, so that a mixture's cap is a cap per task
    held_out/TASK.jsonl     records of held-out clusters
    */images/DIGEST.png     images that came as bytes, each once (their own format where it is another)
    mixture.yaml            `data:` of a training config, the tasks as sources; with `base` it trains as it is
    dropped.jsonl           what gave no record: task, row, template, reason
    build.json              the resolved config, counts (in = accepted + dropped), input digests, versions
    card.md                 the same for people

The folder appears whole: everything is written beside it and renamed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from mmit import __version__
from mmit.build.annotated import Dropped, Made
from mmit.build.licences import check_allowed
from mmit.build.package_data import image_format
from mmit.data.lint.images import image_name
from mmit.errors import ConfigError
from mmit.io import unwritable, write_atomic
from mmit.records import Image, Record, record_line
from mmit.yamlio import dump_yaml


@dataclass
class Counts:
    """What a build did: in = accepted + dropped."""

    accepted: Counter[str] = field(default_factory=Counter)  # by task
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    templates: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # task -> template
    licences: Counter[str] = field(default_factory=Counter)
    held_out: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        """Rows times wordings that were tried."""
        return sum(self.accepted.values()) + sum(self.dropped.values())

    @property
    def summary(self) -> str:
        """Both numbers in words."""
        return f"{sum(self.accepted.values()):,} records, {sum(self.dropped.values()):,} dropped"


def write_build(  # noqa: PLR0913
    made: Iterable[Made | Dropped],
    out: Path,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    base: Path | None = None,
    cap: int | None = None,
    allow_licences: Sequence[str] | None = None,
    resumed: bool = False,
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> Counts:
    """Write a build's folder and return its counts.

    Args:
        config: the resolved config, kept in build.json. inputs: digests of what was read, by name.
        base: training config that mixture.yaml builds on.
        cap: records a task counts as in the mixture (Flan's per-task cap).
        allow_licences: see `mmit.build.licences.check_allowed`.
        resumed: the folder holds the journal of this build, which stays; what an earlier run wrote is replaced.
        facts: what build.json states besides, asked when the records are made.

    Raises:
        ConfigError: the folder is taken, a licence is not allowed, or nothing was accepted. WriteError: the disk.
    """
    if not resumed and out.exists() and any(out.iterdir()):
        problem = "the folder is not empty"
        raise ConfigError(problem, where=str(out), remedy="Give --out a new folder, or remove this one.")
    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    try:
        draft.mkdir(parents=True)
        counts = _write_records(made, draft, out)
        if not counts.accepted:
            first = next(iter(counts.dropped), "there are no rows")
            raise ConfigError(f"no row gave a record: {first}", where=str(out), remedy="Fix the rows or the bank.")
        check_allowed(counts.licences, allow_licences, where="allow_licences")
        _write_mixture(counts, draft, out, base=base, cap=cap)
        stated = {"mmit": __version__, "config": dict(config), "inputs": dict(inputs), "in": counts.total}
        stated |= vars(counts) | {"held_out": sorted(counts.held_out)} | dict(facts())
        write_atomic(draft / "build.json", json.dumps(stated, indent=1, ensure_ascii=False) + "\n")
        write_atomic(draft / "card.md", _card(counts, config))
        if resumed:
            _move_into(draft, out)
        else:
            if out.exists():
                out.rmdir()
            os.replace(draft, out)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return counts


def _move_into(draft: Path, out: Path) -> None:
    """Replace what a build wrote before; build.json goes last, so that it stands for a whole folder."""
    (out / "build.json").unlink(missing_ok=True)
    for name in ("records", "held_out"):
        shutil.rmtree(out / name, ignore_errors=True)
    for entry in sorted(draft.iterdir(), key=lambda path: path.name == "build.json"):
        os.replace(entry, out / entry.name)


def _write_records(made: Iterable[Made | Dropped], draft: Path, out: Path) -> Counts:
    counts = Counts()
    files: dict[str, IO[str]] = {}
    try:
        dropped = files["dropped.jsonl"] = open(draft / "dropped.jsonl", "w", encoding="utf-8", newline="\n")
        for item in made:
            if isinstance(item, Dropped):
                counts.dropped[item.reason] += 1
                dropped.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
                continue
            folder = "held_out" if item.held_out else "records"
            name = f"{folder}/{_file_name(item.task)}.jsonl"
            if name not in files:
                (draft / folder).mkdir(exist_ok=True)
                files[name] = open(draft / name, "w", encoding="utf-8", newline="\n")
            record = _with_files(item.record, draft / folder, out / folder)
            files[name].write(record_line(record, os.path.abspath(out / folder)))
            counts.accepted[item.task] += 1
            counts.templates[item.task][_wording(item.record.meta["build"])] += 1
            counts.licences[item.record.licence or ""] += 1
            if item.held_out:
                counts.held_out.add(item.task)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return counts


def _with_files(record: Record, draft: Path, out: Path) -> Record:
    """Write images that are bytes to files of `draft`, and name them as they will be in `out`."""
    if not any(isinstance(image.source, bytes) for image in record.images):
        return record
    turns = []
    for turn in record.turns:
        parts = [
            _filed(p, draft, out) if isinstance(p, Image) and isinstance(p.source, bytes) else p for p in turn.parts
        ]
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(record, turns=tuple(turns))


def _filed(image: Image, draft: Path, out: Path) -> Image:
    assert isinstance(image.source, bytes)
    name = f"images/{image_name(image).rpartition(':')[2][:20]}.{image_format(image.source)}"
    if not (draft / name).exists():
        (draft / "images").mkdir(exist_ok=True)
        (draft / name).write_bytes(image.source)
    return Image(str(out / name))


def _wording(build: Mapping[str, Any]) -> str:
    return str(build.get("template") or build["how"])


def _file_name(task: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in task).lstrip(".") or "task"


def _write_mixture(counts: Counts, draft: Path, out: Path, *, base: Path | None, cap: int | None) -> None:
    def sources(tasks: Iterable[str], folder: str) -> list[dict[str, Any]]:
        # As --out was given: paths of a config start at the working directory.
        place = out / folder
        return [{"path": (place / f"{_file_name(task)}.jsonl").as_posix(), "name": task} for task in sorted(tasks)]

    data: dict[str, Any] = {"train": sources(set(counts.accepted) - counts.held_out, "records")}
    if counts.held_out:
        data["eval"] = sources(counts.held_out, "held_out")
    if cap is not None:
        data["mixing"] = {"scheme": "proportional", "cap": cap}
    above = {} if base is None else {"base": Path(os.path.relpath(base, out)).as_posix()}
    write_atomic(draft / "mixture.yaml", dump_yaml({**above, "data": data}))


def _card(counts: Counts, config: Mapping[str, Any]) -> str:
    lines = ["# Data card", "", f"{counts.summary}.", ""]
    lines += ["| task | records | templates | held out |", "|---|--:|--:|---|"]
    for task, number in sorted(counts.accepted.items()):
        held = "yes" if task in counts.held_out else ""
        lines.append(f"| {task} | {number:,} | {len(counts.templates[task])} | {held} |")
    lines += ["", "| licence | records |", "|---|--:|"]
    lines += [f"| {licence} | {number:,} |" for licence, number in counts.licences.most_common()]
    if counts.dropped:
        lines += ["", "| dropped because | rows |", "|---|--:|"]
    lines += ["", "```yaml", dump_yaml(dict(config)).rstrip(), "```", ""]
    return "\n".join(lines)
