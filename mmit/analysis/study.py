"""The steps of a study: data, training and evaluation of every arm and seed, each an ordinary command of mmit.

In: a `StudyConfig` and a folder. Out: in that folder

    study.json               the resolved config and the digests of what it reads
    questions/NAME/          questions.jsonl and task.yaml, the same for all arms
    arms/NAME/seed-S/        data/, run/, eval/NAME/, commands.txt, and failed.json where a step failed
    controls/NAME/           the first arm and the untuned model: without images, with other images

and in that folder, or in the one that several studies share:

    features/                vision features (model.vision.cache: disk)
    builds/DIGEST/           records made by templates, for the arms and seeds that need the same
    starts/DIGEST/           data/, run/: what arms start from

A step is done when its last file is there, so that a study that was killed goes on and repeats no finished step. An arm
that fails is reported and stops no other. Refuses a folder of another study, or whose base configs changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.analysis.config import START, QuestionsConfig, StudyConfig, overrides, transforms
from mmit.analysis.data import base_records, write_arm, write_questions
from mmit.analysis.forks import run_command
from mmit.configs import shipped_banks
from mmit.cores import usable
from mmit.errors import ConfigError
from mmit.io import append, write_atomic
from mmit.processes import only_one
from mmit.yamlio import dump_yaml, merge, parse_yaml

if TYPE_CHECKING:
    from mmit.records import Record

FREE = ("seeds", "contrasts", "question", "margin", "controls", "style")  # leave what was run as it is
STUDY, FAILED, COMMANDS, TIMES = "study.json", "failed.json", "commands.txt", "times.jsonl"
Say = Callable[[str], None]
Execute = Callable[[Sequence[str], Path, Mapping[str, str]], int]


@dataclass(frozen=True)
class Step:
    """One command. `kind` is build, data, train, eval or controls; it is done when the files `made` are there."""

    kind: str
    name: str
    command: tuple[str, ...]
    made: tuple[Path, ...]
    folder: Path
    shared: bool = False  # with other studies, which may want it at the same time

    @property
    def done(self) -> bool:
        """Whether it need not be run again."""
        return all(path.is_file() for path in self.made)

    @property
    def shown(self) -> str:
        """The command as one would type it."""
        return " ".join(["mmit", *(f"'{word}'" if " " in word else word for word in self.command)])


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
        execute: runs a command of mmit with a log and an environment, and returns its exit code.
    """

    def __init__(self, config: StudyConfig, path: Path, out: Path, *, execute: Execute | None = None) -> None:
        self.config, self.path, self.out = config, path, out
        self.shared = out if config.shared is None else Path(self.at(config.shared))
        self._execute = execute or run_command
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
            "base": _digest(Path(self.at(self.config.base))),
            "records": self._build_settings(overrides(keys, "build"), seed)
            if source is None
            else [self.at(source), _digest(Path(self.at(source)))],
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
        return self.shared / "builds" / _short(self._build_settings(keys, seed))

    def _build_settings(self, keys: Mapping[str, Any], seed: int) -> dict[str, Any]:
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
        folder = self.build_of(keys, seed)
        command = ("build", "annotated", str(folder / "build.yaml"), "--out", str(folder / "data"))
        return Step("build", f"build {folder.name}", command, (folder / "data" / "build.json",), folder, shared=True)

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

    # -- what a run of the study does

    def run(self, *, jobs: int, say: Say) -> None:
        """Do what is left. Raises ConfigError: the folder is of another study, or questions cannot be made."""
        with only_one(self.out / ".lock", "study", folder=self.out):
            self._claim()
            for name, asked in self.config.questions.items():
                self._make_questions(name, asked, say)
            for step in self.start.steps if self.start else ():
                self._do(step, say, threads=0)
            # Once each and before the cells: several arms read what one build wrote, and cells may run at once.
            builds = {step.folder: step for cell in self.cells for step in cell.steps if step.kind == "build"}
            for step in builds.values():
                self._do(step, say, threads=0)
            self._run_cells(say, jobs)
            first = self.cells[0]
            for step in self.controls if first.done else []:
                self._do(step, say, threads=0)

    def _run_cells(self, say: Say, jobs: int) -> None:
        if jobs == 1:
            for cell in self.cells:
                self._run_cell(cell, say, jobs)
            return
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for one in as_completed([pool.submit(self._run_cell, cell, say, jobs) for cell in self.cells]):
                    one.result()
            except BaseException:  # Ctrl-C: commands that run end by the signal themselves, no further one begins
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _claim(self) -> None:
        stated = self._stated()
        path = self.out / STUDY
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            changed = [key for key in stated if found.get(key) != stated[key]]
            now = {**stated, "config": _kept(stated["config"], found.get("config", {}))}
            for key in FREE:
                found.get("config", {}).pop(key, None)
            changed = [key for key in changed if found.get(key) != now[key]]
            if changed:
                was, is_ = _difference(found, now, changed[0])
                problem = f"the folder holds a study with another {changed[0]}: {was} was, {is_} is now"
                raise ConfigError(problem, where=str(self.out), remedy="Give --out another folder.")
        write_atomic(path, json.dumps(stated, indent=1, ensure_ascii=False) + "\n")

    def _stated(self) -> dict[str, Any]:
        files = {"base": self.config.base, "build": self.config.build, "records": self.config.records}
        digests = {key: _digest(Path(self.at(file))) for key, file in files.items() if file is not None}
        return {"config": self.config.model_dump(), **digests}

    def _make_questions(self, name: str, asked: QuestionsConfig, say: Say) -> None:
        folder = self.out / "questions" / name
        if asked.task is not None or (folder / "task.yaml").is_file():
            return
        banks: list[str] = []
        if asked.records is not None:
            source = Path(self.at(asked.records))
        elif self.config.build is not None:
            step = self.question_build(asked)
            self._do(step, say, threads=0)
            source = step.folder / "data"
            banks = self._build_settings(asked.build, 0)["bank"]
        write_questions(self._records(source), asked, folder, name=name, banks=banks)

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
        return [] if self.config.records is None else self._records(Path(self.at(self.config.records)))

    def _records(self, source: Path) -> list[Record]:
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
            self._records(source),
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

    def _run_cell(self, cell: Cell, say: Say, jobs: int) -> None:
        if cell.done:
            return
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / FAILED).unlink(missing_ok=True)
        for step in cell.steps:
            try:
                self._do(step, say, threads=0 if jobs == 1 else max(1, len(usable()) // jobs))
            except StepFailed as failure:
                # An arm that fails leaves a hole in the study, not its end: the others go on, and a further run of the
                # study tries it again.
                say(f"{step.name} FAILED: {failure}")
                told = {"step": step.name, "command": step.shown, "error": failure.problem}
                write_atomic(cell.folder / FAILED, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
                return

    def _do(self, step: Step, say: Say, *, threads: int) -> None:
        """Run a command unless it is done; what it prints goes to a log beside it."""
        if step.done:
            return
        if not step.shared:
            self._execute_step(step, say, threads)
            return
        with only_one(step.folder / ".lock", "study", folder=step.folder, wait=say):
            if not step.done:  # by the study that was waited for
                self._execute_step(step, say, threads)

    def _execute_step(self, step: Step, say: Say, threads: int) -> None:
        step.folder.mkdir(parents=True, exist_ok=True)
        if step.kind == "build":
            self._write_build(step)
        append(step.folder / COMMANDS, step.shown + "\n")
        environment = dict(os.environ)
        # Cells that run at once share the cores; otherwise each would start a thread for every one of them.
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        say(step.name)
        began = time.monotonic()
        log = step.folder / f"{step.kind}.log"
        code = self._execute(step.command, log, environment)
        # Also where it ended well: a step is done when the file is there that the next one reads.
        if code != 0 or not step.done:
            raise StepFailed(_last_words(log) or f"it ended with code {code}", step=step, code=code)
        took = {"kind": step.kind, "name": step.name, "seconds": round(time.monotonic() - began, 1)}
        append(self.out / TIMES, json.dumps(took) + "\n")
        if self.shared != self.out:
            append(self.shared / TIMES, json.dumps({**took, "like": self._like()}) + "\n")

    def _write_build(self, step: Step) -> None:
        for cell in [*([self.start] if self.start else []), *self.cells]:
            keys = overrides(self.keys_of(cell.arm), "build")
            if self.build_of(keys, cell.seed) == step.folder:
                write_atomic(step.folder / "build.yaml", dump_yaml(self._build_settings(keys, cell.seed)))
                return
        for asked in self.config.questions.values():
            if asked.task is None and asked.records is None and self.build_of(asked.build, 0) == step.folder:
                write_atomic(step.folder / "build.yaml", dump_yaml(self._build_settings(asked.build, 0)))

    @property
    def steps(self) -> list[Step]:
        """All steps in order, each once."""
        cells = [self.start, *self.cells] if self.start else self.cells
        every = [*(step for cell in cells for step in cell.steps), *self.controls]
        return list({step.made: step for step in every}.values())

    def left(self) -> list[Step]:
        """Return the steps that are not done."""
        return [step for step in self.steps if not step.done]

    def _like(self) -> str:
        """What a step's time depends on beside its kind, as far as all arms have it in common."""
        asked = {name: [one.limit, one.max_new_tokens] for name, one in self.config.questions.items()}
        return _short([_digest(Path(self.at(self.config.base))), self.config.config, asked])

    def hours_left(self, *, jobs: int = 1) -> float | None:
        """Return how long the rest takes by the steps that were run, None where a kind never was.

        By those of this study, and of others alike that share a folder with it. Steps of arms run `jobs` at once.
        """
        mine = _times(self.out / TIMES)
        others = _times(self.shared / TIMES, like=self._like()) if self.shared != self.out else {}
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


class StepFailed(ConfigError):
    """A command of a study ended badly; the message is its own last words."""

    def __init__(self, problem: str, *, step: Step, code: int) -> None:
        super().__init__(problem, where=step.name, remedy=f"Run it alone to see more: {step.shown}")
        self.code = code


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read: {error}", where=str(path), remedy="Check the path in the study.") from None


def _short(decides: Any) -> str:
    """Return a name for a folder that what is in it decides."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def _digest(path: Path) -> str:
    if path.is_dir():
        return hashlib.sha256("\n".join(sorted(str(p) for p in path.rglob("*"))).encode()).hexdigest()[:16]
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"cannot read: {error}", where=str(path), remedy="Check the path in the study.") from None


def _bank(name: Any, folder: Path) -> Any:
    """Make the path of a bank one that can be read from elsewhere."""
    if not isinstance(name, str) or name in shipped_banks():
        return name
    kind, colon, rest = name.partition(":")
    return f"{kind}:{os.path.abspath(folder / rest)}" if colon else os.path.abspath(folder / name)


def _kept(now: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that must be as it was: new arms and questions leave the old ones as they are."""
    kept = {key: value for key, value in now.items() if key not in FREE}
    for key in ("arms", "questions"):
        kept[key] = {name: value for name, value in now[key].items() if name in found.get(key, {})}
    return kept


def _difference(found: Mapping[str, Any], now: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    if key != "config":
        return found.get(key), now[key]
    was, is_ = found.get("config", {}), now["config"]
    first = next(k for k in is_ if was.get(k) != is_[k])
    return f"{first}={was.get(first)!r}", f"{first}={is_[first]!r}"


def _last_words(log: Path) -> str:
    """Return the error that a command printed, at most 500 characters of it."""
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    for place in range(len(lines) - 1, max(-1, len(lines) - 40), -1):
        if lines[place].startswith("error:"):
            return " ".join(lines[place:])[7:507]
    return lines[-1][:500] if lines else ""
