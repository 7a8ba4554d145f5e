"""`mmit analyse`: one command for each kind of study, a plan that runs nothing, arms by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmit.analysis.kinds import STUDIES
from tests.analysis.worlds import write_world
from tests.cli.commands import assert_one_message, good, mmit


def test_every_kind_of_study_is_a_command() -> None:
    text = good("analyse", "--help").stdout
    assert all(f" {kind} " in text and about[:40] in text for kind, about in STUDIES.items())
    assert " arm " not in text  # which studies call themselves


def test_a_plan_lists_what_is_left_and_runs_nothing(tmp_path: Path) -> None:
    path = write_world(tmp_path, seeds=[0])
    said = good("analyse", "templates", path, "--out", tmp_path / "out", "--plan").stdout.splitlines()
    assert said[-1] == f"{len(said) - 1} steps left; its time is known once the first arm has run"
    assert len(said) == 1 + 2 * 4 and all(line.startswith("mmit ") for line in said[:-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [kind for kind in STUDIES if kind != "templates"])
def test_a_study_of_another_kind_is_sent_to_its_own_command(tmp_path: Path, kind: str) -> None:
    path = write_world(tmp_path)
    done = mmit("analyse", kind, path, "--out", tmp_path / "out")
    assert_one_message(done, f"is a study of kind templates, not {kind}", f"mmit analyse templates {path}")
    assert not (tmp_path / "out").exists()


def test_an_arm_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_world(tmp_path)
    assert_one_message(mmit("analyse", "arm", path, "tow", 0, "--out", tmp_path / "out"), "'tow'", "did you mean 'two'")
    # The common start is an arm only where the study has one.
    assert_one_message(mmit("analyse", "arm", path, "start", 0, "--out", tmp_path / "out"), "there is no arm 'start'")


def test_a_report_of_what_has_run_so_far(tmp_path: Path) -> None:
    path = write_world(tmp_path)
    said = good("analyse", "report", path, "--out", tmp_path / "out").stdout
    assert f"wrote {tmp_path / 'out'}/report.html, report.md, report.json and plot.svg" in said
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "out" / name).stat().st_size
