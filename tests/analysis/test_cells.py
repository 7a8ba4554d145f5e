"""What a study knows of questions: label spaces, and records in any format."""

from __future__ import annotations

import json

import PIL.Image
import pytest

from mmit.analysis.cells import Question, Table, chance, with_spaces
from mmit.analysis.data import base_records
from mmit.errors import RecordError
from mmit.records import Record


def table(*references: str, choices: tuple[str, ...] = ()) -> Table:
    return Table("q", [Question(str(n), "", "side", "side", choices, ref) for n, ref in enumerate(references)])


def trained(*answers: str) -> list[Record]:
    return [Record.triple("Which side?", answer, meta={"task": "side"}) for answer in answers]


def test_answers_that_repeat_as_labels_do_are_the_label_space():
    asked = table("left", "Right ")
    assert with_spaces(asked, trained(*["left", "right", "both"] * 4)) == {"side"}
    assert chance(asked) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "asked, answers",
    [
        (table("left", "above"), ["left", "right"] * 4),  # a reference that is none of them
        (table("left"), ["left", "right", "a long text"] * 3),  # each three times
        (table("left"), []),
        (table("1"), [str(n) for n in range(51)] * 4),  # more than labels are
    ],
)
def test_a_label_space_that_nothing_shows_stays_unknown(asked, answers):
    assert not with_spaces(asked, trained(*answers)) and chance(asked) is None


def test_choices_that_a_question_names_stay():
    asked = table("left", choices=("left", "right", "above", "below"))
    assert not with_spaces(asked, trained(*["left", "right"] * 4)) and chance(asked) == 0.25


def test_records_may_be_in_llavas_layout_with_images_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhich side?"}, {"from": "gpt", "value": "left"}]
    rows = [{"id": "a", "image": "a.png", "task": "side", "conversations": talk}]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    [record] = base_records(path, image_root=str(tmp_path / "images"))
    assert record.meta["task"] == "side" and record.images[0].source == str(tmp_path / "images" / "a.png")
    path.write_text('[{"neither": 1}]')
    with pytest.raises(RecordError, match=r"mine\.json"):
        base_records(path)
