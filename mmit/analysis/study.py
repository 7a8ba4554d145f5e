"""The steps of a study: data, training and evaluation of every arm and seed, each an ordinary command of mmit.

Says what is to be done and where it goes; `execution.py` does it.

In: a `StudyConfig` and a folder. Out: in that folder

    study.json               the resolved config and the digests of what it reads
    questions/NAME/          questions.jsonl and task.yaml, the same for all arms
    arms/NAME/seed-S/        data/, run/, eval/NAME/, commands.txt, and failed.json where a step failed
    controls/NAME/           the first arm and the untuned model: without images, with other images

and in that folder, or in the one that several studies share:

    features/                vision features (model.vision.cache: disk)
    builds/DIGEST/           records made by templates, for the arms and seeds that need the same
    starts/DIGEST/           data/, run/: what arms start from
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.analysis.config import START, overrides, transforms
from mmit.analysis.data import base_records, record_files, write_arm
from mmit.configs import shipped_banks
from mmit.cores import usable
from mmit.errors import ConfigError
from mmit.yamlio import dump_yaml, merge, parse_yaml

if TYPE_CHECKING:
    from mmit.analysis.config import QuestionsConfig, StudyConfig
    from mmit.records import Record

FAILED, TIMES = "failed.json", "times.jsonl"


@dataclass(frozen=True)
class Step:
    """One command. `kind` is build, data, train, eval or controls; it is done when the files `made` are there."""

    kind: str
    name: str
    command: tuple[str, ...]
    made: tuple[Path, ...]
    folder: Path
    shared: bool = False  # with other studies, which may want it at the same time
    settings: str = ""  # YAML of a build, which is written before

    @property
    def done(self) -> bool:
        """Whether it need not be run again."""
        return all(path.is_file() for path in self.made)

    @property
    def shown(self) -> str:
        """The command as one would type it."""
        return shlex.join(["mmit", *self.command])


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: its folder and its steps in order."""

    arm: str
    seed: int
    folder: Path
    steps: tuple[Step, ...]

    @property
    def failed(self) -> dict[str, Any] | None:
        """What went wrong, None if nothing did."""
        path = self.folder / FAILED
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    @property
    def done(self) -> bool:
        """Whether all of it is there."""
        return all(step.done for step in self.steps)


