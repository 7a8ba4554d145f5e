"""Questions about medical images: which split a row is of, and what is taken off its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmit.errors import ConfigError, MmitError
from mmit.eval.tasks import Item, Task, load_task, task_items
from tests.eval.benchmarks import png, write


def items_of(name: str, root: Path, **changes: Any) -> list[Item]:
    return task_items(Task.model_validate(load_task(name, data_root=root).model_dump() | changes))


@pytest.fixture
def vqa_rad(tmp_path: Path) -> Path:
    row = {"image_name": "a.jpg", "question": " Is it large? ", "answer_type": "CLOSED "}
    kinds = ("freeform", "test_freeform", "para", "test_para", "test_freeform")
    rows = [row | {"phrase_type": kind, "answer": n} for n, kind in enumerate(kinds)]
    write(tmp_path / "vqa_rad" / "VQA_RAD Dataset Public.json", [rows[0] | {"answer_type": "open"}, *rows[1:]])
    png(tmp_path / "vqa_rad" / "VQA_RAD Image Folder" / "a.jpg")
    return tmp_path


def test_the_phrase_tells_the_split_and_every_row_is_of_one(vqa_rad: Path) -> None:
    test, train = (items_of("vqa_rad", vqa_rad, split=split) for split in ("test", "train"))
    assert [item.reference for item in test] == ["1", "3", "4"] and [item.reference for item in train] == ["0", "2"]
    assert {item.id for item in test} | {item.id for item in train} == set("12345")


def test_texts_are_without_the_blanks_that_occur(vqa_rad: Path) -> None:
    first, second = items_of("vqa_rad", vqa_rad, split="train")
    assert (first.group, second.group) == ("OPEN", "CLOSED")
    assert first.text.startswith("Is it large?\n") and first.reference == "0"  # a number in the file


def test_images_may_lie_in_a_folder_of_another_name(vqa_rad: Path) -> None:
    folder = vqa_rad / "vqa_rad"
    (folder / "VQA_RAD Image Folder").rename(folder / "images")
    assert items_of("vqa_rad", vqa_rad)[0].prompt.images[0].source == str(folder / "images" / "a.jpg")
    (folder / "images").rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match="needs VQA_RAD Image Folder or images"):
        items_of("vqa_rad", vqa_rad)


def test_slake_asks_in_one_language_and_has_two_names_for_a_split(tmp_path: Path) -> None:
    row = {"img_name": "x/source.jpg", "answer": "MRI", "answer_type": "OPEN"}
    rows = [row | {"question": f"{lang}{n}", "q_lang": lang, "qid": n} for n, lang in enumerate(["en", "zh", "en"])]
    png(tmp_path / "slake" / "imgs" / "x" / "source.jpg")
    write(tmp_path / "slake" / "validate.json", rows)
    asked = [item.id for item in items_of("slake", tmp_path, split="validation")]
    assert asked == ["0", "2"]
    assert [i.id for i in items_of("slake", tmp_path, split="validation", options={"language": "zh"})] == ["1"]
    write(tmp_path / "slake" / "validation.json", rows[:1])  # of the newer release: it goes first
    assert [item.id for item in items_of("slake", tmp_path, split="validation")] == ["0"]
    with pytest.raises(ConfigError, match=r"test\.json"):
        items_of("slake", tmp_path, split="test")


def test_pmc_vqa_has_its_choices_without_their_letters_and_the_right_one_as_a_letter(tmp_path: Path) -> None:
    folder = tmp_path / "pmc_vqa"
    head = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
    row = "{image},What? ,Focal, A:Diffuse , B:Focal ,C, A:D: both ,B\n"
    for split in ("test", "test_2"):
        write(folder / f"{split}.csv", head + row.format(image=f"{split}.jpg"))
    png(folder / "images" / "test.jpg")
    png(folder / "images_2" / "test_2.jpg")
    for split in ("test", "test_2"):  # the second version has its own images
        (item,) = items_of("pmc_vqa", tmp_path, split=split)
        assert item.reference["options"] == ["Diffuse", "Focal", "C", "A:D: both"] and item.reference["answer"] == "B"
        assert "What?\nA. Diffuse\nB. Focal\nC. C\nD. A:D: both" in item.text and list(item.choices) == list("ABCD")
        assert Path(str(item.prompt.images[0].source)).name == f"{split}.jpg"
    write(folder / "test.csv", head + row.format(image="test.jpg").replace(",B\n", ",E\n"))
    with pytest.raises(MmitError, match="E"):
        items_of("pmc_vqa", tmp_path, split="test")
