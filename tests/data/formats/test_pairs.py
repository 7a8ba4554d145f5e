"""Layouts of public sets: told by auto, read as they mean, packed or not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS, detect_format, import_file
from mmit.data.formats.keys import kept_keys
from mmit.data.rows import read_rows
from mmit.data.sources import SourceSpec, open_source
from mmit.errors import ConfigError, RecordError
from mmit.records import Record, Text, write_jsonl
from tests.data.formats.format_tools import bad_rows, imported, texts, write

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LAYOUTS: list[tuple[dict[str, Any], str, list[list[str]]]] = [
    ({"prompt": "q", "completion": "a"}, "prompt_completion", [["q"], ["a"]]),
    ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt_completion", [["q"], ["a"]]),
    ({"prompt": "q", "response": "a"}, "prompt_response", [["q"], ["a"]]),
    (
        {"query": "q2", "response": "a2", "history": [["q", "a"]], "system": "S"},
        "query_response",
        [["S"], ["q"], ["a"], ["q2"], ["a2"]],
    ),
    ({"id": "1", "system_prompt": "S", "question": "q", "response": "a"}, "question_response", [["S"], ["q"], ["a"]]),
    (
        {"instruction": "q", "context": "c", "response": "a", "category": "qa"},
        "dolly",
        [["q\n\nc"], ["a"]],
    ),
    ({"instruction": "q", "input": "c", "response": "a"}, "instruction_response", [["q\n\nc"], ["a"]]),
    (
        {
            "instruction": "q",
            "response": "a",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}],
        },
        "sharegpt",
        [["q"], ["b"]],
    ),
    ({"id": "0", "data": ["q", "a", "q2", "a2"]}, "ultrachat", [["q"], ["a"], ["q2"], ["a2"]]),
    ({"conversations": ["q", "a", "q2", "a2"], "source": "wikihow"}, "lima", [["q"], ["a"], ["q2"], ["a2"]]),
    ({"prompt": "q", "prompt_id": "1", "messages": MESSAGES}, "messages", [["q"], ["a"]]),
    (
        {"images": ["a.png"], "texts": [{"user": "q", "assistant": "a", "source": "VQA"}]},
        "cauldron",
        [["[a.png]", "q"], ["a"]],
    ),
    (
        {
            "id": "m",
            "images": [{"bytes": None, "path": "a.png"}],
            "conversation": [{"role": "user", "content": "<image>q"}, MESSAGES[1]],
        },
        "conversation",
        [["[a.png]", "q"], ["a"]],
    ),
    ({"conversation": [{"system": "S", "input": "q", "output": "a"}]}, "conversation", [["S"], ["q"], ["a"]]),
    ({"conversation": [{"human": "q", "assistant": "a"}]}, "conversation", [["q"], ["a"]]),
]


@pytest.mark.parametrize(("row", "name", "wanted"), LAYOUTS, ids=[name for _, name, _ in LAYOUTS])
def test_layouts_are_told_and_read(row: dict[str, Any], name: str, wanted: list[list[str]], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row], lines=True)
    assert detect_format(path)[0] == name
    record = imported(path, name)[0]
    record.validate()
    found = [[text.replace(f"{tmp_path}/", "") for text in parts] for parts in texts(record)]
    assert found == wanted


def test_calls_of_xlam(tmp_path: Path) -> None:
    tools, call = [{"name": "f", "parameters": {"n": {"type": "int"}}}], {"name": "f", "arguments": {"n": 1}}
    row = {"id": 7, "query": "q", "answers": json.dumps([call, call]), "tools": json.dumps(tools)}
    path = write(tmp_path / "xlam.json", [row, {**row, "answers": "[]"}, {**row, "answers": "none"}])
    assert detect_format(path)[0] == "xlam"
    bad: list[RecordError] = []
    (record,) = import_file(path, "xlam", on_bad=bad.append)
    record.validate()
    assert record.tools == tuple(tools) and [part for turn in record.turns for part in turn.parts] == [Text("q")]
    assert [made["function"] for made in record.turns[1].tool_calls] == [call, call]
    assert len(bad) == 2 and all(error.remedy for error in bad)


def test_self_instruct_seeds(tmp_path: Path) -> None:
    instances = [{"input": "i", "output": "a"}, {"input": "", "output": "b"}]
    row = {"id": "seed_task_0", "name": "n", "instruction": "q", "instances": instances, "is_classification": False}
    path = write(tmp_path / "seed_tasks.jsonl", [row, {**row, "instances": []}], lines=True)
    assert detect_format(path)[0] == "self_instruct"
    bad: list[RecordError] = []
    records = list(import_file(path, "self_instruct", on_bad=bad.append))
    assert [texts(record) for record in records] == [[["q\n\ni"], ["a"]], [["q"], ["b"]]]
    assert [record.row for record in records] == [1, 1] and len(bad) == 1 and bad[0].where.startswith(f"{path}:2")


SEEDS = Path(__file__).parents[4] / "shared" / "data" / "seed_tasks.jsonl"


@pytest.mark.skipif(not SEEDS.is_file(), reason="Self-Instruct's seed_tasks.jsonl is not beside the repository")
def test_the_seeds_of_self_instruct_as_they_are_published(tmp_path: Path) -> None:
    """175 tasks of one instance each."""
    bad: list[RecordError] = []
    format = detect_format(SEEDS)[0]
    records = list(import_file(SEEDS, format, on_bad=bad.append))
    assert format == "self_instruct" and len(records) == 175 and not bad
    rows = [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    for row, record in zip(rows, records, strict=True):
        given, answer = row["instances"][0]["input"], row["instances"][0]["output"]
        asked = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
        assert texts(record) == [[asked], [answer]] and record.id == row["id"]


def test_any_list_of_turns_by_its_keys(tmp_path: Path) -> None:
    turns = [{"who": "person", "said": "q <image>"}, {"who": "bot", "said": "a", "weight": 0.5}]
    path = write(tmp_path / "rows.json", [{"dialog": {"turns": turns}, "pics": ["a.png"]}])
    with pytest.raises(RecordError, match="(?s)cannot tell the format.*chat"):
        detect_format(path)
    options = {"turns": "dialog.turns", "role": "who", "content": "said", "roles": "person=user", "images": "pics"}
    record = imported(path, "chat", image_root="r", **options)[0]
    assert texts(record) == [["q ", "[r/a.png]"], ["a"]] and record.turns[1].weight == 0.5
    assert bad_rows(path, "chat", **options | {"turns": "dialog.lines"})[0].problem.startswith("the row has no")
    for wrong in ({"roles": "person=usr"}, {"roles": 3}):
        with pytest.raises(ConfigError, match="option roles"):
            imported(path, "chat", **options | wrong)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "rejected": "b"}, "'rejected' is half of a preference pair"),
        ({"text": "Once upon a time"}, "no question and no answer"),
        ({"segments": [{"label": True, "text": "a"}]}, "'segments' is text cut for another template"),
        ({"input_ids": [1], "labels": [1]}, "'input_ids' is tokens, not text"),
    ],
)
def test_auto_says_why_it_cannot_tell(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        detect_format(write(tmp_path / "rows.jsonl", [row], lines=True))
    assert "cannot tell the format" in caught.value.problem and reason in caught.value.remedy


def test_packed_files_are_read_as_what_they_hold(tmp_path: Path) -> None:
    rows = [{"messages": MESSAGES}, {"messages": []}, {"messages": MESSAGES}]
    data = "\n".join(map(json.dumps, rows))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(data.encode()))
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("deep/rows.jsonl", data)
        archive.writestr("__MACOSX/._rows.jsonl", "x")
    for path in (packed, tmp_path / "rows.zip"):
        assert detect_format(path)[0] == "messages"
        bad = bad_rows(path, "messages")
        assert [error.where for error in bad] == [f"{path}:2"]
        found = list(read_rows(path))
        assert [isinstance(row, Record) for row in found] == [True, False, True]
        assert found[0].source == str(path)
        errors: list[RecordError] = []
        source = open_source(SourceSpec(path, format="messages"), cache=tmp_path / "cache", on_bad=errors.append)
        assert len(source) == 2 and len(errors) == 1


def test_a_packed_file_of_mmits_own_rows(tmp_path: Path) -> None:
    write_jsonl([Record.triple("q", "a")], tmp_path / "a.jsonl")
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    source = open_source(path, cache=tmp_path / "cache")
    assert source[0].turns == Record.triple("q", "a").turns


@pytest.mark.parametrize(
    ("name", "head", "cause", "command"),
    [
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04X", r"Zstandard \(.zst\)", "zstd -d"),
        ("a.json", lzma.compress(b"[]"), r"xz \(.xz\)", "xz -dk"),
        ("a.csv", bz2.compress(b"instruction,output"), "bzip2", "bzip2 -dk"),
        ("a.parquet", b"\x04\x22\x4d\x18....", "LZ4", "lz4 -d"),
    ],
)
def test_other_packings_are_refused_by_name(name: str, head: bytes, cause: str, command: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(head)
    calls: list[Callable[[], Any]] = [
        lambda: detect_format(path),
        lambda: list(import_file(path, "messages")),
        lambda: open_source(path, cache=tmp_path / "cache"),
        lambda: open_source(SourceSpec(path, format="alpaca", image_root="r"), cache=tmp_path / "cache"),
        lambda: list(read_rows(path)),
    ]
    for call in calls:
        with pytest.raises(RecordError, match=f"is packed with {cause}.*which mmit does not unpack") as caught:
            call()
        assert caught.value.where == str(path) and command in caught.value.remedy and ".gz" in caught.value.remedy
    write_jsonl([Record.triple("BZ is a name", "a")], tmp_path / "b.jsonl")
    assert open_source(tmp_path / "b.jsonl", cache=tmp_path / "cache")[0].turns[0].text == "BZ is a name"


def test_a_zip_that_asks_for_a_password_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.json", "[]")
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of encryption, in both headers
        data[data.index(magic) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match="a zip that cannot be read.*password"):
        detect_format(path)


def test_packed_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "a.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"messages": []}' * 50)[:40])
    several = tmp_path / "a.zip"
    with zipfile.ZipFile(several, "w") as archive:
        archive.writestr("a.json", "[]")
        archive.writestr("a.png", "x")
    for path, cause in ((broken, "a damaged gzip file"), (several, "the zip holds 2 files: a.json, a.png")):
        with pytest.raises(RecordError) as caught:
            detect_format(path)
        assert cause in caught.value.problem and caught.value.where == str(path) and caught.value.remedy


def test_parquet_rows_of_turns(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    calls = [{"id": None, "function": {"name": "f", "arguments": "{}"}}]
    told = [
        {
            "messages": [
                *MESSAGES,
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": None, "tool_calls": calls},
            ]
        },
        {"messages": MESSAGES},
    ]
    for name, rows, wanted in (
        ("m", told, [["q"], ["a"]]),
        ("q", [{"question": "q", "answer": "a", "extra": None}], [["q"], ["a"]]),
        ("c", [{"texts": [{"user": "q", "assistant": "a"}], "images": [{"bytes": b"png", "path": None}]}], None),
    ):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        assert detect_format(path)[0] == "parquet"
        records = list(import_file(path, "parquet"))
        if wanted:
            assert texts(records[-1]) == wanted
        else:
            assert records[0].images[0].source == b"png"


def test_a_column_that_is_a_role_but_for_white_space(tmp_path: Path) -> None:
    for header in ("instruction, output", "instruction,Output"):
        path = tmp_path / "t.csv"
        path.write_text(f"{header}\nq, a\n")
        with pytest.raises(ConfigError, match="is the role output but for case or white space"):
            list(import_file(path, "csv"))
    path.write_text("prompt,completion\nq,a\n")
    assert texts(next(import_file(path, "csv"))) == [["q"], ["a"]]
    assert FORMATS["csv"].options.keys() >= {"columns", "as_format"}


def test_keys_of_entries_are_read_or_counted() -> None:
    pictured = {"texts": [{"user": "q", "assistant": "a", "weight": 0, "tag": "x"}]}
    pairs = {"conversation": [{"system": "S", "human": "q", "assistant": "a", "train": False, "tag": "x"}]}
    for format, row in (("cauldron", pictured), ("conversation", pairs)):
        record = FORMATS[format](row)
        assert record.turns[-1].weight == 0 and kept_keys(record) == {"turns: tag": 1}
        entry = next(iter(row.values()))[0]
        with pytest.raises(RecordError, match="has 'rejected': half of a preference pair"):
            FORMATS[format]({next(iter(row)): [entry | {"rejected": "b"}]})
    with pytest.raises(RecordError, match="both 'context' and 'input'"):
        FORMATS["dolly"]({"instruction": "q", "context": "c", "input": "i", "response": "a"})
