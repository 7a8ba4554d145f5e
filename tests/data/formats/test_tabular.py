"""Tables: CSV and TSV with mapped columns, parquet files, Hugging Face data sets by name."""

from __future__ import annotations

import base64
import datetime
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest

from mmit.data.formats import FORMATS, detect_format, format_options, import_file
from mmit.data.formats.tabular import hf_rows
from mmit.errors import ConfigError, RecordError
from mmit.records import Image
from tests.data.formats.format_tools import bad_rows, imported, shape, texts, write

CSV = '''question,answer,file,kind
"What, then?","A ""cat""",a.png,x
"Two
lines",B,sub/b.png,y
Three,C,,z
'''


def test_csv_with_mapped_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(CSV, "utf-8-sig")
    assert detect_format(path) == ("csv", "a table with the columns question, answer, file, kind")
    for columns in (
        "instruction=question, output=answer,image=file",
        {"instruction": "question", "output": "answer", "image": "file"},
    ):
        records = imported(path, "csv", columns=columns)
        assert texts(records[0]) == [[f"[{tmp_path}/a.png]", "What, then?"], ['A "cat"']]
        assert texts(records[1])[0] == [f"[{tmp_path}/sub/b.png]", "Two\nlines"]
        assert texts(records[2]) == [["Three"], ["C"]]
        # The row is the line where it begins, which an editor shows.
        assert [r.row for r in records] == [2, 3, 5] and records[0].meta == {"kind": "x"}


