"""Answers without thought and questions put differently, on items of a few words."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mmit.errors import ConfigError, MmitError
from mmit.eval.probes import chance, possible_answers, sensitivity, swapped, wordings
from mmit.eval.questions import Item
from mmit.eval.tasks import Task
from mmit.records import Image, Record, Text, Turn


def task(**given: Any) -> Task:
    return Task(**{"name": "t", "metric": "exact", "records": "a.jsonl", **given})


def item(name: str, *images: str, reference: Any = "x", choices: tuple[str, ...] = ()) -> Item:
    parts = (*map(Image, images), Text("What?"))
    return Item(name, Record((Turn("user", parts),), id=name), reference, None, choices)


@pytest.mark.parametrize(
    ("asked", "given", "possible"),
    [
        (item("a", choices=("u", "v")), {"answers": ["w"]}, ("u", "v")),
        (item("a", reference={"options": ["one", "two", "three"]}), {}, ["A", "B", "C"]),
        (item("a", reference={"options": {"B": "one", "D": "two"}}), {"answers": ["w"]}, ["B", "D"]),
        (item("a"), {"answers": ["w", "z"]}, ["w", "z"]),
        (item("a"), {"metric": "pope:official"}, ("yes", "no")),
        (item("a"), {}, ()),
    ],
)
def test_possible_answers_are_the_nearest_that_are_known(asked: Item, given: Any, possible: Any) -> None:
    assert possible_answers(task(**given), asked) == possible


def test_a_guess_hangs_on_the_seed_and_the_question_alone() -> None:
    items = [item(str(n), choices=("u", "v", "w")) for n in range(600)]
    model, other = chance(task(), items, seed=1), chance(task(), items, seed=2)
    assert model is not None and other is not None
    records = [one.prompt for one in items]
    found = model.generate(records)
    assert model.generate(records[::-1])[::-1] == found != other.generate(records)
    assert len(Counter(found)) == 3 and min(Counter(found).values()) > 150
    assert chance(task(), [item("a")], seed=1) is None
    mixed = chance(task(), [item("a"), items[0]], seed=1)
    assert mixed is not None and mixed.generate([item("a").prompt]) == [""]


def test_every_question_gets_anothers_pictures_and_none_its_own() -> None:
    items = [item("0"), *(item(str(n), f"{n % 5}.jpg") for n in range(1, 20))]
    found = swapped(items, seed=3)
    assert [one.id for one in found] == [str(n) for n in range(1, 20)]  # those without pictures are left out
    own = {one.id: one.prompt.images for one in items}
    assert all(one.prompt.images != own[one.id] and one.text == "What?" for one in found)
    assert {one.prompt.images for one in found} == {one.prompt.images for one in items[1:]}
    assert swapped([item("a", "same.jpg"), item("b", "same.jpg")], seed=3) == []


def test_where_there_are_fewer_pictures_they_come_again() -> None:
    two, one = swapped([item("a", "1.jpg", "2.jpg"), item("b", "3.jpg")], seed=0)
    assert [image.source for image in two.prompt.images] == ["3.jpg", "3.jpg"]
    assert [image.source for image in one.prompt.images] == ["1.jpg"]
    both, _ = swapped([item("a", "1.jpg", "2.jpg"), item("b", "3.jpg", "4.jpg")], seed=0)
    assert [image.source for image in both.prompt.images] == ["3.jpg", "4.jpg"]


def test_the_own_wording_comes_first_and_none_twice() -> None:
    prompts = [one.prompt for one in wordings(task(prompt="{question}!"), 9, pictures=False)]
    assert prompts[0] == "{question}!" and len(set(prompts)) == 9 and not any("picture" in one for one in prompts)
    assert all("{question}!" in one for one in prompts)
    own = task(templates=["a {question}", "{question}"])
    assert [one.prompt for one in wordings(own, 2, pictures=True)] == ["{question}", "a {question}"]
    with pytest.raises(ConfigError, match="3 wordings") as error:
        wordings(own, 3, pictures=True)
    assert error.value.remedy.startswith("Ask for 2 to 2")


def test_sensitivity_is_the_deviation_in_shares_of_the_mean() -> None:
    assert sensitivity([0.4, 0.6]) == pytest.approx({"mean": 0.5, "min": 0.4, "max": 0.6, "sensitivity": 0.2})
    assert sensitivity([0.0, 0.0])["sensitivity"] is None
    with pytest.raises(MmitError, match="no scores"):
        sensitivity([])
