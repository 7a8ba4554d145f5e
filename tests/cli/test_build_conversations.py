"""`mmit build conversations`: scenes of any layout, a reason for every row that is none, and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import PIL.Image
import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.records import Record, read_jsonl, write_jsonl
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server

COCO = Path(__file__).parents[3] / "shared" / "data" / "llava_eval_table" / "caps_boxes_coco2014_val_80.jsonl"


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
