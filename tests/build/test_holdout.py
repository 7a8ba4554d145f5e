"""Hold-out: nothing leaks from a clean build, and each planted leak is named."""

from __future__ import annotations

from dataclasses import replace

import PIL.Image
import pytest

from mmit.build.annotated import Dropped, Made, Recipe, annotated
from mmit.build.holdout import Plan, held_out
from mmit.errors import ConfigError
from mmit.records import Image, Record, Text, Turn
from mmit.templates.bank import Bank, Template

COLOUR = Bank(
    "colour",
    (
        Template("what", "{{ image }}What color is shown in the image number {{ n }}?|||{{ colour }}"),
        Template("name", "{{ image }}Name the color of this plain picture.|||{{ colour }}"),
    ),
    cluster="attributes",
    fields=("image", "colour"),
)
SIDE = Bank("side", (Template("where", "{{ image }}On which side is the spot?|||{{ side }}"),), cluster="place")
PLAN = Plan(clusters=("place",))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of two clusters, built with the second one held out, on images of their own. Do not change them."""
    folder = tmp_path_factory.mktemp("images")

    def rows():
        for n in range(1, 121):
            path = folder / f"{n}.png"
            if not path.exists():
                PIL.Image.new("RGB", (2, 2), (n, 2 * n, 0)).save(path)
            yield n, {"image": Image(str(path)), "id": f"r{n}", "n": n, "colour": "red", "side": "left"}

    recipe = Recipe(held_out=("place",), set_aside=0.2, shots={0: 0.7, 1: 0.3})
    made = annotated(rows, (COLOUR, SIDE), recipe, source="rows", licence="MIT")
    return [item.record for item in made if isinstance(item, Made)]


def kinds(records, plan=PLAN):
    return [leak.kind for leak in held_out(lambda: records, plan)[1]]


def test_a_clean_build_leaks_nothing(records):
    made, found = held_out(lambda: records, PLAN)
    assert not found
    sides = [(item.task, item.held_out) for item in made]
    assert len(sides) == len(records) and set(sides) == {("colour", False), ("side", True)}


def test_the_same_images_are_set_aside_wherever_they_lie(tmp_path):
    recipe, found = Recipe(held_out=("place",), set_aside=0.3), []
    for place in ("here", "elsewhere"):

        def rows(folder=tmp_path / place):
            folder.mkdir(exist_ok=True)
            for n in range(1, 31):
                PIL.Image.new("RGB", (2, 2), (n, 2 * n, 0)).save(folder / f"{n}.png")
                row = {"image": Image(str(folder / f"{n}.png")), "id": f"r{n}", "n": n, "colour": "red", "side": "left"}
                yield n, row

        made = annotated(rows, (COLOUR, SIDE), recipe, source="rows", licence="MIT")
        found.append({(item.record.id, item.held_out) for item in made if isinstance(item, Made)})
    assert found[0] == found[1] and {held for _, held in found[0]} == {True, False}


def test_three_planted_leaks_are_named(records, tmp_path):
    kept = next(r for r in records if r.meta["task"] == "side")
    trained = [r for r in records if r.meta["task"] == "colour" and len(r.images) == 1]
    copy = tmp_path / "copy.png"  # the same bytes under another name
    copy.write_bytes(open(kept.images[0].source, "rb").read())
    image = replace(trained[0], id="planted/image", turns=_ask(Image(str(copy)), "What color is it?"))
    row = replace(trained[1], id=f"{kept.id[:-11]}/colour/{trained[1].meta['build']['template']}")
    near = replace(
        trained[2],
        id="planted/template",
        turns=_ask(trained[2].images[0], "On which side is the small spot?"),
        meta={"task": "spots", "cluster": "other", "build": {"how": "annotated", "template": "x"}},
    )
    _, found = held_out(lambda: [*records, image, row, near], PLAN)
    assert [(leak.kind, leak.train) for leak in found] == [
        ("image", "planted/image"),
        ("source", row.id),
        ("template", "planted/template"),
    ]
    assert found[0].held_out == kept.id and "small spot' is nearly 'on which side" in found[2].what
    made, left = held_out(lambda: [*records, image, row, near], PLAN, drop_leaks=True)
    made = list(made)
    assert not left and len(made) == len(records) + 3
    assert len({item.reason for item in made if isinstance(item, Dropped)}) == 3


def _ask(image: Image, text: str) -> tuple[Turn, ...]:
    return (Turn("user", (image, Text(text))), Turn("assistant", (Text("left"),)))


def test_a_held_out_row_among_the_solved_examples_is_a_leak(records):
    kept = next(r for r in records if r.meta["task"] == "side")
    trained = next(r for r in records if r.meta["task"] == "colour")
    shown = replace(
        trained, id="shown", meta=trained.meta | {"build": trained.meta["build"] | {"shots": [kept.id[:-11]]}}
    )
    assert kept.id.endswith("/side/where") and kinds([*records, shown]) == ["source"]


def test_images_are_set_apart_where_both_sides_ask_about_all(tmp_path):
    rows = []
    for n in range(200):
        image = Image(str(tmp_path / f"{n}.png"))
        PIL.Image.new("RGB", (2, 2), (n, 0, 0)).save(image.source)
        for task in ("colour", "side"):
            words = {"colour": "What color is the square?", "side": "Where does it lie, left or right?"}[task]
            rows.append(
                Record(_ask(image, words), id=f"{n}/{task}", source="s", row=n, meta={"task": task, "cluster": task})
            )
    plan = Plan(clusters=("side",), images=0.2)
    assert set(kinds(rows, replace(plan, images=None))) == {"image", "source"}
    made, found = held_out(lambda: rows, plan)
    made = list(made)
    assert not found and len(made) == 400
    sides = {True: set(), False: set()}
    for item in made:
        if isinstance(item, Made):
            sides[item.held_out].add(item.record.images[0].source)
    assert sides[True] and not sides[True] & sides[False] and len(sides[True] | sides[False]) == 200
    assert 0.12 < len(sides[True]) / 200 < 0.28


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"clusters": ("plase",)}, r"cluster 'plase'(.|\n)*'place'"),
        ({"tasks": ("colr",)}, r"task 'colr'(.|\n)*'colour'"),
        ({"clusters": ("place", "attributes")}, "every record is held out"),
        ({}, "nothing is held out"),
        ({"clusters": ("place",), "images": 1.5}, "holdout.images"),
        ({"clusters": ("place",), "check": ("picture",)}, "unknown check 'picture'"),
    ],
)
def test_plans_that_cannot_be_followed(records, plan, said):
    with pytest.raises(ConfigError, match=said):
        held_out(lambda: records, Plan(**plan))
