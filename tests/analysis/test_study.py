"""A whole study in miniature: its steps are mmit's own commands, and none of them is repeated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mmit.analysis.config import load_study
from mmit.analysis.execution import claim, run_study
from mmit.analysis.findings import findings
from mmit.analysis.report import markdown, write_report
from mmit.analysis.study import TIMES, Study, usual_jobs
from mmit.cores import usable
from mmit.errors import MmitError
from mmit.eval.answers import TUNED
from mmit.records import Record, read_jsonl, write_jsonl
from mmit.yamlio import dump_yaml, parse_yaml
from tests.analysis.worlds import here, write_world


def ran(out: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (out / TIMES).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    path = write_world(folder)
    study = Study(load_study(path), path, folder / "out")
    run_study(study, jobs=1, say=lambda text: None, execute=here)
    return study


def test_every_arm_answers_the_same_questions(finished):
    assert not finished.left()
    report = json.loads((finished.out / "arms/one/seed-0/eval/unseen/report.json").read_text())
    assert report["n"] == 8
    write_report(finished)
    found = json.loads((finished.out / "report.json").read_text())
    assert set(found["questions"]["unseen"]["arms"]) == {"one", "two"}
    assert found["questions"]["unseen"]["arms"]["one"]["seeds"] == 2
    assert found["questions"]["unseen"]["baselines"]["random in label space"] == 0.25
    assert found["contrasts"][0]["a"] == "two" and found["contrasts"][0]["holm"] is not None
    html = (finished.out / "report.html").read_text()
    assert (finished.out / "plot.svg").read_text() in html
    assert "<svg" in html and "What this cannot tell" in html and "mmit train --config" in html


def test_arms_that_answered_other_questions_and_scores_without_verdicts_are_refused(finished):
    path = finished.answers_of("two", 1, "unseen") / TUNED
    text = path.read_text()
    settings, *lines = text.splitlines()
    rows = [json.loads(line) for line in lines]
    try:
        for change, told in (
            ({"prompt": "another"}, "arm 'two', seed 1 answered other questions than the first arm"),
            ({"correct": None}, "no verdict on single answers"),
        ):
            changed = [rows[0] | change, *rows[1:]]
            path.write_text("\n".join([settings, *map(json.dumps, changed)]) + "\n")
            with pytest.raises(MmitError, match=told):
                findings(finished)
    finally:
        path.write_text(text)


def test_the_report_says_what_differs_and_what_is_unknown(finished):
    found = findings(finished)
    assert "The arms differ in `build.templates.count`." in markdown(found)
    found["arms"]["two"]["keys"] = {"data.images": "blank"}
    assert "The arms differ in `build.templates.count`, `data.images`." in markdown(found)
    found["arms"]["two"]["keys"] = found["arms"]["one"]["keys"]
    assert "The arms differ in nothing." in markdown(found)
    found["questions"]["unseen"]["baselines"]["random in label space"] = None
    assert "| random in label space | not known |" in markdown(found)


def test_arms_differ_in_their_wordings_alone(finished):
    texts = {}
    for arm in ("one", "two"):
        folder = finished.folder_of(arm, 0) / "data" / "records"
        texts[arm] = {r.turns[0].text for file in folder.glob("*.jsonl") for r in read_jsonl(file)}
    assert len(texts["one"]) == 1 and len(texts["two"]) == 2 and texts["one"] < texts["two"]
    configs = [(finished.folder_of(arm, 0) / "data" / "train.yaml").read_text() for arm in ("one", "two")]
    assert configs[0].replace("/one/", "/two/") == configs[1]


def test_a_finished_study_runs_nothing_again_and_a_lost_step_alone(finished):
    before = ran(finished.out)
    run_study(finished, jobs=1, say=lambda text: None, execute=here)
    assert ran(finished.out) == before
    (finished.answers_of("two", 1, "unseen") / "report.json").unlink()
    run_study(finished, jobs=1, say=lambda text: None, execute=here)
    assert ran(finished.out) == [*before, "two, seed 1: unseen"]


def test_arms_seeds_and_contrasts_can_be_added(finished):
    path = finished.path
    text = path.read_text()
    try:
        added = text.replace("seeds:", "contrasts:\n- [two, one]\nseeds:").replace("- 1\n", "- 1\n- 2\n", 1)
        path.write_text(added)
        study = Study(load_study(path), path, finished.out)
        new = [step.name for step in study.left() if step.kind == "train"]
        assert new == ["one, seed 2: train", "two, seed 2: train"]
        claim(study)
    finally:
        path.write_text(text)


def test_the_plan_lists_commands_and_runs_nothing(tmp_path):
    path = write_world(tmp_path)
    study = Study(load_study(path), path, tmp_path / "out")
    shown = [step.shown for step in study.left()]
    assert len(shown) == 4 * 4 and shown[0].startswith("mmit build annotated") and study.hours_left() is None
    assert not (tmp_path / "out").exists()


def test_what_arms_and_studies_share_is_made_once(tmp_path):
    common = {"start": {"config.train.steps": 1}, "seeds": [0], "shared": "shared"}
    asked = {"rows.path": "test.csv"}
    sets = {"unseen": {"build": {**asked, "templates.split": "held_out"}}, "seen": {"build": asked}}
    path = write_world(tmp_path, data={"size": 12}, questions=sets, **common)
    study = Study(load_study(path), path, tmp_path / "out")
    one = next(step for step in study.left() if step.kind == "eval")
    assert one.made == tuple(study.answers_of("one", 0, name) / "report.json" for name in ("unseen", "seen"))
    run_study(study, jobs=1, say=lambda text: None, execute=here)
    for arm in ("one", "two"):
        assert f"init_from: {study.start.folder}/run" in (study.folder_of(arm, 0) / "data" / "train.yaml").read_text()
    assert not any(cell.failed for cell in study.cells) and ran(study.out).count("start, seed 0: train") == 1
    assert not study.left() and ran(study.out).count("one, seed 0: unseen, seen") == 1  # one process asks both
    started = parse_yaml((study.start.folder / "run" / "config.yaml").read_text(), where="start")[0]
    armed = parse_yaml((study.folder_of("one", 0) / "data" / "train.yaml").read_text(), where="arm")[0]
    assert armed["train"]["precision"] == started["train"]["precision"] == "fp32"

    other = write_world(tmp_path / "other", data={"size": 8}, **{**common, "shared": "../shared"})
    for name in ("base.yaml", "build.yaml"):  # the same world by other paths
        other.write_text(other.read_text().replace(name, f"../{name}"))
    second = Study(load_study(other), other, tmp_path / "second")
    assert not [step.name for step in second.left() if step.shared]
    changed = Study(
        load_study(other).model_copy(update={"start": {"config.train.steps": 2}}), other, tmp_path / "third"
    )
    assert [step.name for step in changed.left() if step.shared] == ["start, seed 0: data", "start, seed 0: train"]


def test_the_plan_states_hours_by_what_ran_here_and_in_studies_alike(tmp_path):
    path = write_world(tmp_path, shared="shared", seeds=[0])
    study = Study(load_study(path), path, tmp_path / "out")
    row = {"kind": "train", "name": "a, seed 0: train", "like": study.like}
    rows = [row | {"seconds": 3000}, row | {"kind": "eval", "seconds": 600}, row | {"seconds": 9, "like": "another"}]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / TIMES).write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert study.hours_left() == 2 and study.hours_left(jobs=2) == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / TIMES).write_text(json.dumps(row | {"seconds": 1200}) + "\n")
    assert study.hours_left() == 1  # its own steps count before those of others
    longer = write_world(tmp_path, shared="shared", seeds=[0], config={"train.steps": 9})
    assert Study(load_study(longer), longer, tmp_path / "longer").hours_left() is None


def test_a_base_may_have_a_base_of_its_own(tmp_path):
    write_jsonl([Record.triple("q", "a", meta={"task": "t"})] * 4, tmp_path / "rows.jsonl")
    given = {"base": "mine.yaml", "build": None, "records": "rows.jsonl", "config": {"align.epochs": 3}}
    arms = {"a": {"data.size": 1}, "b": {"data.size": 2}}
    path = write_world(tmp_path, study="size", arms=arms, questions={"q": {"task": "pope"}}, **given)
    own = {
        "base": "base.yaml",
        "align": None,
        "train": {"steps": 7},
        "data": {"max_length": 99, "train": [{"path": "x"}]},
    }
    (tmp_path / "mine.yaml").write_text(dump_yaml(own))
    study = Study(load_study(path), path, tmp_path / "out")
    study.make_arm("b", 0)
    file = study.folder_of("b", 0) / "data" / "train.yaml"
    made = parse_yaml(file.read_text(), where="arm")[0]
    assert (file.parent / made["base"]).resolve() == (tmp_path / "base.yaml").resolve()
    assert made["train"] == {"steps": 7} and made["data"]["max_length"] == 99 and made["align"] == {"epochs": 3}
    assert [source["name"] for source in made["data"]["train"]] == ["t"]


@pytest.mark.skipif(sys.platform != "linux", reason="devices are files on Linux")
def test_an_accelerator_is_left_to_one_arm(tmp_path):
    assert usual_jobs(tmp_path) == min(2, len(usable()))
    (tmp_path / "nvidia0").write_text("")
    assert usual_jobs(tmp_path) == 1