def test_csv_columns_called_like_the_roles(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,system,instruction,input,output,image\n7,S,Do,it,ok,i.png\n8,,Ask,,,\n")
    record = imported(path, "csv", on_bad=lambda error: None)[0]
    assert shape(record) == [("system", ["S"]), ("user", [f"[{tmp_path}/i.png]", "Do\n\nit"]), ("assistant", ["ok"])]
    assert record.id == "7" and record.meta == {}
    bad = bad_rows(path, "csv")
    assert bad[0].where == f"{path}:3 (8)" and "turn 2 (assistant) is empty" in bad[0].problem
    path.write_text("instruction\nWho?\n")
    import_only = imported(path, "csv")[0]
    import_only.validate(for_training=False)


def test_tsv_with_pictures_in_base64(tmp_path: Path) -> None:
    path = tmp_path / "mmbench.tsv"
    picture = base64.b64encode(b"x" * 200_000).decode()
    path.write_text(f"index\timage\tquestion\thint\tanswer\n0\t{picture}\tWhich?\tnan\tB\n")
    columns = {"id": "index", "image_base64": "image", "instruction": "question", "output": "answer"}
    record = imported(path, "csv", columns=columns)[0]
    assert record.images == (Image(b"x" * 200_000),) and record.id == "0" and record.meta == {"hint": "nan"}


def test_quotes_are_never_lost_silently(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('instruction\toutput\na\t"Yes" he said\nb\tc\n')
    with pytest.raises(RecordError, match="(?s)not a table after line 0.*quoting=none"):
        list(import_file(path, "csv"))
    assert imported(path, "csv", quoting="none")[0].turns[1].text == '"Yes" he said'
    with pytest.raises(ConfigError, match="did you mean 'none'"):
        list(import_file(path, "csv", quoting="nome"))


def test_csv_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("instruction,output\na,b,c\nd\n\ne,f\n")
    bad = bad_rows(path, "csv")
    assert [e.where for e in bad] == [f"{path}:2", f"{path}:3"]
    assert bad[0].problem == "the row has 3 cells where the header has 2"
    assert [r.row for r in import_file(path, "csv", on_bad=lambda error: None)] == [5]
    for text, problem in (("a,a\n1,2\n", "columns come twice: a"), ('a,b\n"x,y\n', "not a table")):
        path.write_text(text)
        with pytest.raises(RecordError, match=problem):
            list(import_file(path, "csv"))
    path.write_bytes("instruction,output\nä,b\n".encode("latin-1"))
    with pytest.raises(RecordError, match="(?s)not utf-8.*option encoding"):
        list(import_file(path, "csv"))
    assert imported(path, "csv", encoding="latin-1")[0].turns[0].text == "ä"
    with pytest.raises(RecordError, match="cannot read"):
        list(import_file(tmp_path / "none.csv", "csv"))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("instructoin=q", "(?s)role 'instructoin'.*did you mean 'instruction'"),
        ("instruction=qq", r"(?s)no column 'qq' \(columns.instruction\).*did you mean 'q'"),
        ("output=q", "cannot tell what is asked: the columns are q, a"),
        (None, "(?s)cannot tell what is asked.*columns="),
        (3, "option columns is '3'"),
        ({"instruction": ["q"]}, "columns.instruction is"),
    ],
)
def test_wrong_columns_stop_at_the_first_row(columns: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("q,a\n1,2\n")
    with pytest.raises(ConfigError, match=problem) as caught:
        list(import_file(path, "csv", columns=columns, on_bad=lambda error: None))
    assert caught.value.where == str(path)


ROWS: list[dict[str, Any]] = [
    {"q": "Who?", "a": "Ann", "image": {"bytes": b"png", "path": "a.png"}, "day": datetime.date(2024, 1, 2), "n": 1.5},
    {"q": "What?", "a": "It", "image": {"bytes": None, "path": "b.png"}, "day": None, "n": float("nan")},
    {"q": "Text?", "a": 7, "image": None, "day": None, "n": None},
]
TALK: list[dict[str, Any]] = [
    {
        "id": "1",
        "image": {"bytes": b"png", "path": None},
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
        "empty": None,
    },
    {"id": "2", "image": None, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
]


class FakeFile:
    """pyarrow's ParquetFile over rows in memory: pyarrow is optional."""

    rows: list[dict[str, Any]] = ROWS

    def __init__(self, path: str) -> None:
        open(path, "rb").close()

    def __enter__(self) -> FakeFile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def iter_batches(self, batch_size: int) -> Iterator[FakeFile]:
        yield self

    def to_pylist(self) -> list[dict[str, Any]]:
        return self.rows


@pytest.fixture
def pyarrow(monkeypatch: pytest.MonkeyPatch) -> type[FakeFile]:
    package, module = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    package.ArrowException = type("ArrowException", (Exception,), {})  # type: ignore[attr-defined]
    package.parquet, module.ParquetFile = module, FakeFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    monkeypatch.setattr(FakeFile, "rows", ROWS)
    return FakeFile


def test_parquet(tmp_path: Path, pyarrow: type[FakeFile]) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1")
    assert detect_format(path)[0] == "parquet"
    records = imported(path, "parquet", columns="instruction=q,output=a")
    assert records[0].images == (Image(b"png"),) and records[1].images == (Image(str(tmp_path / "b.png")),)
    assert [r.turns[-1].text for r in records] == ["Ann", "It", "7"]
    assert [r.meta for r in records] == [{"day": "2024-01-02", "n": 1.5}, {}, {}]
    with pytest.raises(RecordError, match="cannot read"):
        list(import_file(tmp_path / "none.parquet", "parquet"))
    pyarrow.rows = [{"q": "a", "a": "b", "thumb": b"x"}]
    bad = bad_rows(path, "parquet", columns="instruction=q,output=a")
    assert bad[0].problem == "column thumb holds bytes that no role uses"


def test_parquet_rows_of_another_format(tmp_path: Path, pyarrow: type[FakeFile]) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1")
    pyarrow.rows = TALK
    records = imported(path, "parquet", as_format="llava")
    assert records[0].images == (Image(b"png"),) and texts(records[0])[0][1] == "What?"
    assert texts(records[1]) == [["Hi"], ["Ho"]] and records[0].meta == {}
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        list(import_file(path, "parquet", as_format="lava"))


def test_real_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as files

    path = tmp_path / "t.parquet"
    files.write_table(arrow.Table.from_pylist(ROWS[:2]), path)
    records = imported(path, "parquet", columns="instruction=q,output=a")
    assert records[0].images == (Image(b"png"),) and records[1].meta == {}
    path.write_bytes(b"not parquet")
    with pytest.raises(RecordError, match="parquet|read"):
        list(import_file(path, "parquet"))


@pytest.mark.slow
def test_a_real_hugging_face_set_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures stay the bytes they were, in a column of their own and in lists; a script is refused unread."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (200, 0, 0)).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    talk = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    for name, row, feature, how in (
        ("one", {"image": cell, "q": "What?", "a": "Red."}, datasets.Image(), {"columns": "instruction=q,output=a"}),
        ("many", {"images": [cell], "messages": talk}, datasets.Sequence(datasets.Image()), {"as_format": "messages"}),
    ):
        table = datasets.Dataset.from_list([row] * 3).cast_column(next(iter(row)), feature)
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")
        for path, format in ((tmp_path / name / "train.parquet", "parquet"), (tmp_path / name, "hf")):
            records = list(import_file(path, format, **how))
            assert [r.images for r in records] == [(Image(buffer.getvalue()),)] * 3, (name, format)
            assert [turn.text for turn in records[0].turns] == ["What?", "Red."]
            assert [r.row for r in records] == [1, 2, 3]
    with pytest.raises(ConfigError, match="Bad split"):
        list(import_file(tmp_path / "one", "hf", split="none"))
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="scripts are no longer supported|trust_remote_code"):
        list(import_file(tmp_path / "scripted", "hf"))
    assert not (tmp_path / "ran").exists()


