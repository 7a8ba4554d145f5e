"""MultiInstruct, Vision-Flan, M3IT, LAMM and PMC-VQA in their official layouts, with the trap of each."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS, detect_format, import_file
from mmit.errors import ConfigError, RecordError
from mmit.records import Image
from tests.data.formats.format_tools import bad_rows, imported, shape, texts, write

MULTIINSTRUCT: list[dict[str, Any]] = [
    {
        "unique_id": "mscoco_text_legibility_287140",
        "image_source": "coco2014",
        "task_name": "text_legibility",
        "image_path": "raw_datasets/MSCOCO2014/train2014/COCO_train2014_000000287140.jpg",
        "region": ["212.3 108.6 238.1 125.8"],
        "options": ["not clear and complete", "clear"],
        "target_txt": "clear",
        "prompt": "Decide if the text is legible. Region 212.3 108.6 238.1 125.8 "
        "\n\n[Options]: not clear and complete||||clear",
        "target": "clear",
    },
    {
        "unique_id": "mscoco_caption2014_392260",
        "image_source": "coco2014",
        "task_name": "image_caption",
        "image_path": "./raw_datasets/MSCOCO2014/train2014/COCO_train2014_000000047909.jpg",
        "target_txt": "A parade float.",
        "prompt": "Look at image and tell me what is the content.",
        "target": "A parade float.",
    },
    {
        "unique_id": "VQA_object_recognition_10141618",
        "task_name": "VQA_object_recognition",
        "image_path": "./raw_datasets/a.jpg",
        "question": "What is shown?",
        "target_txt": "bed",
        "options": ["swan", "bed"],
        "prompt": "What is shown?\n\n[Options]: swan||||bed\n            ",
        "target": "bed",
    },
]


def test_multiinstruct(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", MULTIINSTRUCT, lines=True)
    assert detect_format(path)[0] == "multiinstruct"
    records = imported(path, "multiinstruct", image_root="root")
    assert texts(records[0])[0][1].endswith("[Options]: not clear and complete||||clear")
    # One picture has one path, with or without the leading "./".
    assert [r.images[0].source for r in records[1:]] == [
        "root/raw_datasets/MSCOCO2014/train2014/COCO_train2014_000000047909.jpg",
        "root/raw_datasets/a.jpg",
    ]
    assert records[2].turns[0].text == "What is shown?\n\n[Options]: swan||||bed"
    assert records[0].id == "mscoco_text_legibility_287140" and records[0].meta["region"] == ["212.3 108.6 238.1 125.8"]
    spoken = imported(path, "multiinstruct", separator=", ")
    assert spoken[2].turns[0].text == "What is shown?\n\n[Options]: swan, bed"


def test_multiinstruct_refusals(tmp_path: Path) -> None:
    raw = {key: value for key, value in MULTIINSTRUCT[1].items() if key not in ("prompt", "target")}
    codes = {**MULTIINSTRUCT[1], "task_name": "infilling"}
    bad = bad_rows(write(tmp_path / "t.jsonl", [raw, codes, MULTIINSTRUCT[1]], lines=True), "multiinstruct")
    assert [e.problem for e in bad] == [
        "the row has no 'prompt'",
        "the target of task 'infilling' is a picture in the codes of OFA",
    ]
    assert "build_dataset.py" in bad[0].remedy and "Leave the task out" in bad[1].remedy
    with pytest.raises(ConfigError, match="option separator"):
        list(import_file(tmp_path / "t.jsonl", "multiinstruct", separator=3, on_bad=lambda error: None))


def talk(row_id: str, image: str | None, *values: str, **keys: Any) -> dict[str, Any]:
    turns = [{"from": s, "value": v} for s, v in zip(["human", "gpt"] * 9, values, strict=False)]
    return {"id": row_id, **({"image": image} if image else {}), "conversations": turns, **keys}


def test_vision_flan(tmp_path: Path) -> None:
    rows = [
        talk("7", "PACS+a_1.png", "<image>\nWhat?", "A pond", task_name="PACS+guitar_image_category_classification"),
        talk("coco+image_classification_000000012345", "x.jpg", "Why?\n<image>", "So."),
        talk("7", "VizWiz+OCR_830_n03272010.jpg", "<image>", "A."),
        talk("7", "y.jpg", "<image>", "A.", task_name="image_text_selection"),
        talk("odd", "odd.jpg", "<image>", "A."),
    ]
    path = write(tmp_path / "annotation_191-task_1k.json", rows)
    name, reason = detect_format(path)
    assert name == "vision_flan" and "dataset+task" in reason
    records = imported(path, "vision_flan", image_root="images_191task_1k")
    assert [r.meta for r in records] == [
        {"dataset": "PACS", "task": "guitar_image_category_classification"},
        {"dataset": "coco", "task": "image_classification"},
        {"dataset": "VizWiz", "task": "OCR"},
        {"task": "image_text_selection"},
        {},
    ]
    assert texts(records[1])[0] == ["[images_191task_1k/x.jpg]", "Why?"]
    # Ids repeat; the rows do not.
    assert [(r.id, r.row) for r in records][:3:2] == [("7", 1), ("7", 3)]
    bad = bad_rows(write(path, [talk("a+b_1", None, "<image>?", "x")]), "vision_flan")
    assert "no 'image'" in bad[0].problem and bad[0].where.endswith(":1 (a+b_1)")


PIXELS = base64.b64encode(b"\xff\xd8 one").decode()
OTHER = base64.urlsafe_b64encode(b"\xfb\xff two").decode().rstrip("=")


def test_m3it_as_its_script_writes_it(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Answer.", "inputs": "Who?", "image_base64_str": [PIXELS], "outputs": "A cab."},
        {"instruction": "Describe.", "inputs": "", "image_base64_str": PIXELS, "outputs": "A man."},
        {"instruction": "Compare.", "inputs": "x", "image_base64_str": [PIXELS, OTHER], "outputs": "Same."},
    ]
    path = write(tmp_path / "train.jsonl", rows, lines=True)
    assert detect_format(path)[0] == "m3it"
    records = imported(path, "m3it")
    assert records[0].images == (Image(b"\xff\xd8 one"),)
    # The instruction is part of what the user says, not a system text.
    assert [(r.turns[0].role, r.turns[0].text) for r in records] == [
        ("user", "Answer.\n\nWho?"),
        ("user", "Describe."),
        ("user", "Compare.\n\nx"),
    ]
    assert records[2].images[1] == Image(b"\xfb\xff two")


def test_m3it_as_its_files_are(tmp_path: Path) -> None:
    rows = [
        {"input": "Q", "img_str": PIXELS, "output": "A"},
        {"image_str": PIXELS, "meta": {"targets": ["A cat.", "A pet."], "img_id": "7"}},
        {"instruction": "Mine.", "inputs": "Q", "image": OTHER, "outputs": ["A", "B"]},
    ]
    path = write(tmp_path / "vqa" / "train.jsonl", rows, lines=True)
    assert detect_format(path) == ("m3it", "the first row has M3IT's 'img_str'")
    with pytest.raises(ConfigError, match="(?s)no instruction.*instructions.json"):
        list(import_file(path, "m3it"))
    bank = write(path.with_name("instructions.json"), ["Do it.", "Please do it."])
    records = imported(path, "m3it")
    assert all(r.turns[0].text.split("\n")[0] in ("Do it.", "Please do it.") for r in records[:2])
    assert records[2].turns[0].text == "Mine.\n\nQ"
    assert [r.turns[1].text for r in records] == ["A", "A cat.", "A"]
    assert [r.meta.get("references") for r in records] == [None, ["A cat.", "A pet."], ["A", "B"]]
    elsewhere = write(tmp_path / "other.json", ["Only."])
    assert imported(path, "m3it", instructions=str(elsewhere))[0].turns[0].text == "Only.\n\nQ"
    bank.write_text("{}")
    with pytest.raises(ConfigError, match="other than a list of texts"):
        list(import_file(path, "m3it"))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "a", "inputs": "b", "outputs": "c"}, "no picture"),
        ({"instruction": "a", "image_base64_str": ["%%"], "outputs": "c"}, "image_base64_str is not base64"),
        ({"instruction": "a", "image_base64_str": PIXELS}, "outputs is 'None'"),
        ({"instruction": "a", "image_base64_str": PIXELS, "outputs": []}, "outputs is an empty list"),
        ({"instruction": 1, "image_base64_str": PIXELS, "outputs": "a"}, "instruction is '1'"),
    ],
)
def test_m3it_refusals(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        FORMATS["m3it"](row)


def test_lamm(tmp_path: Path) -> None:
    facts = {"task_type": "conversation", "src_image": "coco2017"}
    rows = [
        talk("000000215677", "coco_images/000000215677.jpg", "What is it?", "A cat.", "Sure?", "Yes.", **facts),
        talk("2", "bamboo_images/2.jpg", "Explain the <image> tag.", "It shows.", **facts),
        talk("3", "textvqa_images/3.jpg", " What text? ", "STOP", **facts),
    ]
    path = write(tmp_path / "meta_file" / "LAMM_instruct_186k.json", rows)
    assert detect_format(path)[0] == "lamm"
    records = imported(path, "lamm", image_root="2D_Instruct")
    assert texts(records[0]) == [
        ["[2D_Instruct/coco_images/000000215677.jpg]", "What is it?"],
        ["A cat."],
        ["Sure?"],
        ["Yes."],
    ]
    assert texts(records[1])[0][1] == "Explain the <image> tag."
    assert records[0].meta == facts
    three_d = [talk("4", None, "Where?", "There.", pcl="scene0000_00.npy"), talk("5", None, "a", "b")]
    bad = bad_rows(write(path, three_d), "lamm")
    assert "point cloud" in bad[0].problem and "2D_Instruct" in bad[0].remedy and "no 'image'" in bad[1].problem


PMC_1 = '''Figure_path,Question,{answer},Choice A,Choice B,Choice C,Choice D,Answer_label
PMC1064097_F1.jpg,What pattern is it? ,Focal uptake,A:Diffuse uptake,B:Focal uptake,C:No uptake,D:Unclear,B
PMC2_F1.jpg,"Which, of these?", B:Two, A:One, B:Two, C:Three, D:Four,B
PMC3_F1.jpg,Same?,x," A: ""x"""," B:x"," C:x ",D:y,C
'''
PMC_2 = """index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split
0,PMC8253797_Fig4_11.jpg,"A caption, long", What is shown?, A:Liver , B:Kidney , C:Lung , D:Heart ,B,train
1,PMC2.jpg,C,Q?,A:a,B:b,C:c,D:d,D: d,train
2,PMC3.jpg,C,Q?,A:B,B:A,C:c,D:d,c,train
"""


@pytest.mark.parametrize("answer", ["Answer", "Anwser"])
def test_pmc_vqa(answer: str, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(PMC_1.format(answer=answer), "utf-8-sig")
    assert detect_format(path)[0] == "pmc_vqa"
    records = imported(path, "pmc_vqa", image_root="images")
    assert texts(records[0]) == [
        [
            "[images/PMC1064097_F1.jpg]",
            "What pattern is it?\nA: Diffuse uptake\nB: Focal uptake\nC: No uptake\nD: Unclear",
        ],
        ["B: Focal uptake"],
    ]
    assert [r.meta["label"] for r in records] == ["B", "B", "C"]
    assert [r.row for r in records] == [2, 3, 4] and records[0].licence == "CC-BY-SA"
    letters = imported(path, "pmc_vqa", style="letter", licence="mine")
    assert [r.turns[1].text for r in letters] == ["B", "B", "C"] and letters[0].licence == "mine"
    open_ = imported(path, "pmc_vqa", style="open")
    assert [r.turns[1].text for r in open_] == ["Focal uptake", "Two", "x"]
    assert open_[1].turns[0].text == "Which, of these?"


def test_pmc_vqa_second_version(tmp_path: Path) -> None:
    path = tmp_path / "train_2.csv"
    path.write_text(PMC_2)
    records = imported(path, "pmc_vqa", style="open")
    assert [r.turns[1].text for r in records] == ["Kidney", "d", "c"]
    assert records[0].meta == {"Caption": "A caption, long", "split": "train", "label": "B"}


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ("a,b,c,d,Answer none,", "the answer 'Answer none' fits 0 choices"),
        ("a,a,c,d,a,", "the answer 'a' fits 2 choices"),
        ("a,b,c,d,a,B", "the answer 'a' fits 1 choices, its label is B"),
        ("B,A,c,d,A,", "the answer 'A' fits 2 choices"),
        ("a,b,c,d,a,E", "Answer_label is 'E'"),
    ],
)
def test_pmc_vqa_refuses_contradictions(cells: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    header = "Figure_path,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer_label"
    path.write_text(f"{header}\nx.jpg,Q,{cells}\n")
    bad = bad_rows(path, "pmc_vqa")
    assert bad[0].problem == problem and bad[0].where == f"{path}:2"
    with pytest.raises(ConfigError, match="did you mean 'choice'"):
        list(import_file(path, "pmc_vqa", style="choise"))


def test_sharegpt4v_and_allava(tmp_path: Path) -> None:
    rows = [
        talk("000000000009", "coco/train2017/000000000009.jpg", "<image>\nDescribe.", "Food."),
        talk("sa_2", "sam/images/sa_2.jpg", "Describe.\n<image>", "A dog.", model="gpt4v"),
        talk("t", None, "Hi", "Hello"),
    ]
    path = write(tmp_path / "sharegpt4v_instruct_gpt4-vision_cap100k.json", rows)
    assert detect_format(path)[0] == "llava"
    records = imported(path, "sharegpt4v")
    assert [r.licence for r in records] == ["CC-BY-NC-4.0"] * 3
    assert [r.turns[0].text for r in records] == ["Describe.", "Describe.", "Hi"]
    path = write(
        tmp_path / "ALLaVA-Caption-VFLAN-4V.json", [talk("allava_vflan_cap_1", "a.png", "<image>\nHow?", "So.")]
    )
    assert detect_format(path)[0] == "allava"
    evol = [*rows, talk("e", None, "What does <image> do in HTML?", "Nothing.")]
    path = write(tmp_path / "Evol-Instruct-GPT4-Turbo-143K.json", evol)
    name, reason = detect_format(path)
    assert name == "allava" and "1 without 'image' have <image>" in reason
    assert shape(imported(path, "allava")[3])[0] == ("user", ["What does <image> do in HTML?"])
    assert "has <image> but the row has no 'image'" in bad_rows(path, "llava")[0].problem


def test_json_of_any_kind_is_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for value in ({}, [[]], {"a": [1]}, 3, "x", None):
        path.write_text(json.dumps(value))
        with pytest.raises(RecordError) as caught:
            detect_format(path)
        assert caught.value.remedy
