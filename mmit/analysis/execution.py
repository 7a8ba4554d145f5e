"""Run what is left of a study: its steps in order, those of several arms at once, each in a process of its own.

In: a `Study`, whose steps say what they make. A step is done when its last file is there, so that a study that was
killed goes on and repeats no finished step. An arm that fails is reported and stops no other. Refuses a folder of
another study, or whose base configs changed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.analysis.data import write_questions
from mmit.analysis.forks import run_command
from mmit.analysis.study import FAILED, TIMES, digest
from mmit.cores import usable
from mmit.errors import ConfigError
from mmit.io import append, write_atomic
from mmit.processes import only_one

if TYPE_CHECKING:
    from mmit.analysis.config import QuestionsConfig
    from mmit.analysis.study import Cell, Step, Study

FREE = ("seeds", "contrasts", "question", "margin", "controls", "style")  # leave what was run as it is
STUDY, COMMANDS = "study.json", "commands.txt"
ASKED = "asked"  # digests of the files of questions, by the name of the set
Say = Callable[[str], None]
Execute = Callable[[Sequence[str], Path, Mapping[str, str]], int]


def run_study(study: Study, *, jobs: int, say: Say, execute: Execute = run_command) -> None:
    """Do what is left of a study.

    Args:
        jobs: arms that train at once.
        say: told each step as it begins, and those that fail.
        execute: runs a command of mmit with a log and an environment, and returns its exit code.

    Raises:
        ConfigError: the folder is of another study, or questions cannot be made.
    """
    _Run(study, jobs, say, execute).run()


@dataclass(frozen=True)
class _Run:
    study: Study
    jobs: int
    say: Say
    execute: Execute

    def run(self) -> None:
        """Do what is left."""
        with only_one(self.study.out / ".lock", "study", folder=self.study.out):
            claim(self.study)
            for name, asked in self.study.config.questions.items():
                self._make_questions(name, asked)
            for step in self.study.start.steps if self.study.start else ():
                self._do(step, threads=0)
            # Once each and before the cells: several arms read what one build wrote, and cells may run at once.
            builds = {step.folder: step for cell in self.study.cells for step in cell.steps if step.kind == "build"}
            for step in builds.values():
                self._do(step, threads=0)
            self._run_cells()
            first = self.study.cells[0]
            for step in self.study.controls if first.done else []:
                self._do(step, threads=0)

    def _run_cells(self) -> None:
        if self.jobs == 1:
            for cell in self.study.cells:
                self._run_cell(cell)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for one in as_completed([pool.submit(self._run_cell, cell) for cell in self.study.cells]):
                    one.result()
            except BaseException:  # Ctrl-C: commands that run end by the signal themselves, no further one begins
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _make_questions(self, name: str, asked: QuestionsConfig) -> None:
        folder = self.study.out / "questions" / name
        if asked.task is not None or (folder / "task.yaml").is_file():
            return
        banks: list[str] = []
        if asked.records is not None:
            source = Path(self.study.at(asked.records))
        elif self.study.config.build is not None:
            step = self.study.question_build(asked)
            self._do(step, threads=0)
            source = step.folder / "data"
            banks = self.study.build_settings(asked.build, 0)["bank"]
        write_questions(self.study.records_in(source), asked, folder, name=name, banks=banks)

    def _run_cell(self, cell: Cell) -> None:
        if cell.done:
            return
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / FAILED).unlink(missing_ok=True)
        for step in cell.steps:
            try:
                self._do(step, threads=0 if self.jobs == 1 else max(1, len(usable()) // self.jobs))
            except StepFailed as failure:
                # An arm that fails leaves a hole in the study, not its end: the others go on, and a further run of the
                # study tries it again.
                self.say(f"{step.name} FAILED: {failure}")
                told = {"step": step.name, "command": step.shown, "error": failure.problem}
                write_atomic(cell.folder / FAILED, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
                return

    def _do(self, step: Step, *, threads: int) -> None:
        """Run a command unless it is done; what it prints goes to a log beside it."""
        if step.done:
            return
        if not step.shared:
            self._execute_step(step, threads)
            return
        with only_one(step.folder / ".lock", "study", folder=step.folder, wait=self.say):
            if not step.done:  # by the study that was waited for
                self._execute_step(step, threads)

    def _execute_step(self, step: Step, threads: int) -> None:
        step.folder.mkdir(parents=True, exist_ok=True)
        if step.settings:
            write_atomic(step.folder / "build.yaml", step.settings)
        append(step.folder / COMMANDS, step.shown + "\n")
        environment = dict(os.environ)
        # Cells that run at once share the cores; otherwise each would start a thread for every one of them.
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.say(step.name)
        began = time.monotonic()
        log = step.folder / f"{step.kind}.log"
        code = self.execute(step.command, log, environment)
        # Also where it ended well: a step is done when the file is there that the next one reads.
        if code != 0 or not step.done:
            raise StepFailed(_last_words(log) or f"it ended with code {code}", step=step, code=code)
        took = {"kind": step.kind, "name": step.name, "seconds": round(time.monotonic() - began, 1)}
        append(self.study.out / TIMES, json.dumps(took) + "\n")
        if self.study.shared != self.study.out:
            append(self.study.shared / TIMES, json.dumps({**took, "like": self.study.like}) + "\n")


class StepFailed(ConfigError):
    """A command of a study ended badly; the message is its own last words."""

    def __init__(self, problem: str, *, step: Step, code: int) -> None:
        super().__init__(problem, where=step.name, remedy=f"Run it alone to see more: {step.shown}")
        self.code = code


def claim(study: Study) -> None:
    """Make the folder this study's. Raises ConfigError: it is that of another."""
    stated = _stated(study)
    path = study.out / STUDY
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        _check_asked(found.pop(ASKED, {}), stated[ASKED], where=str(study.out))
        changed = [key for key in stated if key != ASKED and found.get(key) != stated[key]]
        now = {**stated, "config": _kept(stated["config"], found.get("config", {}))}
        for key in FREE:
            found.get("config", {}).pop(key, None)
        changed = [key for key in changed if found.get(key) != now[key]]
        if changed:
            was, is_ = _difference(found, now, changed[0])
            problem = f"the folder holds a study with another {changed[0]}: {was} was, {is_} is now"
            raise ConfigError(problem, where=str(study.out), remedy="Give --out another folder.")
    write_atomic(path, json.dumps(stated, indent=1, ensure_ascii=False) + "\n")


def _stated(study: Study) -> dict[str, Any]:
    files = {"base": study.config.base, "build": study.config.build, "records": study.config.records}
    digests = {key: digest(Path(study.at(file))) for key, file in files.items() if file is not None}
    asked = {name: set_.records for name, set_ in study.config.questions.items() if set_.records is not None}
    digests_asked = {name: digest(Path(study.at(file))) for name, file in asked.items()}
    return {"config": study.config.model_dump(), **digests, ASKED: digests_asked}


def _check_asked(before: Mapping[str, str], now: Mapping[str, str], *, where: str) -> None:
    """Refuse other questions in a file of the same name: arms that have answered would be compared with new ones."""
    for name, digest_now in now.items():
        if before.get(name, digest_now) != digest_now:
            problem = f"the file of the questions '{name}' has changed since they were taken from it"
            remedy = "Restore it and put the new ones into a file and a set of their own, or give --out another folder."
            raise ConfigError(problem, where=where, remedy=remedy)


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
