"""What a study found: means, contrasts, baselines, trends and style, as plain data.

In: a `Study` with some or all of its cells. Out: one dict that the reports show and report.json holds. Failed arms are
listed; arms that have not run yet are too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.analysis.cells import Question, Table, chance, majority, question_of, sensitivity, table_of, with_spaces
from mmit.analysis.config import overrides, pairs, transforms, varied
from mmit.analysis.curves import saturating, slope_per_doubling
from mmit.analysis.data import base_records
from mmit.analysis.kinds import ALWAYS, AMOUNTS, LIMITS
from mmit.analysis.mixture import proposal
from mmit.analysis.statistics import contrast, estimate, judged
from mmit.analysis.style import StyleScore, features, in_frame
from mmit.data.image_identity import image_name

if TYPE_CHECKING:
    from mmit.analysis.study import Cell, Study
    from mmit.records import Record


def findings(study: Study) -> dict[str, Any]:
    """Return all that is known so far. Raises MmitError: arms answered different questions."""
    config = study.config
    cells = [cell for cell in study.cells if cell.done]
    tables = {name: _table(study, name, cells) for name in config.questions}
    given = _rows(study)
    contrasts = [
        (name, contrast(a, b, table.scores, table.images, margin=config.margin))
        for name, table in tables.items()
        for a, b in pairs(config)
        if table.scores.keys() >= {a, b} and table.scores[a].keys() & table.scores[b].keys()
    ]
    # Holm's adjustment covers all contrasts of the study, whatever set of questions they are on.
    results = judged([found for _, found in contrasts])
    return {
        "study": config.study,
        "question": config.question,
        "varies": varied(config),
        "seeds": config.seeds,
        "margin": config.margin,
        "arms": {arm: _arm(study, arm) for arm in config.arms},
        "questions": {name: _of_table(study, table, given) for name, table in tables.items()},
        "contrasts": [
            {"questions": name, **result.to_json()} for (name, _), result in zip(contrasts, results, strict=True)
        ],
        "failed": [{"arm": c.arm, "seed": c.seed, **c.failed} for c in study.cells if c.failed],
        "waiting": [f"{c.arm}, seed {c.seed}" for c in study.cells if not c.done and not c.failed],
        "commands": [step.shown for step in study.steps],
        "cannot_tell": [*_few_seeds(config.seeds), *_asked_in_training(study, given), LIMITS[config.study], *ALWAYS],
    }


def _few_seeds(seeds: list[int]) -> list[str]:
    if len(seeds) == 1:
        return ["One seed: there is no interval, since nothing shows how much another seed would differ."]
    return []


def _asked_in_training(study: Study, trained: list[Record]) -> list[str]:
    """Say of each set of questions how many are also trained on: their scores hold what was learned by heart."""
    seen = {(_shown(record), turn.text.strip()) for record in trained for turn in record.turns if turn.role == "user"}
    told = []
    for name in study.config.questions:
        file = study.out / "questions" / name / "questions.jsonl"
        asked = base_records(file) if file.is_file() else []
        last = [[turn.text.strip() for turn in record.turns if turn.role == "user"][-1:] for record in asked]
        count = sum((_shown(record), "".join(text)) in seen for record, text in zip(asked, last, strict=True))
        if count:
            among = f"{count} of {len(asked)} questions of '{name}' are among the records that are trained on"
            told.append(f"{among}: their score is no measure of new questions. Ask about records that are held out.")
    return told


def _shown(record: Record) -> tuple[str, ...]:
    return tuple(image_name(image) for image in record.images)


def _table(study: Study, name: str, cells: list[Cell]) -> Table:
    file = study.out / "questions" / name / "questions.jsonl"
    known: dict[str, Question] = {}
    if file.is_file():
        known = {record.id: question_of(record) for record in base_records(file)}
    folders = {(cell.arm, cell.seed): study.answers_of(cell.arm, cell.seed, name) for cell in cells}
    return table_of(name, folders, known)


def _arm(study: Study, arm: str) -> dict[str, Any]:
    """Return an arm's difference and what its runs took: steps, tokens, images, seconds."""
    took: dict[str, list[float]] = {}
    for cell in study.cells:
        if cell.arm == arm and cell.done:
            for key, value in _cost(cell.folder / "run").items():
                took.setdefault(key, []).append(value)
    return {"keys": study.config.arms[arm], "cost": {key: float(np.mean(values)) for key, values in took.items()}}


def _cost(run: Path) -> dict[str, float]:
    from mmit.train.monitor.run_files import read_metrics

    steps = read_metrics(run).steps
    if not steps:
        return {}
    found = {"steps": float(steps[-1]["step"]), "epochs": float(steps[-1]["epoch"])}
    return found | {key: float(sum(row[key] for row in steps)) for key in ("records", "tokens", "seconds")}


