"""`mmit build conversations`: the real number of captions, leaks of the sources dropped, answers held against facts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import PIL.Image
import pytest
from typer.testing import CliRunner

from mmit.build.conversations import SOURCES, _Asked, _turns, context
from mmit.build.facts import FactCheck
from mmit.build.scenes import Box, Scene
from mmit.cli import app
from mmit.records import Image, Record, read_jsonl, write_jsonl
from mmit.teachers.request import Reply, Request
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server

COCO = Path(__file__).parents[3] / "shared" / "data" / "llava_eval_table" / "caps_boxes_coco2014_val_80.jsonl"


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


def teacher(body) -> str:
    text = body["messages"][-1]["content"]
    name = re.search(r"- (\w+) (\w+): \[", text)
    said = f"{name[1]} {name[2]}" if name else "cup"
    if "Answer this question" in text:
        return f"A {said} stands there." if len(text) % 2 else "The captions show a cup."
    if "thought beyond" in text:
        return "Question: Why?\nAnswer: It may fall.\nQuestion: And?\nAnswer: So." if "cup" in said else "Why? So."
    return f"Question: What is it?\nAnswer: A {said}.\nQuestion: Is it green?\nAnswer: Yes, it is green."


def run(folder: Path, *options: object, code: int = 0, server: Server | None = None, **settings) -> str:
    if server is not None:
        settings["teacher"] = {"open": f"{server.url}#m", "terms": "MIT"}
    (folder / "c.yaml").write_text(dump_yaml(settings))
    command = ["build", "conversations", str(folder / "c.yaml"), "--out", str(folder / "out"), *map(str, options)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code, result.output
    return result.output


def dropped(folder: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (folder / "out/dropped.jsonl").read_text().splitlines()]


@pytest.fixture
def table(tmp_path):
    """Rows in LLaVA's layout, one of each fault."""
    PIL.Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    box = {"category": "cup", "bbox": [0.1, 0.2, 0.5, 0.75]}
    good = {"id": "g", "image": "a.png", "captions": ["A cup."] * 5, "instances": [box]}
    rows = [
        good,
        good | {"image": "none.png"},
        good | {"instances": [box | {"bbox": [0.5, 0.2, 0.1, 0.75]}]},
        good | {"instances": [{"category": "cup"}]},
        good | {"captions": [3]},
        good | {"captions": [], "instances": []},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_llavas_layout_and_a_reason_for_every_row_that_is_no_scene(table):
    rows = {"path": "rows.jsonl", "licence": "CC-BY-4.0"}
    with Server(teacher) as server:
        assert "3 requests" in run(table, "--dry-run", server=server, rows=rows)
        run(table, server=server, rows=rows)
        assert server.served == 3
        assert all("5 captions of the image" in body["messages"][1]["content"] for body in server.bodies)
    (record,) = read_jsonl(table / "out/records/conversations-conversation.jsonl")
    assert [turn.role for turn in record.turns] == ["user", "assistant"] * 2
    assert len(record.images) == 1 and record.turns[0].parts[0] == record.images[0]
    assert record.licence == "CC-BY-4.0 AND MIT"
    build = record.meta["build"]
    assert build["template"] == "conversation" and build["parents"] == ["g"] and build["prompt"] and build["request"]
    reasons = dropped(table)
    assert reasons[:5] == [
        "the image file is missing",
        "a box lies outside the image or is empty",
        "a box is not {category, bbox: [left, top, right, bottom]}",
        "a caption is no text",
        "neither captions nor boxes",
    ]
    assert "more than one question" in reasons
    stated = json.loads((table / "out/build.json").read_text())
    assert stated["in"] == 8 == sum(stated["accepted"].values()) + sum(stated["dropped"].values())


def test_records_with_boxes_in_pixels_in_their_meta(table):
    meta = {"captions": "A cup.", "objects": {"ref": ["cup"], "bbox": [[4, 4, 20, 15]]}}
    record = Record.triple("q", "a", images=[str(table / "a.png")], id="r", licence="MIT", meta=meta)
    write_jsonl([record], table / "in.jsonl")
    with Server(teacher) as server:
        run(table, server=server, records="in.jsonl", kinds=["conversation"])
        (body,) = server.bodies
    assert "One caption" in body["messages"][1]["content"]
    assert "- cup: [0.100, 0.200, 0.500, 0.750]" in body["messages"][1]["content"]


def test_the_share_of_right_answers_is_measured_on_easy_vqas_attributes(tmp_path):
    pytest.importorskip("easy_vqa")
    settings = {
        "rows": {"package": "easy-vqa-attributes", "split": "test"},
        "fields": {"box": "box", "category": ["colour", "shape"]},
        "facts": ["colour", "shape"],
        "kinds": ["conversation"],
    }
    with Server(teacher) as server:
        said = run(tmp_path, "--limit", 12, server=server, **settings)
    facts = json.loads((tmp_path / "out/build.json").read_text())["facts"]
    records = list(read_jsonl(tmp_path / "out/records/conversations-conversation.jsonl"))
    green = sum("green" in record.turns[1].text for record in records)
    assert facts["answers"] == facts["checked"] == 24 and facts["right"] == 12 + green and "facts:" in said
    assert sum(record.meta["facts"]["right"] for record in records) == facts["right"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kinds": ["detial"]}, "did you mean 'detail'"),
        ({"kinds": []}, "kinds"),
        ({"rounds": 0}, "rounds"),
        ({"fields": {"captions": "caption"}}, "did you mean 'captions'"),
        ({"facts": "colour"}, "facts"),
        ({"records": "x.jsonl"}, "exactly one of rows and records"),
    ],
)
def test_configs_that_cannot_be_built(table, settings, said):
    with Server() as server:
        assert said in run(table, code=2, server=server, **({"rows": {"path": "rows.jsonl"}} | settings))


@pytest.mark.skipif(not COCO.is_file(), reason="LLaVA's 80 captions and boxes are not at hand")
def test_llavas_own_80_rows_are_scenes(tmp_path):
    rows = [json.loads(line) for line in COCO.read_text().splitlines()]
    for row in rows:
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    with Server(lambda body: "Question: Who?\nAnswer: He.") as server:
        run(tmp_path, server=server, rows={"path": str(COCO), "image_root": ".", "licence": "CC-BY-4.0"})
        assert server.served == 240
        told = [body["messages"][1]["content"] for body in server.bodies]
    counts = [int(text.split()[0]) for text in told]
    assert sorted(counts) == sorted(3 * [len(row["captions"]) for row in rows])
