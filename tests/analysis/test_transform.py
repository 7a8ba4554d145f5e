"""What an arm does to records: only what was asked for, and the same for all arms."""

from __future__ import annotations

from collections import Counter

import PIL.Image
import pytest

from mmit.analysis.transform import GREY, Transform, transformed
from mmit.errors import ConfigError
from mmit.records import Image, Record, Text, Turn

COLOURS = ("red", "green", "blue")


def records(count: int = 60) -> list[Record]:
    made = []
    for number in range(count):
        task = ("colour", "shape")[number % 2]
        answer = COLOURS[number % 3] if task == "colour" else ("circle", "square")[(number // 2) % 2]
        made.append(
            Record(
                (Turn("user", (Image(f"{number}.png"), Text(f"What {task}?"))), Turn("assistant", (Text(answer),))),
                id=str(number),
                meta={"task": task, "choices": list(COLOURS)} if task == "colour" else {"task": task},
            )
        )
    return made


def changed(given: dict, *, seed: int = 0, of: list[Record] | None = None) -> list[Record]:
    return transformed(of or records(), Transform.of(given, where="arm"), seed=seed, where="arm")


def test_nothing_asked_for_changes_nothing():
    assert changed({}) == records()


def test_a_smaller_size_is_a_part_of_a_larger_one_and_another_seed_draws_others():
    small, large = ({r.id for r in changed({"size": size})} for size in (10, 30))
    assert len(small) == 10 and small < large
    assert {r.id for r in changed({"size": 10}, seed=1)} != small
    with pytest.raises(ConfigError, match="61 records are asked for, but there are 60"):
        changed({"size": 61})


def test_another_draw_has_other_records_with_the_same_seed():
    first, other = ({r.id for r in changed({"size": 20, "draw": draw})} for draw in (0, 1))
    assert first != other and len(other) == 20


def test_shares_and_caps_count_by_task():
    found = Counter(r.meta["task"] for r in changed({"shares": {"colour": 0.75, "shape": 0.25}, "size": 20}))
    assert found == {"colour": 15, "shape": 5}
    assert Counter(r.meta["task"] for r in changed({"caps": {"shape": 4}})) == {"colour": 30, "shape": 4}
    with pytest.raises(ConfigError, match="data.shares without data.size"):
        changed({"shares": {"colour": 1.0}})


def test_tasks_are_kept_by_name_or_number():
    assert {r.meta["task"] for r in changed({"tasks": ["shape"]})} == {"shape"}
    assert len({r.meta["task"] for r in changed({"task_count": 1})}) == 1
    with pytest.raises(ConfigError, match="no record is of the task 'colours'") as error:
        changed({"tasks": ["colours"]})
    assert "colour" in (error.value.remedy or "")


def test_corrupted_answers_are_wrong_answers_of_the_same_task():
    before, after = records(400), changed({"corrupt": 0.3}, of=records(400))
    wrong = [(a, b) for a, b in zip(before, after, strict=True) if a.turns[-1] != b.turns[-1]]
    assert 0.2 < len(wrong) / 400 < 0.4
    for a, b in wrong:
        known = COLOURS if a.meta["task"] == "colour" else ("circle", "square")
        assert b.turns[-1].text in known and b.turns[0] == a.turns[0]


def test_a_task_with_one_answer_cannot_be_corrupted():
    same = [Record(r.turns[:1] + (Turn("assistant", (Text("yes"),)),), meta={"task": "x"}) for r in records(4)]
    with pytest.raises(ConfigError, match="no wrong answer is known"):
        changed({"corrupt": 1.0}, of=same)


def test_definitions_leave_the_label_space_or_nothing():
    simplified = changed({"definition": "simplified"})
    assert simplified[0].turns[0].text == "Answer with one of: red, green, blue."
    assert simplified[1].turns[0].text == "Answer with one of: circle, square."  # no choices, but labels
    labels = [Record.triple("Which side?", side, meta={"task": "side"}) for side in ("right", "left") * 4]
    assert changed({"definition": "simplified"}, of=labels)[0].turns[0].text == "Answer with one of: left, right."
    assert changed({"definition": "simplified"}, of=labels[:6])[0].turns[0].text == "Answer."  # three times each
    empty = changed({"definition": "empty"})
    assert all(r.turns[0].text == "" and len(r.images) == 1 for r in empty)
    assert [r.turns[-1] for r in empty] == [r.turns[-1] for r in records()]
    text_only = [Record.triple("Say yes.", "yes", meta={"task": "x"})]
    with pytest.raises(ConfigError, match="nothing is left of it"):
        changed({"definition": "empty"}, of=text_only)


def test_a_swapped_image_changes_the_right_answer():
    right = {record.images[0].source: record.turns[-1].text for record in records()}
    for before, after in zip(records(), changed({"images": "swapped"}), strict=True):
        assert after.turns[-1] == before.turns[-1]
        assert right[after.images[0].source] != before.turns[-1].text


def test_blank_images_are_grey():
    for record in changed({"images": "blank"}):
        source = record.images[0].source
        assert isinstance(source, PIL.Image.Image) and source.getpixel((3, 3)) == GREY


def test_style_surrounds_the_answers_of_its_tasks():
    styled = changed({"style": "Surely: {answer}!", "style_tasks": ["shape"]})
    for before, after in zip(records(), styled, strict=True):
        said = before.turns[-1].text
        assert after.turns[-1].text == (f"Surely: {said}!" if before.meta["task"] == "shape" else said)


def test_selection_by_score_takes_the_best_and_by_chance_any():
    scored = [
        Record(r.turns, id=r.id, meta={**r.meta, "build": {"score": number % 10}}) for number, r in enumerate(records())
    ]
    best = changed({"select": {"by": "score", "keep": 6}}, of=scored)
    assert [r.meta["build"]["score"] for r in best] == [9] * 6
    chance = changed({"select": {"by": "random", "keep": 6}}, of=scored)
    assert len(chance) == 6 and {r.meta["build"]["score"] for r in chance} != {9}
    with pytest.raises(ConfigError, match="a record has no score"):
        changed({"select": {"by": "score", "keep": 6}})


@pytest.mark.parametrize(
    "given, problem",
    [
        ({"sizes": 3}, "unknown key 'data.sizes'"),
        ({"size": 0}, "data.size is 0"),
        ({"corrupt": 2}, "data.corrupt is 2"),
        ({"style": "no answer"}, "data.style"),
        ({"images": "grey"}, "data.images is 'grey'"),
        ({"shares": {"colour": 0.5}}, "data.shares"),
        ({"select": {"by": "luck", "keep": 2}}, "data.select"),
        ({"tasks": "colour"}, "data.tasks is 'colour'"),
    ],
)
def test_keys_that_cannot_be_used(given, problem):
    with pytest.raises(ConfigError) as error:
        Transform.of(given, where="arm")
    assert problem in str(error.value) and error.value.remedy


def test_a_record_without_a_task_is_named():
    with pytest.raises(ConfigError, match="no task in its meta"):
        changed({}, of=[Record.triple("Say yes.", "yes", id="one")])