class Study:
    """A study in its folder.

    Args:
        config: the study. path: its YAML, whose folder relative paths start from. out: the folder of results.
    """

    def __init__(self, config: StudyConfig, path: Path, out: Path) -> None:
        self.config, self.path, self.out = config, path, out
        self.shared = out if config.shared is None else Path(self.at(config.shared))
        self.start = None if config.start is None else self._cell(START, config.seeds[0])
        self.cells = [self._cell(arm, seed) for seed in config.seeds for arm in config.arms]
        self.controls = self._controls() if config.controls else []

    def at(self, given: str) -> str:
        """Return a path of the YAML as this process sees it."""
        return os.path.abspath(self.path.parent / given)

    def folder_of(self, arm: str, seed: int) -> Path:
        """Return the folder of an arm with one seed."""
        return self._start_folder(seed) if arm == START else self.out / "arms" / arm / f"seed-{seed}"

    def _start_folder(self, seed: int) -> Path:
        """A folder named after what decides the start: studies that agree in it share it."""
        keys = self.keys_of(START)
        source = self.config.records
        decides = {
            "base": digest(Path(self.at(self.config.base))),
            "records": self.build_settings(overrides(keys, "build"), seed)
            if source is None
            else [self.at(source), digest(Path(self.at(source)))],
            "data": overrides(keys, "data"),
            "config": {**self.config.config, **overrides(keys, "config")},
            "seed": seed,
        }
        return self.shared / "starts" / _short(decides)

    def _transforms(self, arm: str) -> dict[str, Any]:
        """Return what is done to the records of an arm. The start has its own, or studies could not share it."""
        keys = self.keys_of(arm)
        return overrides(keys, "data") if arm == START else transforms(self.config, keys)

    def keys_of(self, arm: str) -> dict[str, Any]:
        """Return the keys of an arm."""
        return (self.config.start or {}) if arm == START else self.config.arms[arm]

    def answers_of(self, arm: str, seed: int, questions: str) -> Path:
        """Return the folder of the answers of an arm with one seed to a set of questions."""
        return self.folder_of(arm, seed) / "eval" / questions

    def build_of(self, keys: Mapping[str, Any], seed: int) -> Path:
        """Return the folder of the records that a build with these keys and this seed makes."""
        return self.shared / "builds" / _short(self.build_settings(keys, seed))

    def build_settings(self, keys: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return the study's build with these keys and this seed; its paths can be read from any folder."""
        assert self.config.build is not None
        file = Path(self.at(self.config.build))
        settings, _ = parse_yaml(_text(file), where=str(file))
        for key, value in keys.items():
            branch: Any = value
            for part in reversed(key.split(".")):
                branch = {part: branch}
            settings = merge(settings, branch)
        settings["seed"] = seed
        settings.pop("base", None)  # the arm's own training config has it
        rows = dict(settings.get("rows") or {})
        if rows.get("path"):
            rows["path"] = os.path.abspath(file.parent / rows["path"])
        if rows.get("image_root"):
            rows["image_root"] = os.path.abspath(file.parent / rows["image_root"])
        banks = settings.get("bank")
        settings["bank"] = [_bank(name, file.parent) for name in (banks if isinstance(banks, list) else [banks])]
        return {**settings, "rows": rows}

    def _build_step(self, keys: Mapping[str, Any], seed: int) -> Step:
        folder, settings = self.build_of(keys, seed), dump_yaml(self.build_settings(keys, seed))
        command = ("build", "annotated", str(folder / "build.yaml"), "--out", str(folder / "data"))
        made = (folder / "data" / "build.json",)
        return Step("build", f"build {folder.name}", command, made, folder, shared=True, settings=settings)

    def _cell(self, arm: str, seed: int) -> Cell:
        folder = self.folder_of(arm, seed)
        steps = []
        if self.config.build is not None:
            steps.append(self._build_step(overrides(self.keys_of(arm), "build"), seed))
        name = f"{arm}, seed {seed}"
        data, run = folder / "data", folder / "run"
        command: tuple[str, ...] = ("analyse", "arm", str(self.path), arm, str(seed), "--out", str(self.out))
        common = arm == START
        steps.append(Step("data", f"{name}: data", command, (data / "train.yaml",), folder, shared=common))
        command = ("train", "--config", str(data / "train.yaml"), "run.resume=auto")
        steps.append(Step("train", f"{name}: train", command, (run / "finished.json",), folder, shared=common))
        for sets in self._asked_together() if not common else ():
            words = ("eval", str(run), *self._tasks(sets), "--no-baselines", "--out")
            told = f"{name}: {', '.join(sets)}"
            steps.append(self._eval_step("eval", told, words, {one: self.answers_of(arm, seed, one) for one in sets}))
        return Cell(arm, seed, folder, tuple(steps))

    def _controls(self) -> list[Step]:
        """The first arm on the same questions without its images and with others, and the model before tuning."""
        run = self.folder_of(next(iter(self.config.arms)), self.config.seeds[0]) / "run"
        found = []
        for sets in self._asked_together():
            most = str(max(self.config.questions[one].limit for one in sets))
            words = ("eval", str(run), *self._tasks(sets), "--probe", "blank,swap", "--baseline-n", most, "--out")
            folders = {one: self.out / "controls" / one for one in sets}
            found.append(self._eval_step("controls", f"controls: {', '.join(sets)}", words, folders))
        return found

    def _asked_together(self) -> list[list[str]]:
        """Return the sets of questions by the command that asks them: one process loads the model for all made here.

        A shipped task gives its folder another name than the study does, and is asked alone.
        """
        made = [name for name, asked in self.config.questions.items() if asked.task is None]
        alone = [[name] for name, asked in self.config.questions.items() if asked.task is not None]
        return [made, *alone] if made else alone

    def _tasks(self, sets: list[str]) -> list[str]:
        return [
            "--task",
            ",".join(self.task_of(one) for one in sets),
            *(self._limit(sets[0]) if len(sets) == 1 else ()),
        ]

    def _eval_step(self, kind: str, name: str, words: tuple[str, ...], folders: Mapping[str, Path]) -> Step:
        """An evaluation: of several tasks each has its own folder below the one that is given."""
        first = next(iter(folders.values()))
        out = first if len(folders) == 1 else first.parent
        made = tuple(folder / "report.json" for folder in folders.values())
        return Step(kind, name, (*words, str(out)), made, first.parent.parent if kind == "eval" else first.parent)

    def task_of(self, asked: str) -> str:
        """Return the task of a set of questions: its YAML, or the name of a shipped one."""
        settings = self.config.questions[asked]
        if settings.task is None:
            return str(self.out / "questions" / asked / "task.yaml")
        own = self.path.parent / settings.task
        return os.path.abspath(own) if own.is_file() else settings.task

    def _limit(self, asked: str) -> tuple[str, ...]:
        settings = self.config.questions[asked]
        return ("--limit", str(settings.limit)) if settings.task is not None else ()

    def question_build(self, asked: QuestionsConfig) -> Step:
        """Return the build of the records that questions are made of; their seed is that of no arm."""
        return self._build_step(asked.build, 0)

    def _base(self) -> tuple[str, dict[str, Any]]:
        """Return the training config that arms begin with, and keys over it.

        A base has no base: of one that has, its base is taken and its own keys go into each arm's config.
        """
        file = self.at(self.config.base)
        keys, _ = parse_yaml(_text(Path(file)), where=file)
        if not isinstance(keys, dict) or not isinstance(keys.get("base"), str):
            return file, {}
        return os.path.join(os.path.dirname(file), keys.pop("base")), keys

    def own_records(self) -> list[Record]:
        """Return the records of a study that trains on a file; [] where a build makes them."""
        return [] if self.config.records is None else self.records_in(Path(self.at(self.config.records)))

    def records_in(self, source: Path) -> list[Record]:
        """Return the records of a file or folder, whose relative images lie where the study says."""
        root = self.config.image_root
        return base_records(source, image_root=None if root is None else self.at(root))

    def make_arm(self, arm: str, seed: int) -> int:
        """Write the records and the training config of an arm; returns the number of records."""
        settings = self.keys_of(arm)
        if self.config.build is not None:
            source = self.build_of(overrides(settings, "build"), seed) / "data"
        else:
            source = Path(self.at(self.config.records or ""))
        keys = {**self.config.config, **overrides(settings, "config")}
        folder = self.folder_of(arm, seed)
        keys |= {"run.dir": str(folder / "run"), "run.seed": seed}
        # What all arms compute alike is computed once; `model.vision.cache` says whether features are kept at all.
        keys = {"model.vision.cache_dir": str(self.shared / "features"), **keys}
        if self.start is not None and arm != START:
            keys = {**self._measured_by_start(), **keys, "run.init_from": str(self.start.folder / "run")}
        elif self.config.start_from is not None:
            keys["run.init_from"] = self.at(self.config.start_from)
        base, own = self._base()
        where = f"{self.path}: arms.{arm}"
        return write_arm(
            self.records_in(source),
            self._transforms(arm),
            folder / "data",
            seed=seed,
            base={"base": os.path.relpath(base, folder / "data"), **own},
            keys=keys,
            where=where,
        )

    def _measured_by_start(self) -> dict[str, Any]:
        """Return what a run settles by measuring: a busy machine could settle it otherwise in one of the arms."""
        assert self.start is not None
        file = self.start.folder / "run" / "config.yaml"
        if not file.is_file():
            return {}
        settled, _ = parse_yaml(_text(file), where=str(file))
        return {"train.precision": settled["train"]["precision"]}

    @property
    def steps(self) -> list[Step]:
        """All steps in order, each once."""
        cells = [self.start, *self.cells] if self.start else self.cells
        every = [*(step for cell in cells for step in cell.steps), *self.controls]
        return list({step.made: step for step in every}.values())

    def left(self) -> list[Step]:
        """Return the steps that are not done."""
        return [step for step in self.steps if not step.done]

    @property
    def like(self) -> str:
        """What a step's time depends on beside its kind, as far as all arms have it in common."""
        asked = {name: [one.limit, one.max_new_tokens] for name, one in self.config.questions.items()}
        return _short([digest(Path(self.at(self.config.base))), self.config.config, asked])

    def hours_left(self, *, jobs: int = 1) -> float | None:
        """Return how long the rest takes by the steps that were run, None where a kind never was.

        By those of this study, and of others alike that share a folder with it. Steps of arms run `jobs` at once.
        """
        mine = _times(self.out / TIMES)
        others = _times(self.shared / TIMES, like=self.like) if self.shared != self.out else {}
        found = {**others, **mine}
        steps = self.left()
        if any(step.kind not in found for step in steps if step.kind in ("train", "eval")):
            return None
        seconds = 0.0
        for step in steps:
            several = found.get(step.kind, [0.0])
            at_once = jobs if step.kind in ("data", "train", "eval") and not step.shared else 1
            seconds += sum(several) / len(several) / at_once
        return seconds / 3600


def usual_jobs(devices: Path = Path("/dev")) -> int:
    """Return how many arms train at once where nobody says.

    Two on a CPU: on two cores a step of the quickstart's model takes 1.8 s with one thread and 1.1 s with two, so that
    two arms at once end a quarter sooner. More would need their memory. An accelerator is left to one arm.
    """
    accelerated = sys.platform == "darwin" or any(devices.glob("nvidia[0-9]*")) or (devices / "kfd").exists()
    return 1 if accelerated else min(2, len(usable()))


def _times(path: Path, *, like: str | None = None) -> dict[str, list[float]]:
    """Return the seconds of steps by their kind; with `like` those of studies of that likeness."""
    found: dict[str, list[float]] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        took = json.loads(line)
        if like is None or took.get("like") == like:
            found.setdefault(took["kind"], []).append(took["seconds"])
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read: {error}", where=str(path), remedy="Check the path in the study.") from None


def _short(decides: Any) -> str:
    """Return a name for a folder that what is in it decides."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def digest(path: Path) -> str:
    """Hash the contents of a file, or of those that hold the records of a folder. Raises ConfigError."""
    hashed = hashlib.sha256()
    try:
        for file in record_files(path) if path.is_dir() else [path]:
            if path.is_dir():
                hashed.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    hashed.update(block)
    except OSError as error:
        raise ConfigError(f"cannot read: {error}", where=str(path), remedy="Check the path in the study.") from None
    return hashed.hexdigest()[:16]


def _bank(name: Any, folder: Path) -> Any:
    """Make the path of a bank one that can be read from elsewhere."""
    if not isinstance(name, str) or name in shipped_banks():
        return name
    kind, colon, rest = name.partition(":")
    return f"{kind}:{os.path.abspath(folder / rest)}" if colon else os.path.abspath(folder / name)
