"""The YAML file of a study: arms that differ in one thing, seeds, questions, contrasts.

In: a file. Out: a `StudyConfig` whose arms, seeds and contrasts fit together. Runs nothing. A key of an arm says where
it acts: `build.KEY` in the build config that makes the arm's records, `data.KEY` on the records
(`mmit.analysis.transform`), `config.KEY` in the training config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from mmit.analysis.kinds import STUDIES
from mmit.analysis.transform import Transform
from mmit.errors import ConfigError, nearest
from mmit.sections import Section, config_error
from mmit.yamlio import parse_yaml

START = "start"  # the folder of the run that all arms start from
_NAME = {"arms": re.compile(r"\w[\w .+%-]*"), "questions": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")}
SPACES = ("build", "data", "config")


class QuestionsConfig(Section):
    """A set of questions that every arm answers."""

    task: str | None = None
    """name or YAML of a task of `mmit eval`; null makes the questions from `build` or `records`"""
    build: dict[str, Any] = {}
    """keys of the study's build config that are others for these questions, such as rows.split: test"""
    records: str | None = None
    """file with questions and answers, in place of a build; in any format, as the study's records"""
    tasks: list[str] = []
    """only questions of these tasks; all by default"""
    limit: PositiveInt = 500
    """questions asked, a fixed sample"""
    metric: str = "exact"
    """how an answer is judged, as in a task of `mmit eval`"""
    max_new_tokens: PositiveInt = 16
    """longest answer in tokens"""


class StudyConfig(Section):
    """One study."""

    study: str
    """which kind of study it is"""
    question: str
    """the question that it answers, in one sentence"""
    base: str
    """training config that every arm uses"""
    build: str | None = None
    """build config (`mmit build annotated`) that makes each arm's records"""
    records: str | None = None
    """file to train on, in place of a build: mmit records or another format that `mmit data import` reads, such as
    LLaVA's; each row with a `task`"""
    image_root: str | None = None
    """where relative image paths of `records` start, of questions too; null: each file's own folder"""
    start_from: str | None = None
    """run or checkpoint whose weights every arm starts from; null: each starts as the training config says"""
    start: dict[str, Any] | None = None
    """in place of start_from: keys, as an arm has them, of a run that is trained first and that every arm starts from,
    such as one that aligns the projector; of `config` and `data` it takes the first alone"""
    shared: str | None = None
    """folder for what several studies compute alike: features, built records, the start; null: in the study's own. It
    knows a start by its keys and its base: remove it when files that these name have changed"""
    config: dict[str, Any] = {}
    """keys of the training config that are others in every arm, such as train.steps"""
    data: dict[str, Any] = {}
    """transforms of the records of every arm"""
    arms: dict[str, dict[str, Any]]
    """the arms by name: what is different in each; every arm differs from the first in one key"""
    seeds: list[NonNegativeInt] = Field(min_length=1)
    """of data, order and initial weights; the same for all arms"""
    questions: dict[str, QuestionsConfig]
    """sets of questions by name"""
    contrasts: list[list[str]] = []
    """pairs of arms, [a, b] for a minus b; by default each arm against the first"""
    margin: PositiveFloat = 0.05
    """a difference smaller than this counts as none"""
    controls: bool = True
    """also ask the first arm without images and with other images, and the untuned model"""
    style: Literal["none", "rules"] = "none"
    """measure the style of the answers too"""


