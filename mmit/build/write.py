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
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from mmit import __version__
from mmit.build.annotated import Dropped, Made
from mmit.build.licences import check_allowed
from mmit.build.package_data import image_format
from mmit.data.image_identity import image_name
from mmit.errors import ConfigError
from mmit.io import unwritable, write_atomic
from mmit.processes import only_one
from mmit.records import Image, Part, Record, record_line
from mmit.text import plain
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


@dataclass(frozen=True)
class Line:
    """A record as its line in a file of the build, with what is counted; `files` are its images by their names."""

    task: str
    held_out: bool
    template: str
    licence: str
    text: str
    files: Mapping[str, bytes] = field(default_factory=dict)


def line_of(made: Made, out: Path) -> Line:
    """Return the line of a record in the folder `out`. Raises RecordError."""
    folder = os.path.abspath(out / _folder(made.held_out))
    record, files = _with_files(made.record, folder)
    wording, licence = _wording(made.record.meta.get("build")), made.record.licence or ""
    return Line(made.task, made.held_out, wording, licence, record_line(record, folder), files)


@dataclass(frozen=True)
class Stated:
    """What build.json states beside the counts.

    Args:
        config: the resolved config. inputs: digests of what was read, by name.
        facts: further ones, asked when the records are made.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, Any]] = dict


def write_build(
    made: Iterable[Made | Line | Dropped],
    out: Path,
    stated: Stated,
    *,
    base: Path | None = None,
    cap: int | None = None,
    allow_licences: Sequence[str] | None = None,
    resumed: bool = False,
) -> Counts:
    """Write a build's folder and return its counts.

    Args:
        stated: goes into build.json; its config stands on the card too.
        base: training config that mixture.yaml builds on.
        cap: records a task counts as in the mixture (Flan's per-task cap).
        allow_licences: see `mmit.build.licences.check_allowed`.
        resumed: the folder holds the journal of this build, which stays; what an earlier run wrote is replaced.

    Raises:
        ConfigError: the folder is taken, or another process writes it; a licence is not allowed; nothing was accepted.
        WriteError: the disk.
    """
    # A build that asks teachers holds the lock of its folder already.
    beside = Path(os.path.abspath(out))  # `--out .` has no name of its own
    lock = nullcontext() if resumed else only_one(beside.with_name(f".{beside.name}.lock"), "build", folder=out)
    with lock:
        if not resumed and out.exists() and any(out.iterdir()):
            problem = "the folder is not empty"
            raise ConfigError(problem, where=str(out), remedy="Give --out a new folder, or remove this one.")
        # In the folder above, so that the rename that publishes it stays within one file system.
        draft = beside.with_name(f".{beside.name}.draft")
        try:
            shutil.rmtree(draft, ignore_errors=True)  # of a build that was killed
            draft.mkdir(parents=True)
            counts = _write_records(made, draft, out)
            if not counts.accepted:
                raise _nothing(counts, draft, out, asked=resumed)
            check_allowed(counts.licences, allow_licences, where="allow_licences")
            _write_mixture(counts, draft, out, base=base, cap=cap)
            written: dict[str, Any] = {
                "mmit": __version__,
                "config": dict(stated.config),
                "inputs": dict(stated.inputs),
            }
            written |= {"in": counts.total, **vars(counts), "held_out": sorted(counts.held_out), **stated.facts()}
            write_atomic(draft / "build.json", json.dumps(written, indent=1, ensure_ascii=False) + "\n")
            write_atomic(draft / "card.md", plain(_card(counts, stated.config)))
            _move_into(draft, out)
        except OSError as error:
            raise unwritable(out, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return counts


def _nothing(counts: Counts, draft: Path, out: Path, *, asked: bool) -> ConfigError:
    """The error of a build without a record; `asked`: its texts are a teacher's, and the journal has them."""
    if asked:
        reasons = ", ".join(f"{reason} ({number:,})" for reason, number in counts.dropped.most_common(3))
        remedy = f"{out}/journal.jsonl has the replies: ask another teacher, or change the config."
        return ConfigError(f"nothing was kept: {reasons or 'no reply'}", where=str(out), remedy=remedy)
    with open(draft / "dropped.jsonl", encoding="utf-8") as file:
        first = json.loads(file.readline() or '{"text": "there are no rows"}')
    problem = f"no row gave a record: {first.get('text') or first['reason']}"
    return ConfigError(problem, where=str(out), remedy="Fix the rows or the bank.")


def _move_into(draft: Path, out: Path) -> None:
    """Put the draft in place, instead of what a build wrote before.

    Into a folder that is there, which may be somebody's working directory, build.json goes last, so that it stands for
    a whole folder.
    """
    if not out.exists():
        os.replace(draft, out)
        return
    (out / "build.json").unlink(missing_ok=True)
    for name in ("records", "held_out"):
        shutil.rmtree(out / name, ignore_errors=True)
    for entry in sorted(draft.iterdir(), key=lambda path: path.name == "build.json"):
        os.replace(entry, out / entry.name)


def _write_records(made: Iterable[Made | Line | Dropped], draft: Path, out: Path) -> Counts:
    counts = Counts()
    files: dict[str, IO[str]] = {}
    try:
        dropped = files["dropped.jsonl"] = open(draft / "dropped.jsonl", "w", encoding="utf-8", newline="\n")
        for item in made:
            if isinstance(item, Dropped):
                counts.dropped[item.reason] += 1
                dropped.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
                continue
            line = line_of(item, out) if isinstance(item, Made) else item
            folder = _folder(line.held_out)
            name = f"{folder}/{_file_name(line.task)}.jsonl"
            if name not in files:
                (draft / folder).mkdir(exist_ok=True)
                # Open until the end: tasks come in the order of the rows, mixed.
                files[name] = open(draft / name, "w", encoding="utf-8", newline="\n")
            for image, data in line.files.items():
                if not (draft / folder / image).exists():
                    (draft / folder / image).parent.mkdir(exist_ok=True)
                    (draft / folder / image).write_bytes(data)
            files[name].write(line.text)
            counts.accepted[line.task] += 1
            counts.templates[line.task][line.template] += 1
            counts.licences[line.licence] += 1
            if line.held_out:
                counts.held_out.add(line.task)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return counts


def _with_files(record: Record, folder: str) -> tuple[Record, dict[str, bytes]]:
    """Return the record with its images as files of `folder`, and the bytes of those that are no files yet."""
    files: dict[str, bytes] = {}
    if not any(isinstance(image.source, bytes) for image in record.images):
        return record, files

    def filed(part: Part) -> Part:
        if not isinstance(part, Image) or not isinstance(part.source, bytes):
            return part
        name = f"images/{image_name(part).rpartition(':')[2][:20]}.{image_format(part.source)}"
        files[name] = part.source
        return Image(os.path.join(folder, name))

    turns = [replace(turn, parts=tuple(filed(part) for part in turn.parts)) for turn in record.turns]
    return replace(record, turns=tuple(turns)), files


def _folder(held_out: bool) -> str:
    return "held_out" if held_out else "records"


def _wording(build: Any) -> str:
    return str(build.get("template") or build.get("how") or "") if isinstance(build, Mapping) else ""


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
