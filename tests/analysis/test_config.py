"""A study's YAML: what does not fit together is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmit.analysis.config import load_study, pairs, varied
from mmit.errors import ConfigError
from tests.analysis.worlds import write_world


def test_a_study_knows_what_varies_and_its_contrasts(tmp_path):
    study = load_study(write_world(tmp_path))
    assert varied(study) == "build.templates.count" and pairs(study) == [("two", "one")]


@pytest.mark.parametrize(
    "keys, problem, remedy",
    [
        ({"study": "template"}, "there is no study 'template'", "templates"),
        ({"seeds": [1, 2, 1]}, "seed 1 is given twice", "another"),
        ({"arms": {"a": {"data.size": 3}, "b": {"data.size": 4, "data.corrupt": 0.1}}}, "in 2 things", "one key"),
        ({"arms": {"a": {"data.size": 3}, "b": {"data.size": 3}}}, "the same as 'a'", "study: custom"),
        ({"arms": {"a": {"size": 3}}}, "unknown key 'size'", "data."),
        ({"arms": {"a": {"data.sise": 3}}}, "unknown key 'data.sise'", "size"),
        ({"contrasts": [["two", "three"]]}, "no pair of two arms", "two"),
        ({"contrasts": [["two", "two"]]}, "no pair of two arms", "different"),
        ({"arms": {"start": {}, "b": {"data.size": 3}}}, "'start' cannot be a name", "letters"),
        ({"arms": {"a/b": {}, "b": {"data.size": 3}}}, "'a/b' cannot be a name", "letters"),
        ({"questions": {"two words": {"task": "pope"}}}, "'two words' cannot be a name", "underscores"),
        ({"records": "data.jsonl"}, "either build or records", "one of the two"),
        ({"questions": {"q": {"task": "pope", "records": "x.jsonl"}}}, "both given", "or records"),
        (
            {"study": "outputs", "arms": {"all": {}, "best": {"data.select": {"by": "score", "keep": 5}}}},
            "without a random control of equal size",
            "by: random, keep: 5",
        ),
    ],
)
def test_what_does_not_fit_together(tmp_path, keys, problem, remedy):
    with pytest.raises(ConfigError) as error:
        load_study(write_world(tmp_path, **keys))
    assert problem in str(error.value) and remedy in (error.value.remedy or "")


def test_an_unknown_key_has_its_line(tmp_path):
    path = write_world(tmp_path)
    path.write_text(path.read_text() + "margins: 0.1\n")
    with pytest.raises(ConfigError, match="study.yaml:.*margins"):
        load_study(path)


def test_a_control_of_equal_arms_is_a_custom_study(tmp_path):
    study = load_study(write_world(tmp_path, study="custom", arms={"a": {}, "b": {}}))
    assert varied(study) is None


def test_numbers_are_names_of_arms(tmp_path):
    path = write_world(tmp_path)
    path.write_text(path.read_text().replace("one:", "1:").replace("two:", "2:") + "contrasts: [[2, 1]]\n")
    assert pairs(load_study(path)) == [("2", "1")]


SHIPPED = [path for path in sorted(Path("configs/analyse").glob("*.yaml")) if not path.stem.endswith("_build")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_can_be_read(path):
    study = load_study(path)
    assert len(study.arms) > 1 and study.study in path.read_text()
    for file in (study.base, study.build):
        assert (path.parent / str(file)).is_file()