def load_study(path: Path) -> StudyConfig:
    """Read a study's YAML and check that its parts fit together. Raises ConfigError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read: {error}", where=str(path), remedy="Check the path.") from None
    raw, lines = parse_yaml(text, where=str(path))
    if not isinstance(raw, Mapping):
        raise ConfigError("is no mapping", where=str(path), remedy="See configs/analyse/ for examples.")
    if isinstance(raw.get("arms"), Mapping):  # YAML reads the name 10 as a number
        raw = {**raw, "arms": {str(name): arm or {} for name, arm in raw["arms"].items()}}
    if isinstance(raw.get("contrasts"), list):
        raw = {**raw, "contrasts": [[str(n) for n in c] if isinstance(c, list) else c for c in raw["contrasts"]]}
    try:
        study = StudyConfig.model_validate(raw)
    except ValidationError as error:
        origins = {keys: f"{path}:{line}" for keys, line in lines.items()}
        raise config_error(error, StudyConfig, raw, where=str(path), origins=origins) from None
    _check(study, str(path))
    return study


def _check(study: StudyConfig, where: str) -> None:
    if study.study not in STUDIES:
        problem = f"there is no study '{study.study}'"
        raise ConfigError(problem, where=f"{where}: study", remedy=nearest(study.study, STUDIES))
    if (study.build is None) == (study.records is None):
        problem = "name what is trained on: either build or records"
        raise ConfigError(problem, where=where, remedy="Give the one of the two that makes the records.")
    if twice := sorted({seed for seed in study.seeds if study.seeds.count(seed) > 1}):
        problem = f"seed {twice[0]} is given twice"
        raise ConfigError(problem, where=f"{where}: seeds", remedy="A repeated seed adds no information: give another.")
    if not study.arms or not study.questions:
        raise ConfigError("has no arms or no questions", where=where, remedy="Give at least one of each.")
    for kind, names in (("arms", study.arms), ("questions", study.questions)):
        for name in names:
            if not _NAME[kind].fullmatch(name) or name == START:
                problem = f"'{name}' cannot be a name: a folder has it, and '{START}' is taken"
                remedy = "Use letters, digits, dots, dashes" + (
                    " and spaces." if kind == "arms" else " and underscores."
                )
                raise ConfigError(problem, where=f"{where}: {kind}", remedy=remedy)
    for name, arm in study.arms.items():
        _check_arm(study, name, arm, where)
    for pair in study.contrasts:
        unknown = [name for name in pair if name not in study.arms]
        if unknown or len(pair) != 2 or pair[0] == pair[1]:
            problem = f"{pair} is no pair of two arms"
            remedy = nearest(unknown[0], study.arms) if unknown else "Give two different arms: [a, b]"
            raise ConfigError(problem, where=f"{where}: contrasts", remedy=remedy)
    for name, asked in study.questions.items():
        given = [key for key in ("task", "records") if getattr(asked, key) is not None]
        if len(given) > 1 or (not given and study.build is None):
            problem = f"questions '{name}' have no source" if not given else "task and records are both given"
            raise ConfigError(problem, where=f"{where}: questions", remedy="Give task, or records, or build.")
    _check_selection(study, where)
    if study.start is not None and study.start_from is not None:
        problem = "start and start_from are both given"
        raise ConfigError(problem, where=where, remedy="Give the run there is, or the keys of one to be trained.")
    _check_keys(study, study.start or {}, f"{where}: start")


def _check_arm(study: StudyConfig, name: str, arm: Mapping[str, Any], where: str) -> None:
    place = f"{where}: arms.{name}"
    _check_keys(study, arm, place)
    first, base = next(iter(study.arms.items()))
    changed = [key for key in {**base, **arm} if base.get(key) != arm.get(key)]
    if len(changed) > 1 and study.study != "mixture":  # the shares of a mixture are one thing
        problem = f"differs from '{first}' in {len(changed)} things: {', '.join(sorted(changed))}"
        remedy = "Let each arm differ from the first in one key; else nobody can tell which of them it was."
        raise ConfigError(problem, where=place, remedy=remedy)
    if not changed and name != first and study.study != "custom":
        remedy = f"Change one key of it. For a control of equal arms (A/A), take study: custom, not {study.study}."
        raise ConfigError(f"is the same as '{first}'", where=place, remedy=remedy)


def _check_keys(study: StudyConfig, arm: Mapping[str, Any], place: str) -> None:
    for key in arm:
        space, _, rest = key.partition(".")
        if space not in SPACES or not rest:
            remedy = "Begin with build. (its build config), data. (its records) or config. (its training config)."
            raise ConfigError(f"unknown key '{key}'", where=place, remedy=remedy)
        if space == "build" and study.build is None:
            raise ConfigError(f"'{key}', but the study has no build", where=place, remedy="Give build, or data. keys.")
    Transform.of(transforms(study, arm), where=place)


def _check_selection(study: StudyConfig, where: str) -> None:
    """A selection by score is refused without a random one of the same size: fewer records alone can do as much."""
    chosen = {name: transforms(study, arm).get("select") for name, arm in study.arms.items()}
    random_sizes = {s.get("keep") for s in chosen.values() if isinstance(s, Mapping) and s.get("by") == "random"}
    for name, selection in chosen.items():
        if isinstance(selection, Mapping) and selection.get("by") != "random":
            if selection.get("keep") in random_sizes:
                continue
            problem = f"selects {selection.get('keep')} records without a random control of equal size"
            remedy = f"Add an arm with data.select: {{by: random, keep: {selection.get('keep')}}}."
            raise ConfigError(problem, where=f"{where}: arms.{name}", remedy=remedy)


def overrides(arm: Mapping[str, Any], space: str) -> dict[str, Any]:
    """Return the keys of an arm that act in one space, without its name."""
    return {key.partition(".")[2]: value for key, value in arm.items() if key.startswith(f"{space}.")}


def transforms(study: StudyConfig, arm: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transforms of an arm's records: those of the study, then its own."""
    return {**study.data, **overrides(arm, "data")}


def pairs(study: StudyConfig) -> list[tuple[str, str]]:
    """Return the contrasts of a study: as given, else each arm against the first."""
    if study.contrasts:
        return [(a, b) for a, b in study.contrasts]
    first, *others = study.arms
    return [(name, first) for name in others]


def varied(study: StudyConfig) -> str | None:
    """Return the one key in which the arms differ, None where they differ in several or in none."""
    arms = list(study.arms.values())
    keys = {key for arm in arms for key in arm if any(other.get(key) != arm[key] for other in arms)}
    return keys.pop() if len(keys) == 1 else None
