"""Settings of the stages: what each takes, and the key that the refusal of all else names."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.errors import ConfigError
from mmit.pet.settings import Fitting, Generations, Labelling


def test_the_defaults_are_the_papers() -> None:
    assert (Fitting().repetitions, Fitting().lm, Labelling().temperature) == (3, 1e-4, 2.0)
    assert (Generations().count, Generations().factor, Generations().share) == (1, 5.0, 0.25)


@pytest.mark.parametrize(
    ("kind", "given", "where"),
    [
        (Fitting, {"repetitions": 0}, "fit.repetitions"),
        (Fitting, {"repetitions": True}, "fit.repetitions"),
        (Fitting, {"steps": 1.5}, "steps"),
        (Fitting, {"steps": "x"}, "steps"),
        (Generations, {"count": "2"}, "generations.count"),
        (Generations, {"factor": 1}, "generations.factor"),
        (Generations, {"share": 0}, "generations.share"),
        (Generations, {"share": True}, "generations.share"),
        (Labelling, {"temperature": 0}, "label.temperature"),
        (Labelling, {"calibrate": 1}, "label.calibrate"),
    ],
)
def test_a_value_that_no_stage_could_use_is_refused_by_its_key(kind: Any, given: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**given)
    assert caught.value.where == where and str(next(iter(given.values()))) in caught.value.problem


def test_a_misspelt_weighting_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        Labelling(weights="acuracy")
    assert caught.value.where == "label.weights" and "accuracy" in (caught.value.remedy or "")