def _of_table(study: Study, table: Table, given: list[Record]) -> dict[str, Any]:
    if not table.questions:
        return {"n": 0, "arms": {}, "baselines": {}, "by_task": {}}
    # Not those of an arm: a small one may lack answers, and one in a style says none of them as it is asked for.
    spaces = with_spaces(table, given)
    by_task = table.by("task")
    return {
        "spaces_from_answers": sorted(spaces),
        "n": len(table.questions),
        "images": len(set(table.images)),
        "arms": {arm: estimate(table.stacked(arm), table.images).to_json() for arm in table.scores},
        "baselines": _baselines(study, table, given),
        "by_task": {
            task: {
                **{arm: float(table.stacked(arm)[:, places].mean()) for arm in table.scores},
                "random in label space": chance(table.of(places, task)),
            }
            for task, places in by_task.items()
            if len(by_task) > 1
        },
        "sensitivity": {arm: found for arm in table.scores if (found := sensitivity(table, arm))},
        "trend": _trend(study, table),
        "mixture": _mixture(study, table) if study.config.study == "mixture" else None,
        "style": _style(study, table) if study.config.style == "rules" else {},
    }


def _rows(study: Study) -> list[Record]:
    """Return the records that arms are made of, before an arm leaves some out or changes their answers."""
    if study.config.build is None:
        return study.own_records()
    for cell in study.cells:
        folder = study.build_of(overrides(study.keys_of(cell.arm), "build"), cell.seed) / "data"
        if (folder / "build.json").is_file():
            return base_records(folder)
    return []


def _baselines(study: Study, table: Table, given: list[Record]) -> dict[str, float | None]:
    """Return what costs no ability; None where it is not known, as the label space of open questions."""
    found: dict[str, float | None] = {
        "random in label space": chance(table),
        "commonest answer of the task": majority(table, given),
    }
    report = study.out / "controls" / table.name / "report.json"
    if report.is_file():
        rows = json.loads(report.read_text("utf-8"))
        for key, words in CONTROLS.items():
            value = _value(rows, key)
            if value is not None:
                found[words] = value
    return found


CONTROLS = {
    "untuned": "the model before tuning",
    "blank_image": "first arm, blank images",
    "swapped_images": "first arm, images of other questions",
}


def _value(report: dict[str, Any], key: str) -> float | None:
    row = report["baselines"].get(key) or report.get(key)
    return float(row["accuracy"]) if row else None


def _trend(study: Study, table: Table) -> dict[str, Any] | None:
    """Return slope and curve over the arms' amounts, where these are numbers."""
    key = AMOUNTS.get(study.config.study)
    amounts: dict[float, dict[int, float]] = {}
    for arm, by_seed in table.scores.items():
        amount = study.config.arms[arm].get(key or "")
        if isinstance(amount, int) and not isinstance(amount, bool):
            amounts[float(amount)] = {seed: float(row.mean()) for seed, row in by_seed.items()}
    slope = slope_per_doubling(amounts)
    if slope is None:
        return None
    found: dict[str, Any] = {"key": key, "slope_per_doubling": slope}
    if study.config.study == "size":
        found["curve"] = saturating(amounts, margin=study.config.margin)
    return found


def _mixture(study: Study, table: Table) -> dict[str, Any] | None:
    """Return the surface over the arms' shares, None where arms have none or are too few."""
    given = {arm: transforms(study.config, study.config.arms[arm]) for arm in table.scores}
    sizes = {keys.get("size") for keys in given.values()}
    size = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(size, int) or not all(keys.get("shares") for keys in given.values()):
        return None
    scores = {arm: {seed: float(row.mean()) for seed, row in by.items()} for arm, by in table.scores.items()}
    return proposal({arm: keys["shares"] for arm, keys in given.items()}, scores, size=size)


def _style(study: Study, table: Table) -> dict[str, Any]:
    """Return for each arm what its answers sound like; all seeds' answers together."""
    frames = {arm: transforms(study.config, keys).get("style", "{answer}") for arm, keys in study.config.arms.items()}
    frame = next((f for f in frames.values() if f != "{answer}"), "{answer}")
    learned = _learned(study, frames)
    found: dict[str, Any] = {}
    for arm, by_seed in table.answers.items():
        said = [answer for answers in by_seed.values() for answer in answers]
        row = features(said) | {"in_frame": in_frame(said, frame)}
        found[arm] = row | ({"learned": learned.share(said)} if learned else {})
    return found


def _learned(study: Study, frames: dict[str, str]) -> StyleScore | None:
    """Return the score of two styles, learned from the training answers of a plain arm and of a styled one."""
    texts: dict[bool, list[str]] = {}
    for cell in study.cells:
        styled = frames[cell.arm] != "{answer}"
        folder = cell.folder / "data" / "records"
        if cell.done and styled not in texts and folder.is_dir():
            texts[styled] = [record.turns[-1].text for record in base_records(folder)]
    return StyleScore(texts[False], texts[True]) if len(texts) == 2 else None
