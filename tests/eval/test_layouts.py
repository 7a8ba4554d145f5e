"""mmit.eval.layouts: the files that a user downloads become questions, or one error says which files are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mmit.configs import shipped
from mmit.data.images import load_rgb
from mmit.errors import ConfigError, MmitError, RecordError
from mmit.eval.judges import JUDGES
from mmit.eval.layouts import LAYOUTS, common
from mmit.eval.metrics import METRICS
from mmit.eval.tasks import Item, Task, load_task, task_items
from mmit.records import Image, Text
from tests.eval.benchmarks import CASES, MMMU_ROWS, mmbench, mmmu, picture, pope, scienceqa, seedbench, tabmwp, write


def items_of(name: str, root: Path, **changes: Any) -> list[Item]:
    task = load_task(name, data_root=root)
    CASES[name][0](Path(task.folder or ""))
    return task_items(Task.model_validate(task.model_dump() | changes))


@pytest.mark.parametrize("name", CASES)
def test_the_first_question(name: str, tmp_path: Path) -> None:
    items = items_of(name, tmp_path)
    _, count, text, reference, group = CASES[name]
    first = items[0]
    assert len(items) == count
    assert (first.text, first.reference, first.group) == (text, reference, group)
    assert json.loads(json.dumps(first.reference)) == first.reference
    for item in items:
        item.prompt.validate(for_training=False)
        for image in item.prompt.images:
            load_rgb(image)


def right(item: Item, metric: str) -> str:
    """Return an answer that must count as right."""
    reference = item.reference
    if isinstance(reference, list):
        return reference[0]
    if isinstance(reference, dict):
        if "options" in reference or "label" in reference:
            found = reference.get("answer", reference.get("label"))
            return found if isinstance(found, str) else found[0]
        if "answers" in reference:
            return reference["answers"][0]
        if reference.get("choices"):
            return "AB"[reference["choices"].index(reference["answer"])]
        return reference.get("answer", "fine")
    return reference


@pytest.mark.parametrize("name", [n for n in CASES if "coco" not in n and "flickr" not in n])
def test_right_answers_get_the_full_score(name: str, tmp_path: Path) -> None:
    task = load_task(name, data_root=tmp_path)
    if task.metric in JUDGES:
        pytest.skip("needs a judge")
    items = items_of(name, tmp_path)
    groups = [item.group or "other" for item in items] if any(item.group for item in items) else None
    answers = [right(item, task.metric) for item in items]
    score = METRICS[task.metric](answers, [item.reference for item in items], groups=groups)
    full = 600.0 if name == "mme" else 1.0
    assert score.value == full and score.unparsed_rate == 0
    if task.answer_by != "generate":
        assert all(item.reference in item.choices for item in items)


def test_every_shipped_benchmark_has_a_case_and_every_layout_a_task() -> None:
    tasks = [load_task(name) for name in shipped("eval")]
    assert {task.layout for task in tasks if task.layout} == set(LAYOUTS)
    tested = {load_task(name).layout for name in CASES}
    assert tested == set(LAYOUTS)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_folder_is_told_with_the_files_expected(name: str, tmp_path: Path) -> None:
    task = load_task(name, data_root=tmp_path)
    layout = LAYOUTS[task.layout or ""]
    for made in (False, True):
        if made:
            Path(task.folder or "").mkdir(parents=True)
            write(Path(task.folder or "") / "something.txt", "else")
        with pytest.raises(ConfigError) as caught:
            task_items(task)
        said = str(caught.value)
        assert f"task '{name}' needs" in said and str(task.folder) in said and "--data-root" in said
        assert layout.get in said and "https://" in said
        for expected in layout.files:
            assert expected.format(split=task.split or layout.splits[0]) in said


@pytest.mark.parametrize("name", CASES)
def test_each_missing_file_is_told(name: str, tmp_path: Path) -> None:
    """Whatever is taken away, the error is one of mmit's, and names what is missing."""
    task = load_task(name, data_root=tmp_path)
    whole = Path(task.folder or "")
    CASES[name][0](whole)
    fewer = len(task_items(task))
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        kept = path.read_bytes()
        path.unlink()
        try:
            found = len(task_items(task))
        except MmitError as error:
            assert str(whole) in str(error)
        else:  # a file that this task does not need, or one of many of a kind
            assert found <= fewer
        path.write_bytes(kept)


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    task = load_task("gqa", data_root=tmp_path)
    CASES["gqa"][0](tmp_path / "gqa")
    write(tmp_path / "gqa" / "testdev_balanced_questions.json", {"1": {"question": "Is it?"}})
    with pytest.raises(RecordError, match="not as layout 'gqa' has it: KeyError 'imageId'") as caught:
        task_items(task)
    assert "testdev_balanced_questions.json" in str(caught.value)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("layout: gqua\n", "did you mean 'gqa'?"),
        ("layout: gqa\nsplit: testdev\n", "layout 'gqa' has no split 'testdev'; did you mean 'testdev_balanced'?"),
        ("layout: textvqa\noptions: {orc: true}\n", "did you mean 'ocr'?"),
        ("layout: gqa\nrecords: a.json\n", "one of the two"),
        ("records: a.json\noptions: {ocr: true}\n", "belongs to a layout"),
        ("records: a.json\nanswer_by: likelyhood\n", "answer_by"),
    ],
)
def test_wrong_keys(tmp_path: Path, yaml: str, said: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("name: t\nmetric: exact\n" + yaml)
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    assert said in str(caught.value)


def test_pictures_of_mmmu_stand_where_the_text_names_them(tmp_path: Path) -> None:
    first, second = items_of("mmmu_val", tmp_path)
    one, two = Image(str(tmp_path / "mmmu/1.png")), Image(str(tmp_path / "mmmu/2.png"))
    parts = first.prompt.turns[0].parts
    assert parts[:4] == (Text("Look at "), two, Text(", then "), one)
    assert second.reference["answer"] == ["12", "twelve"] and second.prompt.images == (one,)


def test_mmmus_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    struct = {"bytes": picture(), "path": "validation_Art_1_1.png"}
    rows = [row | {f"image_{n}": struct if n < 3 else None for n in range(1, 8)} for row in MMMU_ROWS]
    (tmp_path / "mmmu" / "Art").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmmu" / "Art" / "validation-00000-of-00001.parquet")
    items = task_items(load_task("mmmu_val", data_root=tmp_path))
    assert len(items) == 2 and all(len(item.prompt.images) == 2 for item in items)


PARQUET: dict[str, tuple[str, dict[str, Any], Any]] = {
    "ai2d": (
        "data/test-00000-of-00002.parquet",
        {"question": "Which part?", "options": ["leaf", "root"], "answer": "1"},
        "B",
    ),
    "ocrbench": (
        "data/test-00000-of-00001.parquet",
        {"dataset": "IIIT5K", "question": "what?", "question_type": "Text", "answer": ["CENTRE", "Centre"]},
        {"answers": ["CENTRE", "Centre"], "dataset": "IIIT5K"},
    ),
    "realworldqa": ("data/test-00000-of-00002.parquet", {"question": "Which?", "answer": "B"}, "B"),
}


@pytest.mark.parametrize("name", PARQUET)
def test_the_parquet_files_of_the_hub(name: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path, row, reference = PARQUET[name]
    (tmp_path / name / path).parent.mkdir(parents=True)
    row = row | {"image": {"bytes": picture(), "path": "1.png"}}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / name / path)
    items = task_items(load_task(name, data_root=tmp_path))
    assert [item.reference for item in items] == [reference] * 2 and len({item.id for item in items}) == 2
    assert all(isinstance(image.source, bytes) for item in items for image in item.prompt.images)


def test_a_benchmark_by_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"], options["revision"]))
        if name == "no/such":
            raise LocalEntryNotFoundError("cannot find it\nmore")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(common, "snapshot_download", fetch)
    CASES["mmmu_val"][0](tmp_path / "snapshot")
    path = tmp_path / "t.yaml"
    path.write_text("name: t\nlayout: mmmu\nfolder: hub:MMMU/MMMU@v1\nmetric: mmmu\n")
    assert len(task_items(load_task(path, data_root=tmp_path / "elsewhere"))) == 2
    assert asked == [("MMMU/MMMU", "dataset", "v1")]
    path.write_text("name: t\nlayout: mmmu\nfolder: hub:no/such\nmetric: mmmu\n")
    with pytest.raises(ConfigError, match="does not give the data set 'no/such': cannot find it"):
        task_items(load_task(path))


def test_variants_of_the_real_layouts(tmp_path: Path) -> None:
    pope(tmp_path / "a" / "pope")
    for path in (tmp_path / "a" / "pope").glob("*.json"):
        write(tmp_path / "a" / "pope" / "output" / "coco" / path.name, path.read_text())
        path.unlink()
    assert len(task_items(load_task("pope", data_root=tmp_path / "a"))) == 6
    CASES["mme"][0](tmp_path / "mme" / "MME_Benchmark_release_version")
    assert len(task_items(load_task("mme", data_root=tmp_path))) == 6
    shutil.rmtree(tmp_path / "mme")


def test_options_of_layouts(tmp_path: Path) -> None:
    items = items_of("scienceqa_img", tmp_path, options={"only_images": False})
    assert len(items) == 2 and not items[1].prompt.images
    scienceqa(tmp_path / "again")
    text = items_of("tabmwp", tmp_path, options={"table": "text"})[0]
    assert text.text.startswith("[TITLE]: Prices\na | 1") and not text.prompt.images
    tabmwp(tmp_path / "again2")
    zero = items_of("mmlu", tmp_path, options={"shots": 0})[0]
    assert zero.text.endswith("biology.\n\nWhich, of these?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    with pytest.raises(ConfigError, match="SEED-Bench-video-image"):
        seedbench(tmp_path / "seedbench")
        items_of("seedbench_img", tmp_path, split="video")


def test_mmbench_can_be_rotated(tmp_path: Path) -> None:
    mmbench(tmp_path / "mmbench")
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    task = load_task("mmbench_dev", data_root=tmp_path)
    one, two = task_items(task.model_copy(update={"options": {"rotate": True}}))
    assert (one.reference["index"], one.reference["answer"]) == (1, "A")
    assert two.reference == {
        "index": 1000001,
        "answer": "B",
        "options": {"A": "cat", "B": "dog"},
        "category": "identity",
    }


def test_mmmu_needs_its_pictures(tmp_path: Path) -> None:
    mmmu(tmp_path / "mmmu")
    rows = (tmp_path / "mmmu" / "validation.jsonl").read_text().replace('"image_2": "2.png"', '"image_2": null')
    write(tmp_path / "mmmu" / "validation.jsonl", rows)
    with pytest.raises(RecordError, match="names picture 2"):
        task_items(load_task("mmmu_val", data_root=tmp_path))


def test_the_custom_example_works() -> None:
    task = load_task(Path(__file__).parents[2] / "configs" / "eval" / "custom_example.yaml")
    items = task_items(task)
    assert len(items) == 6 and items[0].text.endswith("\nAnswer in one short sentence.")
    for item in items:
        for image in item.prompt.images:
            load_rgb(image)


def test_a_layout_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own_colours.py", OWN)
    write(tmp_path / "colours.yaml", "name: colours\nlayout: own_colours:COLOURS\nmetric: exact\n")
    write(tmp_path / "data" / "colours" / "test.json", [{"question": "Which?", "answer": "red"}])
    (item,) = task_items(load_task("colours.yaml"))
    assert (item.text, item.reference, item.id) == ("Which?", "red", "1")
    (tmp_path / "data" / "colours" / "test.json").unlink()
    with pytest.raises(ConfigError, match="one question a row"):
        task_items(load_task("colours.yaml"))
    write(tmp_path / "wrong.yaml", "name: wrong\nlayout: own_colours:NUMBER\nmetric: exact\n")
    with pytest.raises(ConfigError, match="is a int; needed here is a mmit.eval.layouts.Layout"):
        load_task("wrong.yaml")


OWN = """
from mmit.eval.layouts import Folder, Layout, Questions

NUMBER = 3


def colours(folder: Folder, split: str) -> Questions:
    for number, row in folder.rows(f"{split}.json"):
        yield folder.question(row["question"], id=number, reference=row["answer"])


COLOURS = Layout(colours, {"{split}.json": "one question a row"}, "https://example.org/colours", ("test",))
"""
