"""Questions whose answers a judge grades: what the judge is told beside the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmit.errors import MmitError
from mmit.eval.tasks import Item, load_task, task_items
from tests.eval.benchmarks import lines, png, write


def items_of(name: str, root: Path) -> list[Item]:
    return task_items(load_task(name, data_root=root))


def test_mm_vets_types_are_its_capabilities_in_any_order(tmp_path: Path) -> None:
    row = {"imagename": "a.png", "question": "What is x?", "answer": "-1 <AND> -5"}
    rows = {"v1_3": row | {"capability": ["ocr", "math"]}, "v1_1": row | {"capability": ["math", "ocr"]}}
    rows["v1_2"] = row | {"capability": ["rec"]}
    write(tmp_path / "mmvet" / "mm-vet.json", rows)
    png(tmp_path / "mmvet" / "images" / "a.png")
    items = items_of("mmvet", tmp_path)
    assert [(item.id, item.group) for item in items] == [("v1_3", "math+ocr"), ("v1_1", "math+ocr"), ("v1_2", "rec")]
    assert items[0].reference == {
        "question": "What is x?",
        "answer": "-1 <AND> -5",
        "capability": ["ocr", "math"],
    }


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    folder = tmp_path / "llava_bench"
    ask = [("a.jpg", "conv"), ("b.jpg", "detail"), ("a.jpg", "complex")]
    rows = [
        {"question_id": n, "image": image, "text": f"Ask {n}?", "category": kind} for n, (image, kind) in enumerate(ask)
    ]
    lines(folder / "questions.jsonl", rows)
    lines(
        folder / "context.jsonl", [{"image": "b.jpg", "caption": ["One.", "Two."]}, {"image": "a.jpg", "caption": "A."}]
    )
    lines(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"Answer {n}."} for n in (2, 0, 1)])
    for name in ("a", "b"):
        png(folder / "images" / f"{name}.jpg")
    return tmp_path


def test_llava_bench_joins_three_files_by_image_and_by_question(llava: Path) -> None:
    items = items_of("llava_bench", llava)
    assert [item.reference["answer"] for item in items] == ["Answer 0.", "Answer 1.", "Answer 2."]
    assert [item.reference["context"] for item in items] == ["A.", "One.\nTwo.", "A."]
    assert [item.group for item in items] == ["conv", "detail", "complex"]
    assert [Path(str(item.prompt.images[0].source)).stem for item in items] == ["a", "b", "a"]


@pytest.mark.parametrize("file", ["context.jsonl", "answers_gpt4.jsonl"])
def test_a_question_without_its_row_in_another_file_is_told(llava: Path, file: str) -> None:
    path = llava / "llava_bench" / file
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(MmitError, match="llava_bench") as error:
        items_of("llava_bench", llava)
    assert "questions.jsonl" in str(error.value)
