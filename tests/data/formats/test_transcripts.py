"""Dialogues in one text: cut where a speaker begins and nowhere else, calls and schemas read, the rest refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.data.formats import detect_format, find_format, import_file
from mmit.errors import RecordError
from mmit.records import Record
from tests.data.formats.format_tools import bad_rows, imported, shape, write

ASKED = "\n\nHuman: Which city?\n\nAssistant: Rome, said the\nHuman: I mean it.\n\nHuman: Sure?\nReally?\n\nAssistant:"
SCHEMA = '{\n  "name": "rate",\n  "parameters": {"type": "object"}\n}'
CALL = """{"name": "rate", "arguments": '{"from": "USD", "note": "it''s"}'}"""
GLAIVE = {
    "system": f"SYSTEM: You may use the following functions -\n{SCHEMA}\n\n{SCHEMA}\n",
    "chat": "USER: Rate?\n\n\nASSISTANT: I look.\n\n<functioncall> {call} <|endoftext|>\n\n\nFUNCTION RESPONSE: "
    '{"rate": 2}\n\n\nASSISTANT: It is 2. <|endoftext|>',
}


def glaive(**keys: str) -> Record:
    return find_format("glaive")({**GLAIVE, "chat": GLAIVE["chat"].replace("{call}", CALL), **keys})


def test_a_pair_of_hh_rlhf(tmp_path: Path) -> None:
    path = write(tmp_path / "hh.jsonl", [{"chosen": f"{ASKED} Yes.", "rejected": f"{ASKED} No.\n\nWhy?"}], lines=True)
    assert detect_format(path)[0] == "preference"
    record = imported(path, "preference")[0]
    record.validate()
    assert shape(record) == [
        ("user", ["Which city?"]),
        ("assistant", ["Rome, said the\nHuman: I mean it."]),
        ("user", ["Sure?\nReally?"]),
        ("assistant", ["Yes."]),
    ]
    assert record.rejected is not None and record.rejected.text == "No.\n\nWhy?"


@pytest.mark.parametrize("end", ["\n\nAssistant:", ""])
def test_a_pair_beside_a_prompt_in_one_text(end: str) -> None:
    asked = ASKED.removesuffix("\n\nAssistant:") + end
    record = find_format("preference")({"prompt": asked, "chosen": " Yes.", "rejected": " No."})
    record.validate()
    assert [turn.role for turn in record.turns] == ["user", "assistant"] * 2
    assert record.turns[2].text == "Sure?\nReally?" and record.turns[3].text == " Yes."
    with pytest.raises(RecordError, match="the row has an answer, and another"):
        find_format("preference")({"prompt": f"{ASKED} Yes.", "chosen": " No.", "rejected": " So."}).validate()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": f"{ASKED} Yes.", "rejected": "No."}, "'rejected' begins with 'No.', not with a speaker"),
        ({"chosen": f"{ASKED} Yes.", "rejected": ASKED.replace("city", "town") + " No."}, "turn 1 differs"),
        ({"chosen": f"{ASKED} Yes.", "rejected": "\n\nHuman: Which city?\n\nAssistant: No."}, "it has 1 turns"),
        ({"chosen": f"{ASKED} Yes."}, "half of a preference pair"),
        ({"chosen": f"{ASKED} Yes.", "rejected": f"{ASKED} Yes."}, "are equal"),
        ({"chosen": ASKED, "rejected": f"{ASKED} No."}, "empty"),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, row: dict[str, str], problem: str) -> None:
    bad = bad_rows(write(tmp_path / "hh.jsonl", [row], lines=True), "preference")
    assert len(bad) == 1 and problem in bad[0].problem


def test_guanaco(tmp_path: Path) -> None:
    text = "### Human: Name a city.### Assistant: Rome\n### Headings stay.### Human: Why?"
    path = write(tmp_path / "rows.jsonl", [{"text": text}, {"text": "Rome is old."}], lines=True)
    assert detect_format(path)[0] == "guanaco"
    bad: list[RecordError] = []
    record, *others = import_file(path, "guanaco", on_bad=bad.append)
    record.validate()
    assert shape(record) == [("user", ["Name a city."]), ("assistant", ["Rome\n### Headings stay."])]
    assert record.meta == {"dropped_last_turn": "Why?"} and not others
    assert [error.problem for error in bad] == ["'text' begins with 'Rome is old.', not with a speaker"]


def test_in_tables(tmp_path: Path) -> None:
    for number, row in enumerate(
        (
            {"text": "### Human: q### Assistant: a"},
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            {"system": "SYSTEM: S", "chat": "USER: q\n\n\nASSISTANT: a"},
        )
    ):
        path = tmp_path / f"{number}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, row)
            table.writeheader()
            table.writerow(row)
        assert shape(imported(path, "csv")[0])[-2:] == [("user", ["q"]), ("assistant", ["a"])]


@pytest.mark.parametrize("rendered", ["<|im_start|>user\nq<|im_end|>", "<s>[INST] q [/INST] a </s>"])
def test_a_rendered_conversation_is_named(tmp_path: Path, rendered: str) -> None:
    with pytest.raises(RecordError, match="chat template"):
        detect_format(write(tmp_path / "rows.jsonl", [{"text": rendered}], lines=True))


def test_functions_of_glaive(tmp_path: Path) -> None:
    path = write(tmp_path / "glaive.json", [{**GLAIVE, "chat": GLAIVE["chat"].replace("{call}", CALL)}])
    assert detect_format(path)[0] == "glaive"
    record = imported(path, "glaive")[0]
    record.validate()
    assert shape(record) == [
        ("system", ["You may use the following functions"]),
        ("user", ["Rate?"]),
        ("assistant", ["I look."]),
        ("tool", ['{"rate": 2}']),
        ("assistant", ["It is 2."]),
    ]
    called = {"name": "rate", "arguments": {"from": "USD", "note": "it''s"}}
    assert record.turns[2].tool_calls == ({"type": "function", "function": called},)
    assert record.tools == ({"name": "rate", "parameters": {"type": "object"}},) * 2


def test_glaive_without_functions() -> None:
    plain = glaive(system="SYSTEM: You help.", chat="USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>\n\n\n")
    assert shape(plain) == [("system", ["You help."]), ("user", ["Hi"]), ("assistant", ["Hello"])] and not plain.tools
    whole = glaive(chat='USER: Hi\n\n\nASSISTANT: <functioncall> {"name": "rate", "arguments": {}} <|endoftext|>')
    assert whole.turns[2].parts == () and whole.turns[2].tool_calls[0]["function"]["name"] == "rate"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"chat": "USER: Hi\n\n\nASSISTANT: <functioncall> {rate} <|endoftext|>"}, "a <functioncall> is '{rate}'"),
        ({"system": 'SYSTEM: Functions -\n{"name": '}, "a schema in 'system'"),
        ({"chat": "Hi"}, "'chat' begins with 'Hi'"),
        ({"chat": "Hi\n\n\nASSISTANT: Hello"}, "'chat' begins with 'Hi"),
        ({"chat": ["Hi"]}, "chat"),
    ],
)
def test_glaive_that_cannot_be_read(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError) as caught:
        glaive(**keys)
    assert problem in caught.value.problem and caught.value.remedy


SAID = (
    st.text("ab \n#.:", min_size=1)
    .map(str.strip)
    .filter(lambda text: text and "\n\n" not in text and "###" not in text)
)


@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4))
def test_what_was_said_comes_back(pairs: list[tuple[str, str]]) -> None:
    said = [text for pair in pairs for text in pair]
    wanted = [(("user", "assistant")[n % 2], [text]) for n, text in enumerate(said)]
    names = ("Human", "Assistant") * len(pairs)
    row = {"text": "".join(f"### {name}: {text}" for name, text in zip(names, said, strict=True))}
    assert shape(find_format("guanaco")(row)) == wanted
    chosen = "".join(f"\n\n{name}: {text}" for name, text in zip(names, said, strict=True))
    read = find_format("preference")({"chosen": chosen, "rejected": f"{chosen} or not"})
    assert shape(read) == wanted and read.rejected is not None and read.rejected.text == f"{said[-1]} or not"
