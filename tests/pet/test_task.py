"""The folder of a task: what it takes for the same task, and what a digest is of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.errors import ConfigError
from mmit.pet import Example
from mmit.pet.task import Fitted, begun, digest_of_rows, fitted_models, read_state, write_state
from mmit.records import Image

ASKED = {"model": "start", "generations": {"count": 1, "factor": 5.0}, "labelled": "a"}


def test_a_folder_goes_on_with_the_same_task_and_with_more_generations(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    done = begun(folder, ASKED)
    assert done == {"asked": ASKED, "models": {}} and not folder.exists()
    write_state(folder, done | {"before": {"what": 0.5}})
    assert begun(folder, ASKED)["before"] == {"what": 0.5}
    more: dict[str, Any] = {**ASKED, "generations": {"count": 3, "factor": 5.0}, "unlabelled": "u"}
    assert begun(folder, more)["asked"]["unlabelled"] == "u"
    for key, value, told in (
        ("model", "other", "settings of 'model'"),
        ("generations", {"count": 1, "factor": 2.0}, "settings of 'generations'"),
        ("labelled", "b", "rows of 'labelled'"),
    ):
        with pytest.raises(ConfigError, match=f"was begun with other {told}"):
            begun(folder, {**ASKED, key: value})


def test_a_folder_of_something_else_and_one_without_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no fit.json"):
        begun(tmp_path, ASKED)
    with pytest.raises(ConfigError, match="no model was fitted here"):
        fitted_models(tmp_path)
    write_state(tmp_path, {"asked": ASKED, "models": {}})
    with pytest.raises(ConfigError, match="before the first model"):
        fitted_models(tmp_path)
    fitted = Fitted("what", 0, 0, "g0/1_what-0", 4, 0.25, 0.5)
    write_state(tmp_path, {"asked": ASKED, "models": {fitted.run: asdict(fitted)}})
    assert fitted_models(tmp_path) == [fitted] and read_state(tmp_path)["asked"] == ASKED


def test_rows_are_known_by_what_they_hold_and_not_by_where_it_lies(tmp_path: Path) -> None:
    def rows(name: str, colour: str, *, label: str = "red") -> list[Example]:
        path = tmp_path / name
        PIL.Image.new("RGB", (4, 4), colour).save(path)
        return [Example({"image": Image(str(path)), "size": 3}, label, name, 1)]

    first = digest_of_rows(rows("a.png", "red"))
    assert digest_of_rows(rows("b.png", "red")) == first
    assert digest_of_rows(rows("a.png", "blue")) != first
    assert digest_of_rows(rows("c.png", "red", label="blue")) != first
