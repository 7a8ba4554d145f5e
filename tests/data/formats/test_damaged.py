"""Damaged files: whatever a value is replaced by, an importer gives sound records or errors that name the place."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmit.data.formats import FORMATS, detect_format, import_file
from mmit.errors import MmitError, RecordError
from mmit.records import Record
from tests.data.formats.test_captions import ALIGN, COCO, sample
from tests.data.formats.test_instruct import PREAMBLE, TASK
from tests.data.formats.test_mimicit import PAIRS
from tests.data.formats.test_multimodal import MULTIINSTRUCT, PIXELS, talk
from tests.data.formats.test_vqa import GQA, QUESTIONS, TEXTVQA
from tests.examples import examples

MESSAGE = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "a"}}]}
ROWS: dict[str, Any] = {
    "llava": talk("1", "a.png", "<image>\na", "b"),
    "sharegpt": talk("1", "a.png", "<image>\na", "b") | {"system": "s"},
    "messages": {"messages": [MESSAGE, {"role": "assistant", "content": "b"}]},
    "mmit": Record.triple("a", "b", images=["a.png"]).to_json(),
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]], "image": "a.png"},
    "instructions": {"instruction": "a", "input": "b"},
    "inputs_targets": {"inputs_pretokenized": "a", "targets_pretokenized": "b", "is_correct": True},
    "baize": {"topic": "a", "input": f"{PREAMBLE}[|Human|] a\n[|AI|] b\n[|Human|] "},
    "img2dataset": sample(jpg=PIXELS, txt="a", json={"caption": "a", "status": "success"}),
    "multiinstruct": MULTIINSTRUCT[0],
    "vision_flan": talk("a+b+c", "a.png", "<image>a", "b"),
    "m3it": {"instruction": "a", "inputs": "b", "image_base64_str": [PIXELS], "outputs": ["c", "d"], "meta": {}},
    "lamm": talk("1", "a.png", "a", "b", task_type="x"),
    "pmc_vqa": {
        "Figure_path": "a.jpg",
        "Question": "q",
        **{f"Choice {c}": f"{c}:{c}{c}" for c in "ABCD"},
        "Answer": "BB",
        "Answer_label": "B",
    },
    "vqa_rad": {"qid": "1", "image_name": "a.jpg", "phrase_type": "freeform", "question": "q", "answer": "Yes"},
    "slake": {"qid": 1, "img_name": "x/a.jpg", "q_lang": "en", "question": "q", "answer": "MRI", "answer_type": "OPEN"},
    "llava_questions": {"question_id": 1, "image": "a.png", "text": "q"},
    "parquet": {"instruction": "a", "image": {"bytes": None, "path": "a.png"}, "output": "b", "id": 3},
}
FILES: dict[str, Any] = {
    "natural_instructions": TASK,
    "minigpt4": ALIGN,
    "coco_captions": COCO,
    "vqav2": QUESTIONS,
    "gqa": GQA,
    "textvqa": TEXTVQA,
    "mimicit": {"data": {key: pair | {"image_ids": []} for key, pair in PAIRS.items()}},
}
# What annotators, converters and broken exports leave behind.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<image>", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def damaged(draw: st.DrawFn, value: Any) -> Any:
    """Replace, or leave out, one value somewhere inside."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)):
        value = copy.copy(value)
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        if draw(st.integers(0, 5)) == 0:
            del value[key]
        else:
            value[key] = damaged(draw, value[key])
        return value
    return draw(values)


@st.composite
def broken_row(draw: st.DrawFn) -> tuple[str, Any]:
    name = draw(st.sampled_from(sorted(ROWS)))
    return name, damaged(draw, ROWS[name])


@st.composite
def broken_file(draw: st.DrawFn) -> tuple[str, Any]:
    name = draw(st.sampled_from(sorted(FILES)))
    return name, damaged(draw, FILES[name])


def sound(record: Record) -> None:
    record.validate(for_training=None)
    try:
        record.to_json()
    except RecordError as error:  # meta that JSON cannot hold (NaN), or bytes that are no picture
        assert error.remedy


@settings(max_examples=examples(400), deadline=None, suppress_health_check=list(HealthCheck))
@given(broken_row())
@example(("alpaca", {"instruction": "a", "output": "c", "history": True}))
def test_damaged_rows(case: tuple[str, Any]) -> None:
    name, row = case
    if not isinstance(row, dict):
        return
    try:
        record = FORMATS[name](row, image_root="r")
        record.validate(for_training=None)
    except MmitError as error:
        assert error.problem and error.remedy
    else:
        sound(record)


@settings(max_examples=examples(250), deadline=None, suppress_health_check=list(HealthCheck))
@given(broken_file(), st.booleans())
def test_damaged_files(case: tuple[str, Any], one_line: bool) -> None:
    name, value = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x_instructions.json"
        path.write_text(json.dumps(value, indent=None if one_line else 1))
        bad: list[RecordError] = []
        for action in (
            lambda: detect_format(path),
            lambda: [sound(record) for record in import_file(path, name, on_bad=bad.append)],
        ):
            try:
                action()
            except MmitError as error:
                assert error.remedy and str(path) in str(error)
        assert all(error.where.startswith(str(path)) and error.remedy for error in bad)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "ignore")))
def test_files_of_any_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for ending, names in ((".json", ["llava", "vqav2", "gqa", "mimicit"]), (".csv", ["csv", "pmc_vqa"])):
            path = Path(folder) / f"x{ending}"
            path.write_bytes(data)
            for action in (
                lambda path=path: detect_format(path),
                *(lambda path=path, name=name: list(import_file(path, name)) for name in names),
            ):
                try:
                    action()
                except MmitError as error:
                    assert str(path) in str(error)
