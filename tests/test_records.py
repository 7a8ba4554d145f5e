"""Records: what goes out comes back, and every refusal names row, cause and remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.errors import RecordError, WriteError
from mmit.records import Image, Record, Text, Turn, read_jsonl, short, write_jsonl
from tests.examples import examples

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
said = texts.filter(str.strip)
paths = st.text("abcé_ 0", min_size=1, max_size=8).map(lambda name: f"pictures/{name}.png")
images = st.one_of(paths, st.binary(min_size=1, max_size=20)).map(Image)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    turns = [Turn("system", (Text(draw(said)),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.one_of(images, texts.map(Text)), max_size=4)) + [Text(draw(said))]
        turns += [Turn("user", tuple(draw(st.permutations(parts)))), Turn("assistant", (Text(draw(said)),))]
    if draw(st.booleans()):
        turns.pop()
    return Record(
        tuple(turns),
        id=draw(texts),
        source=draw(texts),
        row=draw(st.none() | st.integers(1, 9)),
        licence=draw(st.none() | texts),
        meta=draw(st.dictionaries(texts, plain_json, max_size=3)),
    )


def test_weights_tools_and_thoughts_round_trip(tmp_path: Path) -> None:
    turns = (
        Turn("system", (Text(""),)),
        Turn("user", (Text("Weather?"),), weight=0.5),
        Turn("assistant", (), thinking="", tool_calls=(CALL,), weight=0),
        Turn("tool", (Text(""), Image(str(tmp_path / "map.png"))), name="f", tool_call_id="c1"),
        Turn("tool", (Text("12 degrees"),)),
        Turn("assistant", (Text("It is "), Text("12", 0.25), Image(str(tmp_path / "a.png"))), thinking="Cold."),
    )
    record = Record(turns, "r1", weight=0.5, tools=({"name": "f"},), template_args={"enable_thinking": True})
    record.validate()
    write_jsonl([record], tmp_path / "x.jsonl")
    found = next(read_jsonl(tmp_path / "x.jsonl"))
    assert (found.turns, found.weight, found.tools) == (turns, 0.5, ({"name": "f"},))
    assert found.template_args == {"enable_thinking": True}


def test_a_plain_record_is_written_as_before() -> None:
    """Files and fingerprints of records without weights, tools or thoughts stay as they were."""
    row = Record.triple("q", "a").to_json()
    assert set(row) == {"id", "turns", "source", "row", "licence", "meta"}
    assert row["turns"][1] == {"role": "assistant", "parts": [{"text": "a"}]}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"weight": "2"}, "the record has a weight of '2'"),
        ({"tools": {"name": "f"}}, "'tools' is missing or not a list"),
        ({"tools": ["f"]}, "tool 1 is a str, not a JSON schema"),
        ({"template_args": [1]}, "'template_args' is not a mapping"),
        ({"turns": [{"role": "user", "parts": [{"text": "q", "weight": -1}]}]}, "a negative weight: -1"),
        ({"turns": [{"role": "user", "parts": [{"image": "q", "weight": 1}]}]}, "an image part has a weight"),
        ({"turns": [{"role": "user", "parts": [{"text": "q"}], "wieght": 1}]}, "unknown key 'wieght'"),
        ({"turns": [{"role": "user", "parts": [{"text": "q"}], "tool_calls": {}}]}, "'tool_calls' is missing or not"),
    ],
)
def test_extras_of_a_wrong_kind_are_refused(change: dict, cause: str) -> None:
    row = {"turns": [{"role": "user", "parts": [{"text": "q"}]}]} | change
    with pytest.raises(RecordError) as caught:
        Record.from_json(row, where="x.jsonl:3")
    assert cause in caught.value.problem and caught.value.where.startswith("x.jsonl:3")


@given(records())
def test_json_round_trip(record: Record) -> None:
    record.validate(for_training=None)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@settings(max_examples=examples(30))
@given(st.lists(records(), max_size=4))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, items: list[Record]) -> None:
    folder = tmp_path_factory.mktemp("round")
    # Paths are those of real files, so they have to start at the folder to come back as they were.
    items = [_in_folder(record, folder) for record in items]
    assert write_jsonl(items, folder / "x.jsonl") == len(items)
    assert list(read_jsonl(folder / "x.jsonl")) == items
    assert os.listdir(folder) == ["x.jsonl"]


def _in_folder(record: Record, folder: Path) -> Record:
    row = record.to_json()
    return Record.from_json(row, root=str(folder))


def user(*parts: Text | Image) -> Turn:
    return Turn("user", parts)


def answer(text: str = "yes") -> Turn:
    return Turn("assistant", (Text(text),))


ASK = user(Text("is it?"))
SYSTEM = Turn("system", (Text("Be brief."),))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = Turn("tool", (Text("12 degrees"),), name="f", tool_call_id="c1")
BAD: list[tuple[tuple, str, str]] = [
    ((), "no user turn", "user turn"),
    ((SYSTEM,), "no user turn", "user turn"),
    ((answer(),), "turn 1 is the assistant's where the user's belongs", "alternate"),
    ((ASK, ASK, answer()), "turn 2 is the user's where the assistant's belongs", "merge"),
    ((SYSTEM, answer()), "turn 2 is the assistant's", "alternate"),
    ((ASK, SYSTEM, answer()), "turn 2 is a system turn", "first turn"),
    ((Turn("gpt", (Text("x"),)),), "role 'gpt'", "valid: assistant, system, tool, user"),  # type: ignore[arg-type]
    ((Turn("asistant", (Text("x"),)),), "role 'asistant'", "did you mean 'assistant'?"),  # type: ignore[arg-type]
    ((ASK, answer("")), "turn 2 (assistant) is empty", "Fill in"),
    ((ASK, answer(" \n")), "turn 2 (assistant) is empty", "Fill in"),
    ((user(), answer()), "turn 1 (user) is empty", "Fill in"),
    ((ASK, answer(), TOOL), "the last turn is the tool's: there is no answer to learn", "assistant turn"),
    ((ASK, TOOL, answer()), "turn 2 is a tool's where the assistant's belongs", "follows the assistant turn"),
    ((ASK, answer(), TOOL, ASK), "turn 4 is the user's where the assistant's or the tool's belongs", "alternate"),
    ((ASK, Turn("assistant", (Text("x"),), weight=-1)), "turn 2 (assistant) has a negative weight", "unlearn"),
    ((ASK, Turn("assistant", (Text("x", float("nan")),))), "turn 2 (assistant) has a weight of 'nan'", "finite"),
    ((ASK, Turn("assistant", (Text("x", True),))), "turn 2 (assistant) has a weight of 'True'", "finite"),
    ((Turn("user", (Text("x"),), thinking="y"), answer()), "turn 1 (user) has thinking", "Only the assistant's"),
    ((Turn("user", (Text("x"),), tool_calls=(CALL,)), answer()), "turn 1 (user) has tool_calls", "Only the assist"),
    ((ASK, Turn("assistant", (), tool_calls=({"name": "f"},))), "tool call 1 without a function name", "Write"),
    ((ASK, Turn("assistant", (), thinking="only")), "turn 2 (assistant) is empty", "Fill in"),
    ((Turn("system", (Image("a.png"), Text("x"))), ASK), "turn 1 (system) has an image", "user turn"),
    ((user(Image("")), answer()), "an image without a file", "path of a file"),
    ((user(Image(b"")), answer()), "an image without a file", "path of a file"),
    ((user(Image(None)), answer()), "an image without a file", "path of a file"),  # type: ignore[arg-type]
    ((user(Image("https://x.org/a.png")), answer()), "is a URL: 'https://x.org/a.png'", "Download"),
    ((user(Image("data:image/png;base64,AA")), answer()), "is a URL", "Download"),
    ((user(Image("a\0.png")), answer()), "not valid text", "Rename"),
    ((user(Text("a\ud800b")), answer()), "half of a surrogate pair at character 1", "UTF-8"),
    ((user(Text(3)), answer()), "a text part that is a int", "string"),  # type: ignore[arg-type]
    ((user("hello"), answer()), "a part that is a str", "Text or an Image"),  # type: ignore[arg-type]
    (("hello",), "turn 1 is a str", "Turn"),
    ((ASK,), "no answer to learn", "assistant turn"),
]


@pytest.mark.parametrize(("turns", "cause", "remedy"), BAD, ids=lambda value: str(value)[:30])
def test_validation_names_row_cause_and_remedy(turns: tuple, cause: str, remedy: str) -> None:
    with pytest.raises(RecordError) as caught:
        Record(turns, id="r7", source="set.jsonl", row=12).validate()
    assert caught.value.where == "set.jsonl:12 (r7)"
    assert cause in caught.value.problem
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"id": 3}, "'id' is 3, not a string"),
        ({"source": None}, "'source' is None"),
        ({"row": "4"}, "'row' is 4, not a whole number"),
        ({"row": True}, "'row' is True"),
        ({"licence": 1}, "'licence' is 1"),
        ({"meta": []}, "'meta' is [], not a mapping"),
    ],
)
def test_provenance_types(change: dict, cause: str) -> None:
    with pytest.raises(RecordError) as caught:
        Record((ASK, answer()), **change).validate()
    assert cause in caught.value.problem and caught.value.remedy


def test_endings() -> None:
    asked, answered = Record((SYSTEM, ASK)), Record((ASK, answer()))
    asked.validate(for_training=False)
    answered.validate()
    for record in (asked, answered):
        record.validate(for_training=None)
    with pytest.raises(RecordError, match="end with the user turn"):
        answered.validate(for_training=False)


def test_literal_marker_is_text() -> None:
    record = Record((user(Text("What does <image> mean in HTML?")), answer("<image> is no tag")))
    record.validate()
    assert record.images == () and record.turns[0].text.count("<image>") == 1


def test_triple() -> None:
    record = Record.triple("Translate.", "chat", input="cat", images=[Path("a.png"), Image(b"x")], id="t")
    record.validate()
    assert record.turns[0].text == "Translate.\n\ncat" and record.turns[1].text == "chat"
    assert record.images == (Image("a.png"), Image(b"x")) and record.id == "t"
    with pytest.raises(RecordError, match=r"images=\[path\]"):
        Record.triple("Look.", "ok", images="a.png")


def test_sequences_become_tuples_and_text_does_not() -> None:
    assert Record([Turn("user", [Text("x")])]) == Record((Turn("user", (Text("x"),)),))  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="'parts' is a str"):
        Turn("user", "hello")  # type: ignore[arg-type]


ROW = {"turns": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "assistant", "parts": [{"text": "a"}]}]}


def _row(part: object) -> dict:
    return {"turns": [{"role": "user", "parts": [part]}]}


@pytest.mark.parametrize(
    ("row", "cause", "remedy"),
    [
        ([1], "found a list", "A row reads"),
        ({"turn": []}, "unknown key 'turn'", "did you mean 'turns'"),
        ({}, "'turns' is missing", "A row reads"),
        (
            {**ROW, "extra": 1},
            "unknown key 'extra'",
            "valid: id, label, licence, meta, rejected, row, source, template_args, tools, turns, weight",
        ),
        ({"turns": [{"role": "user"}]}, "'parts' is missing", "A row reads"),
        ({"turns": [{"role": "user", "content": "q", "parts": []}]}, "unknown key 'content'", "valid: name, parts"),
        (_row("q"), "found a str", "A row reads"),
        (_row({"txt": "q"}), "unknown key 'txt'", "did you mean 'text'"),
        (_row({"text": "q", "image": "a"}), "cannot tell what a part is", "exactly one key"),
        (_row({"text": 1}), "cannot tell what a part is", "its value a string"),
        (_row({"image": ""}), "an image without a file", "path of a file"),
        (_row({"image": "http://x.org/a.png"}), "a URL", "Download"),
        (_row({"image_base64": "?"}), "not base64", "b64encode"),
        ({**ROW, "turns": ROW["turns"][1:]}, "turn 1 is the assistant's", "alternate"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: object, cause: str, remedy: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(row) + "\n" + json.dumps(ROW) + "\n")
    with pytest.raises(RecordError) as caught:
        list(read_jsonl(path))
    assert caught.value.where.startswith(f"{path}:3")
    assert cause in caught.value.problem and remedy in caught.value.remedy

    seen: list[RecordError] = []
    kept = list(read_jsonl(path, on_bad=seen.append))
    assert [record.row for record in kept] == [1, 4] and len(seen) == 1


@pytest.mark.parametrize("line", [b'{"turns": [', b"\xff\xfe{}", b"[" * 100_000])
def test_lines_that_are_not_json(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    with pytest.raises(RecordError, match="not JSON") as caught:
        list(read_jsonl(path))
    assert caught.value.where == f"{path}:2" and "fix or remove" in caught.value.remedy


def test_reading_streams_and_fills_in_provenance(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\nnot json\n")
    first = next(read_jsonl(path))
    assert first.where == f"{path}:1"
    with pytest.raises(RecordError, match="cannot read"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    good = Record((ASK, answer()), source="s")
    write_jsonl([good], path)
    with pytest.raises(RecordError, match="is empty"):
        write_jsonl([good, Record((ASK, answer("")))], path)
    assert list(read_jsonl(path)) == [good] and os.listdir(path.parent) == ["x.jsonl"]
    write_jsonl((record for record in read_jsonl(path)), path)
    assert list(read_jsonl(path)) == [good]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        write_jsonl([good], tmp_path / "file" / "x.jsonl")


@pytest.mark.parametrize("meta", [{"a": (1,)}, {"a": float("nan")}, {1: 2}, {"a": object()}, {"a": "\ud800"}])
def test_meta_that_json_would_change_is_refused(meta: dict) -> None:
    with pytest.raises(RecordError, match="JSON cannot keep"):
        Record((ASK, answer()), meta=meta).to_json()


def test_image_paths_follow_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = (user(Image("set/pictures/a.png"), Image(str(tmp_path / "set/b.png")), Image("c.png")), answer())
    write_jsonl([Record(turns)], "set/x.jsonl")
    row = json.loads(Path("set/x.jsonl").read_text())
    written = [part["image"] for part in row["turns"][0]["parts"]]
    assert written == ["pictures/a.png", "b.png", str(tmp_path / "c.png")]
    read = [image.source for image in next(read_jsonl("set/x.jsonl")).images]
    assert read == ["set/pictures/a.png", "set/b.png", str(tmp_path / "c.png")]
    os.rename("set", "moved")
    assert next(read_jsonl("moved/x.jsonl")).images[0].source == "moved/pictures/a.png"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pil_pictures_become_png(mode: str) -> None:
    picture = PIL.Image.new(mode, (3, 2), 1)
    exif = picture.getexif()
    exif[0x0112] = 6
    back = Record.from_json(Record((user(Image(picture)), answer())).to_json())
    assert isinstance(back.images[0].source, bytes)
    decoded = PIL.Image.open(BytesIO(back.images[0].source))
    assert decoded.mode == mode and decoded.tobytes() == picture.tobytes()
    assert decoded.getexif()[0x0112] == 6


def test_pil_modes_png_cannot_keep() -> None:
    with pytest.raises(RecordError, match=r"mode CMYK.*\n.*convert"):
        Record((user(Image(PIL.Image.new("CMYK", (2, 2)))), answer()), id="p").to_json()


@given(st.text() | st.binary() | st.integers())
def test_short_is_one_bounded_printable_line(value: object) -> None:
    line = short(value, 20)
    assert len(line) <= 20 and (line.isprintable() or not line)


def test_no_torch_and_no_pil_at_import() -> None:
    code = "import sys, mmit.records; print([m for m in ('torch', 'PIL') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_what_was_validated_is_not_looked_at_again_unless_it_could_change() -> None:
    sound = Record.triple("q", "a")
    sound.validate()
    for broken in ({"weight": -1.0}, {"turns": (*sound.turns, sound.turns[1])}, {"id": 3}):
        with pytest.raises(RecordError):
            replace(sound, **broken).validate()
    with pytest.raises(RecordError, match="the last turn is the assistant's"):
        sound.validate(for_training=False)
    assert sound == Record.triple("q", "a") and "_sound" not in repr(sound)
    tool = {"name": "f"}
    open_to_change = replace(sound, tools=(tool,))
    open_to_change.validate()
    tool["name"] = float("nan")
    with pytest.raises(RecordError):
        open_to_change.validate()
