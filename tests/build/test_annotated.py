"""Rows x templates: shares, provenance, hold-out without a shared image, and every row accounted for."""

from __future__ import annotations

import collections
import re

import pytest

from mmit.build.annotated import Dropped, Made, Recipe, annotated
from mmit.build.licences import check_allowed, combined
from mmit.errors import ConfigError
from mmit.records import Image
from mmit.templates.bank import Bank, Template
from mmit.templates.options import OptionStyle

COLOURS = ("red", "green", "blue")
COLOUR = Bank(
    "colour",
    (
        Template("what", "{{ image }}Which colour?|||{{ colour }}", choices=COLOURS),
        Template("name", "{{ image }}Name the colour.|||{{ colour }}", choices=COLOURS),
        Template("turned", "{{ image }}Ask for {{ colour }}.|||Which colour?", inverted=True),
        Template("kept", "{{ image }}Say the colour.|||{{ colour }}", choices=COLOURS, split="held_out"),
    ),
    cluster="attributes",
    fields=("image", "colour"),
    licence="CC0-1.0",
)
PLACE = Bank("place", (Template("where", "{{ image }}Where?|||{{ place }}"),), cluster="place", licence="CC0-1.0")


def rows(count: int = 300, *, per_image: int = 3):
    def open_rows():
        for i in range(count):
            image = Image(f"/images/{i // per_image}.png")
            place = "left" if i % 2 else "right"
            yield i + 1, {"image": image, "id": f"r{i}", "colour": COLOURS[i % 3], "place": place}

    return open_rows


def build(recipe: Recipe, banks=(COLOUR,), open_rows=None):
    return list(annotated(open_rows or rows(), banks, recipe, source="rows.jsonl", licence="MIT"))


def test_wrong_examples_show_an_answer_of_the_label_space_and_never_the_right_one():
    right = {f"r{i}": COLOURS[i % 3] for i in range(300)}
    for item in build(Recipe(shots={2: 1.0}, shot_answers="wrong")):
        shown = re.findall("|".join(COLOURS), item.record.turns[0].text)
        assert len(shown) == 2 and item.record.turns[-1].text == right[item.record.id.partition("/")[0]]
        for name, answer in zip(item.record.meta["build"]["shots"], shown, strict=True):
            assert answer != right[name]
    open_ended = build(Recipe(shots={1: 1.0}, shot_answers="wrong"), (PLACE,))
    assert {item.reason for item in open_ended} == {"an example has no wrong answer"}
    with pytest.raises(ConfigError, match="shot_answers"):
        Recipe(shot_answers="wrongs")


def test_every_row_becomes_a_record_with_its_provenance():
    made = build(Recipe(seed=1))
    assert len(made) == 300 and all(isinstance(item, Made) for item in made)
    record = made[0].record
    assert record.licence == "CC0-1.0 AND MIT" and (record.source, record.row) == ("rows.jsonl", 1)
    assert record.meta["task"] == "colour" and record.meta["choices"] == list(COLOURS)
    assert record.meta["build"].keys() >= {"how", "template", "digest", "inverted", "options", "shots", "seed"}
    assert {item.record.meta["build"]["template"] for item in made} == {"what", "name"}


def test_a_record_depends_on_seed_task_and_row_alone():
    recipe = Recipe(seed=3, options=OptionStyle(0.5, ("letters", "dashes")), inversion=0.3)
    whole = [item.record for item in build(recipe)]
    assert whole == [item.record for item in build(recipe, (PLACE, COLOUR)) if item.task == "colour"]

    def from_the_end():
        yield from reversed(list(rows()()))

    assert whole == [item.record for item in build(recipe, open_rows=from_the_end)][::-1]
    assert whole != [item.record for item in build(Recipe(seed=4, options=recipe.options, inversion=0.3))]


def test_shares_hold_and_wordings_kept_for_evaluation_stay_out():
    recipe = Recipe(inversion=0.3, shots={0: 0.7, 2: 0.3}, per_row=1)
    made = build(recipe, open_rows=rows(20_000))
    builds = [item.record.meta["build"] for item in made]
    assert abs(sum(b["inverted"] for b in builds) / 20_000 - 0.3) < 0.01
    assert abs(sum(len(b["shots"]) == 2 for b in builds) / 20_000 - 0.3) < 0.01
    assert all(b["template"] != "kept" for b in builds)
    assert {b.record.meta["build"]["template"] for b in build(Recipe(split="held_out"))} == {"kept"}


def test_examples_share_no_image_with_the_question_nor_with_held_out_rows():
    recipe = Recipe(shots={2: 1.0}, held_out=("place",), set_aside=0.2)
    made = build(recipe, (COLOUR, PLACE), rows(3000))
    trained, kept = set(), set()
    for item in made:
        images = [image.source for image in item.record.images]
        assert len(images) == 3 and len(set(images)) == 3
        (kept if item.held_out else trained).update(images)
    assert trained and kept and not trained & kept
    assert {item.task for item in made if item.held_out} == {"place"}
    share = len(kept) / len(kept | trained)
    assert 0.15 < share < 0.25


