"""The folder of a task:

    fit.json                     what was asked for, and every model with its accuracy before and after
    g0/1_what-0/                 the run of a pattern's first repetition; g1/, g2/ of later generations (iPET)
    g0/1_what-0.scores.npz       what it says of the unlabelled rows
    labelled/                    a build: records with soft labels, which every `mmit data` command reads
    student/                     the run that learned them

Owns fit.json. Refuses a folder that was begun with other settings, rows, images or wordings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.data.image_identity import image_digest
from mmit.errors import ConfigError
from mmit.io import write_atomic
from mmit.records import Image

if TYPE_CHECKING:
    from mmit.pet.patterns import Pattern
    from mmit.pet.rows import Example

STATE, LABELLED, STUDENT = "fit.json", "labelled", "student"
OTHER = {"labelled": "rows", "unlabelled": "rows", "patterns": "wordings or answers"}  # what of a key has changed


@dataclass(frozen=True)
class Fitted:
    """A model of one pattern."""

    pattern: str
    repetition: int
    generation: int
    run: str  # its folder, from that of the task
    rows: int  # it was fitted to
    before: float  # accuracy on the labelled rows, before
    after: float  # and after


def read_state(folder: Path) -> dict[str, Any]:
    """What fit.json says: `asked`, `before` and `models`."""
    return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))


def write_state(folder: Path, done: Mapping[str, Any]) -> None:
    """Write fit.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / STATE, json.dumps(done, indent=1, ensure_ascii=False) + "\n")


def fitted_models(folder: Path) -> list[Fitted]:
    """Return the models of a task's folder. Raises ConfigError if there are none."""
    path = folder / STATE
    if not path.is_file():
        remedy = "Run mmit pet fit first, with the same --out."
        raise ConfigError("no model was fitted here", where=str(folder), remedy=remedy)
    found = [Fitted(**facts) for facts in read_state(folder)["models"].values()]
    if not found:
        raise ConfigError("fitting was stopped before the first model", where=str(path), remedy="Run it again.")
    return found


def short_digest(facts: Any) -> str:
    """A digest of JSON values, and of images by their contents."""
    text = json.dumps(facts, default=lambda value: image_digest(value) if isinstance(value, Image) else str(value))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_rows(rows: Sequence[Example]) -> str:
    """Of what rows hold, wherever they lie."""
    return short_digest([[dict(row.fields), row.label] for row in rows])


def digest_of_pattern(pattern: Pattern) -> str:
    """Of its wording, and of what each label is said as."""
    return short_digest([pattern.template.jinja, pattern.verbalizer])


def begun(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder holds of this task, or a new beginning. Raises ConfigError for another's."""
    asked = json.loads(json.dumps(asked))
    if (folder / STATE).is_file():
        done = read_state(folder)
        for key in asked:
            # What was not asked before is asked from now on: `unlabelled` with the first further generation.
            if _first(done["asked"].setdefault(key, asked[key])) != _first(asked[key]):
                what = OTHER.get(key, "settings")
                remedy = "Set them back, or give --out a new folder."
                raise ConfigError(f"was begun with other {what} of '{key}'", where=str(folder / STATE), remedy=remedy)
        return done
    if folder.exists() and any(folder.iterdir()):
        problem = "the folder is not empty, and holds no fit.json"
        raise ConfigError(problem, where=str(folder), remedy="Give --out a new folder.")
    return {"asked": asked, "models": {}}


def _first(asked: Any) -> Any:
    """Settings without the number of generations, of which more can be asked for later."""
    return {k: v for k, v in asked.items() if k != "count"} if isinstance(asked, Mapping) else asked
