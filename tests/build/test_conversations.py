"""Conversations about scenes: the real number of captions, leaks of the sources dropped, answers held against facts."""

from __future__ import annotations

import pytest

from mmit.build.conversations import SOURCES, _Asked, _turns, context
from mmit.build.facts import FactCheck
from mmit.build.scenes import Box, Scene
from mmit.records import Image
from mmit.teachers.request import Reply, Request


def scene(**changes) -> Scene:
    facts = {"colour": "blue", "shape": "circle"}
    held = {"captions": ("A cup.", "A blue cup."), "boxes": (Box("cup", (0.1, 0.2, 0.5, 0.75)),)}
    return Scene("s", Image("a.png"), **(held | {"facts": facts, "source": "f", "row": 1, "licence": "MIT"} | changes))


def test_the_teacher_is_told_the_real_number_of_captions_and_all_boxes():
    assert context(scene()) == (
        "2 captions of the image:\n- A cup.\n- A blue cup.\n\nObjects, with left, top, right and bottom as shares of "
        "the image's width and height:\n- cup: [0.100, 0.200, 0.500, 0.750]"
    )
    assert context(scene(captions=("A cup.",), boxes=())) == "One caption of the image:\n- A cup."
    assert context(scene(captions=())).startswith("There is no caption.\n\nObjects")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The captions agree that it is a cup.", True),
        ("The bounding-box lies at the left.", True),
        ("It stands at [0.1, 0.2, 0.5, 0.75].", True),
        ("It spans 0.12, 0.45 of it.", True),
        ("A rectangle with a width of 0.453 and a height of .531.", True),
        ("Based on the description, it is a cup.", True),
        ("The text says that it is a cup.", True),
        ("A captain stands beside three boxes of 12, 13 and 14 kg.", False),
        ("The text on the sign reads Stop.", False),
        ("It costs 0.50 euros, or 1.125 dollars; pi is 3.141.", False),
    ],
)
def test_texts_that_let_their_sources_through(text, found):
    assert bool(SOURCES.search(text)) == found


@pytest.mark.parametrize("kind", ["conversation", "detail"])
def test_a_reply_that_lets_its_sources_through_is_left_out(kind):
    def turns_of(answer: str) -> tuple[list, str]:
        text = answer if kind == "detail" else f"Question: What is it?\nAnswer: {answer}"
        return _turns(_Asked(scene(), kind, "Describe it.", Request(())), Reply("1", "t", text), thoughts=False)

    turns, reason = turns_of("It is a blue cup on a table.")
    assert [turn.role for turn in turns] == ["user", "assistant"] and not reason
    turns, reason = turns_of("The captions agree that it is a blue cup.")
    assert turns == [] and "captions" in reason


@pytest.mark.parametrize(
    ("question", "answer", "verdict"),
    [
        ("Which colour?", "It is blue.", True),
        ("Which colour?", "It is red.", False),
        ("Is it red?", "No, it is blue.", True),
        ("Is it red?", "No, it isn't red.", True),
        ("Is it blue?", "It is not blue.", False),
        ("Is it a blue circle?", "Yes.", True),
        ("Is it a blue square?", "No.", True),
        ("Is it a blue circle?", "No.", False),
        ("Is it red or blue?", "Red or blue.", False),
        ("What is there?", "A large circle.", True),
        ("Are there circles?", "Two red circles.", False),
        ("How do you feel?", "Fine.", None),
        ("Is there no circle?", "No.", None),
    ],
)
def test_answers_are_held_against_facts(question, answer, verdict):
    check = FactCheck([{"colour": "blue", "shape": "circle"}, {"colour": "red", "shape": "square"}])
    assert check.add(question, answer, {"colour": "blue", "shape": "circle"}, image="1") is verdict


def test_the_report_counts_images_not_answers():
    check = FactCheck([{"colour": "blue"}, {"colour": "red"}])
    for n in range(40):
        check.add("Which?", "Red" if n % 4 == 0 else "Blue", {"colour": "blue"}, image=str(n // 2))
    check.add("Which?", "Who knows", {"colour": "blue"}, image="x")
    found = check.report()
    assert (found["answers"], found["checked"], found["right"], found["share"]) == (41, 40, 30, 0.75)
    assert found["interval"][0] < 0.75 < found["interval"][1] and found["wrong by attribute"] == {"colour": 10}