def test_rows_that_do_not_suit_are_dropped_one_by_one_with_the_reason():
    def some_bad():
        for number, row in rows(30)():
            if number % 10 == 0:
                row = row | {"colour": [None, "", float("nan")][number // 10 % 3]}
            if number == 5:
                row.pop("colour")
            yield number, row

    made = build(Recipe(), open_rows=some_bad)
    bad = [item for item in made if isinstance(item, Dropped)]
    assert len(made) == 30 and [item.row for item in bad] == [f"rows.jsonl:{n}" for n in (5, 10, 20, 30)]
    text = "\n".join(item.text or item.reason for item in bad)
    assert "no field 'colour'" in text and "answer is empty" in text and "not finite" in text and "null" in text


def test_reasons_are_few_whatever_the_rows_hold():
    """A thousand wrong labels and long fields are two lines of build.json; dropped.jsonl tells each."""

    def all_bad():
        for number, row in rows(40)():
            colour = f"colour {number}" if number % 2 else "x" * (100_001 + number)
            yield number, row | {"colour": colour}

    made = build(Recipe(), open_rows=all_bad)
    reasons = collections.Counter(item.reason for item in made)
    assert set(reasons) == {"the answer … is not among the choices", "the field 'colour' has … characters, at most …"}
    assert made[0].text == "the answer 'colour 1' is not among the choices"


@pytest.mark.parametrize(
    ("recipe", "banks", "said"),
    [
        ({"held_out": ("plase",)}, (COLOUR, PLACE), r"no bank is of the cluster 'plase'(.|\n)*'place'"),
        ({"held_out": ("place", "attributes")}, (COLOUR, PLACE), "every task is held out"),
        ({"per_row": 5}, (COLOUR,), "5 wordings per row, but task 'colour' has 3"),
        ({}, (COLOUR, COLOUR), "two banks have the task 'colour'"),
        ({"inversion": 1.5}, (COLOUR,), "inversion"),
        ({"shots": {0: 0.5}}, (COLOUR,), "shares sum to 0.5"),
        ({"held_out": ("place",), "set_aside": 1.0}, (COLOUR, PLACE), "holdout.images"),
        ({"shots": {32: 1.0}}, (COLOUR,), "only 9 rows share no image"),
    ],
)
def test_recipes_that_cannot_be_followed(recipe, banks, said):
    with pytest.raises(ConfigError, match=said):
        build(Recipe(**recipe), banks, rows(30))


def test_fields_that_the_rows_lack_are_told_before_anything_is_made():
    bank = Bank("t", (Template("t", "{{ colr }}|||x"),), fields=("colr",), where="bank.yaml")
    with pytest.raises(ConfigError, match=r"bank.yaml: the rows have no field 'colr'(.|\n)*'colour'"):
        build(Recipe(), (bank,))


def test_licences_combine_and_are_held_against_a_list():
    assert combined(["MIT", "CC-BY-4.0 AND MIT", None]) == "CC-BY-4.0 AND LicenseRef-unknown AND MIT"
    counts = collections.Counter({"MIT AND CC-BY-4.0": 3, "CC-BY-NC-SA-4.0 AND MIT": 2, "GPL-3.0-only OR MIT": 1})
    with pytest.raises(ConfigError, match=r"CC-BY-NC-SA-4.0 \(2 rows\)"):
        check_allowed(counts, None, where="x")
    check_allowed(counts, ["MIT", "CC-BY-4.0", "CC-BY-NC-SA-4.0"], where="x")
    with pytest.raises(ConfigError, match=r"CC-BY-4.0 \(3 rows\)"):
        check_allowed(counts, ["MIT", "CC-BY-NC-SA-4.0"], where="x")
    for term in ("LicenseRef-unknown", "GPL-3.0-only", "AGPL-3.0-or-later"):
        with pytest.raises(ConfigError, match=term):
            check_allowed(collections.Counter({term: 1}), None, where="x")


@pytest.mark.slow
def test_shares_over_fifty_thousand_draws():
    """Shots, options and inversion within 1 %, letters uniform (chi-squared, p > .001), no example that leaks."""
    recipe = Recipe(
        inversion=0.3,
        shots={0: 0.7, 2: 0.3},
        options=OptionStyle(0.5, ("letters",), "mark"),
        held_out=("place",),
        set_aside=0.1,
    )
    made = [item for item in build(recipe, (COLOUR, PLACE), rows(56_000)) if isinstance(item, Made)]
    kept = {image.source for item in made if item.held_out for image in item.record.images}
    trained = [item.record for item in made if not item.held_out]
    assert len(trained) > 50_000 and kept
    builds = [record.meta["build"] for record in trained]
    plain = [record for record in trained if not record.meta["build"]["inverted"]]
    assert abs(len(plain) / len(trained) - 0.7) < 0.01
    assert abs(sum(len(b["shots"]) == 2 for b in builds) / len(builds) - 0.3) < 0.01
    listed = [record for record in plain if record.meta["build"]["options"]]
    assert abs(len(listed) / len(plain) - 0.5) < 0.01
    letters = collections.Counter(record.turns[-1].text for record in listed)
    expected = len(listed) / 3
    assert set(letters) == set("ABC") and sum((n - expected) ** 2 / expected for n in letters.values()) < 13.8
    for record in trained:
        images = [image.source for image in record.images]
        assert len(set(images)) == len(images) and kept.isdisjoint(images)