def test_json_of_any_keys(tmp_path: Path) -> None:
    rows = [{"q": "Who?", "a": "Ann", "tag": 1}, {"q": "What?", "about": "it", "a": "A"}, {"q": "Why?"}]
    path = write(tmp_path / "own.jsonl", rows, lines=True)
    mapping = {"instruction": "q", "output": "a", "input": "about"}
    bad: list[RecordError] = []
    records = imported(path, "json", columns=mapping, on_bad=bad.append)
    assert texts(records[1]) == [["What?\n\nit"], ["A"]] and records[0].meta == {"tag": 1}
    assert [e.where for e in bad] == [f"{path}:3"] and "turn 2 (assistant) is empty" in bad[0].problem
    with pytest.raises(ConfigError, match="(?s)no column 'abuot'.*did you mean 'about'"):
        list(import_file(path, "json", columns={**mapping, "input": "abuot"}))


class FakeStream:
    """A streamed data set with one picture column."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.cast = rows, list[Any]()
        self.features: dict[str, Any] = {}

    def cast_column(self, name: str, feature: Any) -> FakeStream:
        self.cast.append((name, feature.decode))
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.mark.parametrize(("version", "extra"), [("4.1.0", {}), ("3.6.0", {"trust_remote_code": False})])
def test_hugging_face_by_name(version: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Picture:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    stream, calls = FakeStream(TALK), []
    stream.features = {"image": Picture(), "id": "string"}

    def load_dataset(name: str, config: str | None, **options: Any) -> FakeStream:
        calls.append((name, config, options))
        if name == "org/none":
            raise FileNotFoundError("Dataset 'org/none' doesn't exist")
        return stream

    package = ModuleType("datasets")
    package.__version__ = version  # type: ignore[attr-defined]
    package.Image, package.load_dataset = Picture, load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    records = list(import_file("org/set", "hf", as_format="llava", split="test", config="en", revision="v1"))
    assert calls == [("org/set", "en", {"split": "test", "revision": "v1", "streaming": True, **extra})]
    assert stream.cast == [("image", False)]
    assert [(r.source, r.row, r.id) for r in records] == [("org/set", 1, "1"), ("org/set", 2, "2")]
    stream.rows = [{"question": "a", "image": "pics/a.png"}]
    assert list(import_file("org/set", "hf", columns="instruction=question"))[0].images == (Image("pics/a.png"),)
    with pytest.raises(ConfigError, match="(?s)cannot load the data set.*split, config and revision"):
        list(import_file("org/none", "hf"))


@pytest.mark.parametrize(("name", "package"), [("parquet", "pyarrow"), ("hf", "datasets")])
def test_optional_packages_are_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        list(import_file("x.parquet", name))


def test_every_option_is_described_and_taken() -> None:
    for name, entry in FORMATS.items():
        assert entry.about and not entry.options.keys() & entry.file_options.keys()
        assert all(format_options(name).values())
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        format_options("parket")


def test_a_data_set_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a"}, {"text": "b"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert list(hf_rows(str(tmp_path / "saved"))) == [(1, rows[0]), (2, rows[1])]
    with pytest.raises(ConfigError, match=r"holds one split(.|\n)*Leave split"):
        list(hf_rows(str(tmp_path / "saved"), split="test"))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_cell_without_a_value_does_not_change_what_its_row_is(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}])
    bad: list[RecordError] = []
    assert len(list(import_file(path, "parquet", on_bad=bad.append))) == 1
    assert [error.problem for error in bad] == ["answer is 'None', not text"]
    talks = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": None},
    ]
    path = parquet(tmp_path / "m.parquet", talks)
    assert [error.where for error in bad_rows(path, "parquet")] == [f"{path}:2"]


def test_p3_is_read_by_its_text_from_a_table(tmp_path: Path) -> None:
    row = {"inputs": [1, 2], "targets": [3], "inputs_pretokenized": "q", "targets_pretokenized": "a"}
    assert texts(imported(parquet(tmp_path / "t.parquet", [row]), "parquet")[0]) == [["q"], ["a"]]


def test_pictures_of_a_mapped_table_stand_where_the_text_marks_them(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("image,problem,output\na.png,Look: <image> What?,A\na.png,What?,A\n")
    marked, plain = imported(path, "csv", columns="instruction=problem")
    assert texts(marked)[0] == ["Look: ", f"[{tmp_path}/a.png]", " What?"]
    assert texts(plain)[0] == [f"[{tmp_path}/a.png]", "What?"]
    path.write_text("image,problem,output\na.png,<image> and <image>?,A\n")
    assert (
        "the text has 2 <image> but the row 1 images" in bad_rows(path, "csv", columns="instruction=problem")[0].problem
    )


def test_a_table_with_another_delimiter_is_told_which(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("instruction;output\nq;a\n")
    with pytest.raises(ConfigError) as caught:
        imported(path, "csv")
    assert "give the option delimiter=';'" in (caught.value.remedy or "")
    assert texts(imported(path, "csv", delimiter=";")[0]) == [["q"], ["a"]]
