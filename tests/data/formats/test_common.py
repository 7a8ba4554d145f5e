"""What importers share: rows of a list or of lines, draws by the row alone, checks that name what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import common
from mmit.data.formats.common import (
    Format,
    ask,
    by_name,
    count_of,
    file_name,
    images_of,
    is_list,
    json_object,
    json_rows,
    keyed,
    most_frequent,
    object_of,
    objects_of,
    pick,
    references,
    reply,
    rest,
    text_of,
    with_input,
)
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text

ROWS = [{"a": 1}, {"a": "ü\u2028"}, {}]


@pytest.mark.parametrize("start", ["", "\ufeff", "\n\t "])
def test_a_list_and_lines_give_the_same_rows(tmp_path: Path, start: str) -> None:
    listed, lines = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    listed.write_text(start + json.dumps(ROWS, ensure_ascii=False), "utf-8")
    lines.write_text((start.strip() or "") + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), "utf-8")
    assert is_list(str(listed)) and not is_list(str(lines))
    assert list(json_rows(str(listed))) == list(json_rows(str(lines))) == list(enumerate(ROWS, 1))


def test_a_line_that_is_no_json_is_told_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    first, bad, last = json_rows(str(path))
    assert (first, last) == ((1, {"a": 1}), (3, {"a": 2}))
    assert bad[0] == 2 and isinstance(bad[1], RecordError)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "a JSON list"),
        ('{"a": 1}', "no 'b'"),
        ("{\n a", "not JSON: "),
        ("[" * 10**5, "not JSON"),
        (None, "cannot"),
    ],
)
def test_a_file_of_one_object_names_what_it_lacks(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordError, match=problem) as caught:
        json_object(str(path), "a", "b")
    assert (caught.value.where or "").startswith(str(path)) and caught.value.remedy


def test_a_draw_depends_on_the_row_alone_and_is_even() -> None:
    choices = ["a", "b", "c"]
    drawn = [pick(choices, seed=1, key=str(n)) for n in range(3000)]
    assert drawn == [pick(choices, seed=1, key=str(n)) for n in range(3000)]
    assert drawn != [pick(choices, seed=2, key=str(n)) for n in range(3000)]
    assert all(900 < n < 1100 for n in Counter(drawn).values())
    assert pick("one", seed=0, key="\ud800") == "one" and pick(None, seed=0, key="") == pick([], seed=0, key="") == ""
    with pytest.raises(ConfigError, match="what is not text"):
        pick(["a", 1], seed=0, key="")


def test_names_of_image_files_are_filled_in() -> None:
    names = {"image_id": 7, "split": "val2014"}
    assert file_name("COCO_{split}_{image_id:012d}.jpg", names) == "COCO_val2014_000000000007.jpg"
    for pattern in ("{picture}.jpg", "{split.name}.jpg"):
        with pytest.raises(ConfigError, match="a name that is not known") as unknown:
            file_name(pattern, names)
        assert "image_id, split" in (unknown.value.remedy or "")
    with pytest.raises(RecordError, match="does not fit the image_pattern"):
        file_name("{image_id:012d}.jpg", {"image_id": "seven"})
    for pattern in ("{}.jpg", "{0}.jpg", "{image_id"):  # no row could fill them: wrong once, not in every row
        with pytest.raises(ConfigError, match=r"positional|no pattern") as wrong:
            file_name(pattern, names)
        assert "{image_id:012d}.jpg" in (wrong.value.remedy or "")


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: text_of(7, "'a'"), RecordError, "'a' is '7', not text"),
        (lambda: objects_of({"a": []}, "a"), RecordError, "not a list of objects"),
        (lambda: objects_of({"a": [{}, 1]}, "a"), RecordError, "not a list of objects"),
        (lambda: object_of([], "it"), RecordError, "not an object"),
        (lambda: keyed({}, "id", where="f"), RecordError, "found a dict"),
        (lambda: references([], "answers"), RecordError, "answers is an empty list"),
        (lambda: references(["a", 1], "answers"), RecordError, "not text"),
        (lambda: by_name("yse", {"yes": "1"}, "speaker"), RecordError, "speaker 'yse'"),
        (lambda: by_name(None, {"yes": "1"}, "speaker"), RecordError, "speaker 'None'"),
        (lambda: count_of(True, "n"), ConfigError, "option n is 'True'"),
        (lambda: count_of(-1, "n"), ConfigError, "option n is '-1'"),
        (lambda: common.one_of("x", "o", ["xy"]), ConfigError, "option o is 'x'"),
        (lambda: images_of({"image": "a", "images": []}, ""), RecordError, "both 'image' and 'images'"),
    ],
)
def test_a_wrong_value_is_named_with_what_to_do(call: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told) as caught:
        call()
    assert caught.value.remedy  # type: ignore[attr-defined]


def test_sound_values_come_back() -> None:
    assert keyed([{"id": 7}, {"id": "8"}, {"x": 1}, 3], "id", where="") == {"7": {"id": 7}, "8": {"id": "8"}}
    assert references("a", "x") == ["a"] and most_frequent(["b", "a", "a", "b"]) == "b" and count_of(0, "n") == 0
    assert rest({"a": 1, "b": 2, "id": 3, "image": "x", "images": []}, "a") == {"b": 2}
    assert [with_input(*pair) for pair in (("i", "g"), ("i", ""), ("", "g"))] == ["i\n\ng", "i", "g"]


def test_images_of_a_row_are_none_only_where_it_has_no_key(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert images_of({}, root) is None and images_of({"image": None}, root) == [] == images_of({"images": []}, root)
    assert [i.source for i in images_of({"image": "a.png"}, root) or []] == [f"{root}/a.png"]


def test_a_question_is_its_images_then_its_text() -> None:
    picture = Image("a.png")
    assert ask("q", [picture]).parts == (picture, Text("q"))
    assert ask("", [picture]).parts == (picture,) and ask("").parts == (Text(""),)


def test_options_that_all_formats_share_are_read_after_the_row() -> None:
    seen: list[dict[str, Any]] = []

    def read(row: dict[str, Any], *, image_root: str = "", **options: Any) -> Record:
        seen.append(options)
        return Record((ask("q"), reply(row["a"])))

    row = {"a": "<t>why</t>so"}
    made = Format("", read)(row, thoughts="<t>...</t>", own=1)
    assert made.turns[1].thinking == "why" and made.turns[1].text == "so" and seen == [{"own": 1}]
    # A format with an option of that name, and mmit's own rows, are left alone.
    assert Format("", read, options={"thoughts": ""})(row, thoughts="x").turns[1].text == row["a"]
    assert Format("", read, own=True)(row).turns[1].thinking is None
