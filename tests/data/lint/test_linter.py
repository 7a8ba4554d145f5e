"""Every rule of the linter finds what it is there for, in the right rows, and sound data is left in peace."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from mmit.data.chat import chat_format, encode
from mmit.data.lint.linter import Report, lint, main_script
from mmit.data.rows import read_rows
from mmit.records import Image, Record, Text, Turn, write_jsonl
from tests.data.small_tokenizers import family

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "io", "ou") for c in ("n", "r", "st", "l", "ck")]


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def sound(count: int, **provenance: Any) -> list[Record]:
    made = []
    for i in range(count):
        made.append(Record.triple(words(i, 12), words(i + 10_000, 20), id=f"r{i}", source="sound", **provenance))
    return made


def found(report: Report) -> dict[str, list[str]]:
    """{rule: places}"""
    return {rule: [finding.where for finding in rows] for rule, rows in report.findings.items()}


def one(record: Record, **options: Any) -> set[str]:
    return set(lint([record], **options).findings)


def talk(*texts: str, **provenance: Any) -> Record:
    roles = ["user", "assistant"] * len(texts)
    return Record(tuple(Turn(r, (Text(t),)) for r, t in zip(roles, texts, strict=False)), **provenance)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_sound_data_has_no_findings():
    report = lint(sound(200, licence="MIT"), test=sound(230, licence="MIT")[210:])
    assert not report.findings and report.records == 200 and report.test_records == 20
    assert report.licences == {"MIT": 200} and report.sources == {"sound": 200}


# --- one record ---------------------------------------------------------------------------------------------------


def measured(name: str = "byte_level") -> Any:
    tokenizer = family(name)
    chat = chat_format("qa", tokenizer)
    return lambda record: len(encode(record.turns, chat, tokenizer).ids)


def test_longer_than_the_context():
    record = talk("What?", words(1, 50), id="long")
    length = measured()(record)
    assert one(record, measure=measured(), max_length=length - 1) == {"too-long"}
    assert not one(record, measure=measured(), max_length=length)
    assert f"{length} tokens" in lint([record], measure=measured(), max_length=3).findings["too-long"][0].problem


def test_what_the_tokenizer_cannot_write():
    assert one(talk("What?", "Ü"), measure=measured("word_piece")) == {"not-encodable"}


# --- between records ----------------------------------------------------------------------------------------------


def test_duplicates_and_near_duplicates():
    rows = sound(100)
    near = rows[5].turns[1].text.split()
    near[-1] = "changed"
    rows.append(Record.triple(rows[5].turns[0].text, " ".join(near), id="near", source="sound"))
    rows.append(Record(rows[7].turns, id="copy", source="sound"))
    report = lint(rows)
    assert found(report) == {"duplicate-record": ["sound (copy)"], "near-duplicate-record": ["sound (near)"]}
    assert report.findings["near-duplicate-record"][0].problem == "is nearly sound (r5)"
    assert report.findings["duplicate-record"][0].problem == "is sound (r7)"


def test_the_same_question_about_other_pictures_is_no_duplicate():
    question = "What is the shape in this picture, and what color does it have?"
    rows = [Record.triple(question, "A circle.", images=[Image(bytes([i]))], id=str(i)) for i in range(60)]
    assert not lint(rows).findings
    assert found(lint([*rows, rows[3]]))["duplicate-record"] == ["record (3)"]


def test_a_long_answer_given_twice():
    refusal = "I am sorry, but as a language model I cannot see pictures."
    rows = [*sound(2), talk("Is it red at all?", refusal, id="a"), talk("What is on the left?", refusal, id="b")]
    report = lint(rows)
    assert found(report) == {"duplicate-answer": ["record (b)"]}
    assert report.findings["duplicate-answer"][0].problem.startswith("as in record (a)")


def test_training_on_the_test_data():
    rows, near = sound(60), words(20, 12).split()
    held_out = sound(80)[60:] + [rows[4]]
    near[0] = "changed"
    held_out.append(Record.triple(" ".join(near), rows[20].turns[1].text, id="near-test"))
    report = lint(rows, test=held_out)
    assert found(report) == {"test-record": ["sound (r4)"], "test-record-near": ["sound (r20)"]}


def test_outliers():
    rows = sound(200) + [talk("Что это за птица?", "Это, кажется, синица, хотя видно плохо.", id="script")]
    rows.append(talk(words(1, 12), words(2, 30_000), id="long"))
    report = lint(rows)
    assert found(report) == {"script-outlier": ["record (script)"], "length-outlier": ["record (long)"]}
    assert "Cyrillic among mostly Latin" in report.findings["script-outlier"][0].problem
    # A handful of records has no outliers.
    assert not lint(rows[-4:]).findings


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "LATIN"),
        ("1 + 1 = 2", ""),
        ("", ""),
        ("naïve café", "LATIN"),
        ("привет", "CYRILLIC"),
        ("你好", "CJK"),
        ("ひらがなとカタカナ", "CJK"),
        ("안녕", "HANGUL"),
        ("abc привет", "CYRILLIC"),
        (" " * 300 + "late", "LATIN"),
    ],
)
def test_main_script(text, script):
    assert main_script(text) == script


def test_licence_mix():
    report = lint([*sound(3, licence="MIT"), *[talk("Q?", "A", licence="CC-BY-NC-4.0"), talk("R?", "B")]])
    assert report.findings["licence-mix"][0].problem == "MIT (3), CC-BY-NC-4.0 (1), not stated (1)"


# --- report -------------------------------------------------------------------------------------------------------


def test_the_report_is_json_with_every_place():
    report = lint([*sound(3), talk("What?", "</s>", id="x"), talk("What now?", "</s>", id="y")])
    data = json.loads(json.dumps(report.to_json()))
    assert data["records"] == 5 and data["counts"] == {"error": 0, "warning": 2, "info": 0}
    assert [row["where"] for row in data["rules"]["control-text"]["rows"]] == ["record (x)", "record (y)"]
    assert data["not_checked"]["tokens"] and data["licences"] == {"not stated": 5}


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_rows_a_minute(tmp_path):
    write_jsonl(
        (Record.triple(words(i, 25), words(i + 10**6, 65), id=str(i)) for i in range(5000)), tmp_path / "rows.jsonl"
    )
    start = time.process_time()
    assert not lint(read_rows(tmp_path / "rows.jsonl", "mmit")).findings
    assert 5000 / (time.process_time() - start) * 60 > 100_000
