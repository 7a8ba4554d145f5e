"""The file of answers: what a stopped evaluation goes on from, and answers of something else, which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmit.errors import MmitError
from mmit.eval.answers import FORMAT, kept_settings, lines, merge, open_answers, rank_file, read_answers, scored_answers

SETTINGS = {"format": FORMAT, "task": "t", "number_format": "fp32"}
ASKED = {f"q{n}": {"id": f"q{n}", "prompt": f"p{n}", "images": [], "reference": "r", "group": None} for n in range(6)}


def answered(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    return [{**ASKED[f"q{n}"], "answer": f"a{n}", **more} for n in numbers]


def write(path: Path, rows: list[dict[str, Any]], tail: str = "", settings: Any = SETTINGS) -> Path:
    path.write_text(lines([settings, *rows]) + tail, "utf-8")
    return path


def test_a_half_line_is_cut_off_and_what_is_whole_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "answers.jsonl", answered(0, 3), tail='{"id": "q4", "pro')
    assert list(open_answers(path, SETTINGS, ASKED, overwrite=False)) == ["q0", "q3"]
    assert path.read_text("utf-8") == lines([SETTINGS, *answered(0, 3)])
    assert open_answers(path, SETTINGS, ASKED, overwrite=True) == {} and path.read_text("utf-8") == lines([SETTINGS])


def test_answers_of_all_ranks_are_moved_into_one_file_once(tmp_path: Path) -> None:
    path = write(tmp_path / "answers.jsonl", answered(0))
    for rank, numbers in ((1, (1, 4)), (2, (0, 5))):
        write(rank_file(path, rank), answered(*numbers), tail='{"id"')
    rank_file(path, 3).touch()
    assert sorted(merge(path, SETTINGS, ASKED)) == ["q0", "q1", "q4", "q5"]
    assert [p.name for p in tmp_path.iterdir()] == ["answers.jsonl"]
    assert sorted(read_answers(path, SETTINGS, ASKED)) == ["q0", "q1", "q4", "q5"]


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([], SETTINGS | {"task": "u"}, "task was 'u', is now 't'"),
        ([], {"format": "mmit answers 0"}, "not a file of answers of this version"),
        ([], [1], "not a file of answers of this version"),
        (answered(0, 0), SETTINGS, "'q0' is answered twice"),
        (answered(0, reference="other"), SETTINGS, "'q0' was another when it was answered: reference changed"),
        ([{"id": "q0"}], SETTINGS, "not an answer, so the file is damaged"),
    ],
)
def test_answers_of_something_else_are_refused_with_their_line(
    tmp_path: Path, rows: list[dict[str, Any]], settings: Any, problem: str
) -> None:
    path = write(tmp_path / "answers.jsonl", rows, settings=settings)
    with pytest.raises(MmitError, match=problem) as caught:
        open_answers(path, SETTINGS, ASKED, overwrite=False)
    assert (caught.value.where or "").startswith(f"{path}:") and "--overwrite" in (caught.value.remedy or "")


def test_a_number_format_that_an_earlier_version_did_not_write_is_no_other(tmp_path: Path) -> None:
    old = {key: value for key, value in SETTINGS.items() if key != "number_format"}
    path = write(tmp_path / "answers.jsonl", answered(0), settings=old)
    assert list(read_answers(path, SETTINGS, ASKED)) == ["q0"] and kept_settings(path, SETTINGS) == old
    other = write(tmp_path / "other.jsonl", [], settings=SETTINGS | {"number_format": "bf16"})
    with pytest.raises(MmitError, match="number_format was 'bf16'") as caught:
        read_answers(other, SETTINGS, ASKED)
    assert "--dtype bf16" in (caught.value.remedy or "")


def test_only_what_was_scored_to_its_end_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(MmitError, match="there are no answers"):
        scored_answers(path)
    write(path, answered(0, 1, correct=True))
    assert list(scored_answers(path)) == ["q0", "q1"]
    write(path, [*answered(0, correct=True), *answered(1)])
    with pytest.raises(MmitError, match="cut off before it was scored"):
        scored_answers(path)


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "answers.jsonl", [{**answered(0)[0], "answer": "\ud83d ü"}])
    assert read_answers(path, SETTINGS, ASKED)["q0"]["answer"] == "\ud83d ü"
