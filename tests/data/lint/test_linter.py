"""Every rule of the linter finds what it is there for, in the right rows, and sound data is left in peace."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmit.data.chat import chat_format, encode
from mmit.data.lint.linter import Report, lint, main_script
from mmit.data.lint.rules import RULES, SEVERITIES
from mmit.data.rows import read_rows, sample_rows
from mmit.errors import ConfigError, RecordError
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


BAD_TURNS = {
    "alternation": [("user", "Hi"), ("user", "there"), ("assistant", "Hello")],
    "empty-turn": [("user", "Hi"), ("assistant", " ")],
    "no-answer": [("user", "Hi")],
    "bad-row": [("user", 7), ("assistant", "Hello")],
}


@pytest.mark.parametrize("rule", BAD_TURNS)
def test_rows_that_training_refuses(tmp_path, rule):
    row = {"id": "x", "turns": [{"role": role, "parts": [{"text": text}]} for role, text in BAD_TURNS[rule]]}
    good = sound(1)[0].to_json()
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    report = lint(read_rows(tmp_path / "rows.jsonl"))
    assert set(report.findings) == {rule}
    assert report.records == 2 and RULES[rule].severity == "error"
    place = report.findings[rule][0].where
    assert "rows.jsonl:2" in place


def test_roles_out_of_order_and_lines_that_are_no_json(tmp_path):
    parts = [{"text": "x"}]
    lines = [
        json.dumps({"turns": [{"role": "usr", "parts": parts}]}),
        json.dumps({"turns": [{"role": "user", "parts": parts}, {"role": "system", "parts": parts}]}),
        json.dumps({"turns": [{"role": "assistant", "parts": parts}, {"role": "user", "parts": parts}]}),
        json.dumps({"turns": [{"role": "system", "parts": parts}]}),
        "{",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    report = lint(read_rows(tmp_path / "rows.jsonl", "mmit"))
    assert {rule: len(rows) for rule, rows in report.findings.items()} == {
        "alternation": 3,
        "no-answer": 1,
        "bad-row": 1,
    }


@pytest.mark.parametrize(
    ("image", "question", "answer"),
    [
        (["a.png", "b.png"], "<image> What?", "A thing."),
        ("a.png", "<image> <image> What?", "A thing."),
        (None, "<image> What?", "A thing."),
        ("a.png", "What?", "A <image> thing."),
    ],
)
def test_images_and_slots(tmp_path, image, question, answer):
    row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    row |= {} if image is None else {"image": image}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert set(lint(read_rows(tmp_path / "rows.json", "llava")).findings) == {"image-slots"}


def test_an_image_in_a_system_turn_is_a_matter_of_slots(tmp_path):
    turns = [{"role": "system", "parts": [{"image": "a.png"}]}, {"role": "user", "parts": [{"text": "?"}]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"turns": turns}))
    assert set(lint(read_rows(tmp_path / "rows.jsonl")).findings) == {"image-slots"}


@pytest.mark.parametrize("marker", ["<img>a.png</img>", "<|image_1|>", "<ImageHere>", "<image_placeholder>"])
def test_a_marker_of_another_family_is_an_error(tmp_path, marker):
    """Without a picture it would be learnt as letters."""
    row = {"conversations": [{"from": "human", "value": f"{marker}What?"}, {"from": "gpt", "value": "A thing."}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    report = lint(read_rows(tmp_path / "rows.json", "sharegpt"))
    assert set(report.findings) - {"control-text"} == {"foreign-marker"} and report.count("error") == 1
    assert marker in report.findings["foreign-marker"][0].problem


# --- one record ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a </s> b", "[INST] x", "<<SYS>>", "<start_of_turn>user", "<|begin_of_text|>", "<pad>"]
)
def test_control_text(text):
    assert one(talk("What?", f"It is {text}.")) == {"control-text"}
    assert one(talk(f"What is {text}?", "A token.")) == {"control-text"}


def test_control_tokens_of_the_tokenizer():
    assert not one(talk("What?", "See <tool> here."))
    assert one(talk("What?", "See <tool> here."), control_tokens=["<tool>", "<image>"]) == {"control-text"}


@pytest.mark.parametrize("text", ["a < b | c > d", "x[INSTANCE]", "<b>bold</b>", "<image_>"])
def test_what_is_no_control_text(text):
    assert not one(talk("What?", text))


def test_markers_in_text():
    assert one(talk("What is in <image>?", "A cat.")) == {"image-marker"}
    assert one(talk("What?", "A cat.\nUSER: And now?")) == {"role-marker"}
    assert not one(talk("What?", "The user: a person."))


def test_answers_that_repeat():
    prompt = "Describe the weather today."
    assert one(talk(prompt, f" {prompt.upper()} It rains.")) == {"repeats-prompt"}
    assert one(talk(prompt, prompt)) == {"repeats-prompt"}
    assert not one(talk("Hello.", "Hello."))
    assert one(talk("A?", "b", "C?", "d", "A?", "b")) == {"repeated-pair"}
    assert not one(talk("A?", "b", "C?", "d", "A?", "e"))


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


# --- pictures -----------------------------------------------------------------------------------------------------


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path):
    for i in range(12):
        noise(i).save(tmp_path / f"{i}.png")
    return tmp_path


def about(path: Path | str, **provenance: Any) -> Record:
    name = Path(path).name
    provenance.setdefault("id", name)
    return Record.triple(f"What is in {name}?", "A pattern.", images=[str(path)], **provenance)


def test_sound_pictures(pictures):
    rows = [about(pictures / f"{i}.png", meta={"width": 40, "height": 30}) for i in range(12)]
    assert not lint(rows, open_images=True).findings


def test_missing_and_unreadable_pictures(pictures):
    (pictures / "0.png").write_text("no picture")
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    rows = [about(pictures / name) for name in ("0.png", "1.png", "2.png", "gone.png")]
    again = talk("And what is this?", "Nothing.", id="again")
    again = Record((Turn("user", (Image(str(pictures / "gone.png")), *again.turns[0].parts)), again.turns[1]), id="2nd")
    unopened = lint([*rows, again])
    assert found(unopened) == {"missing-image": ["record (gone.png)", "record (2nd)"]}
    assert "content of images" in unopened.not_checked
    opened = found(lint([*rows, again], open_images=True))
    assert opened["unreadable-image"] == ["record (0.png)", "record (1.png)"]
    assert opened["missing-image"] == ["record (gone.png)", "record (2nd)"]


def test_pictures_that_are_not_what_they_say(pictures):
    noise(50).save(pictures / "wrong.jpg", "PNG")
    rows = [about(pictures / "wrong.jpg"), about(pictures / "3.png", meta={"width": 41, "height": 30})]
    report = lint(rows, open_images=True)
    assert found(report) == {"image-mismatch": ["record (wrong.jpg)", "record (3.png)"]}
    assert "is a PNG file" in report.findings["image-mismatch"][0].problem
    assert "41 x 30 by the row, 40 x 30 by the file" in report.findings["image-mismatch"][1].problem


def test_the_same_and_similar_pictures(pictures):
    (pictures / "copy.png").write_bytes((pictures / "5.png").read_bytes())
    noise(6, (80, 60)).save(pictures / "scaled.jpg", quality=80)
    names = [*(f"{i}.png" for i in range(12)), "copy.png", "scaled.jpg"]
    report = lint([about(pictures / name) for name in names], open_images=True)
    assert found(report) == {"duplicate-image": ["record (copy.png)"], "near-duplicate-image": ["record (scaled.jpg)"]}


def test_pictures_of_the_test_data(pictures):
    (pictures / "copy.png").write_bytes((pictures / "5.png").read_bytes())
    noise(6, (80, 60)).save(pictures / "scaled.jpg", quality=80)
    train = [about(pictures / f"{i}.png") for i in range(8)]
    test = [about(pictures / name, id=f"test-{name}") for name in ("9.png", "1.png", "copy.png", "scaled.jpg")]
    report = lint(train, test=test, open_images=True)
    assert found(report) == {
        "test-image": ["record (1.png)", "record (5.png)"],
        "test-image-near": ["record (6.png)"],
        "test-record": ["record (1.png)"],
    }
    # By name alone: only the file that both use.
    assert found(lint(train, test=test))["test-image"] == ["record (1.png)"]


def test_pictures_inside_the_records():
    out = io.BytesIO()
    noise(1).save(out, "PNG")
    rows = [Record.triple(f"What is {i}?", "A pattern.", images=[out.getvalue()], id=str(i)) for i in range(3)]
    assert not lint(rows, open_images=True).findings
    report = lint(rows[:1], test=[Record.triple("What?", "Yes.", images=[out.getvalue()])])
    assert set(report.findings) == {"test-image"}


# --- the method ---------------------------------------------------------------------------------------------------


# --- report -------------------------------------------------------------------------------------------------------


def test_the_report_is_json_with_every_place():
    report = lint([*sound(3), talk("What?", "</s>", id="x"), talk("What now?", "</s>", id="y")])
    data = json.loads(json.dumps(report.to_json()))
    assert data["records"] == 5 and data["counts"] == {"error": 0, "warning": 2, "info": 0}
    assert [row["where"] for row in data["rules"]["control-text"]["rows"]] == ["record (x)", "record (y)"]
    assert data["not_checked"]["tokens"] and data["licences"] == {"not stated": 5}


def test_every_rule_is_explained():
    for rule in RULES.values():
        assert rule.severity in SEVERITIES and rule.about and rule.remedy.endswith(".")


# --- reading ------------------------------------------------------------------------------------------------------


def test_rows_come_in_order_with_their_errors(tmp_path):
    good, bad = sound(4), '{"turns": []}'
    lines = [json.dumps(record.to_json()) for record in good]
    (tmp_path / "rows.jsonl").write_text("\n".join([bad, lines[0], lines[1], bad, lines[2], lines[3], bad]))
    kinds = [isinstance(row, RecordError) for row in read_rows(tmp_path / "rows.jsonl")]
    assert kinds == [True, False, False, True, False, False, True]
    assert len(list(read_rows(tmp_path / "rows.jsonl", limit=3))) == 3
    with pytest.raises(ConfigError, match="no such file"):
        next(read_rows(tmp_path / "gone.jsonl"))


def test_samples_are_even_and_repeatable():
    rows = sound(50)
    drawn, total = sample_rows(rows, 10, seed=3)
    assert total == 50 and len(drawn) == 10 and drawn == sample_rows(iter(rows), 10, seed=3)[0]
    assert [rows[number - 1] for number, _ in drawn] == [record for _, record in drawn]
    assert drawn != sample_rows(rows, 10, seed=4)[0]
    counts = [0] * 10
    for seed in range(600):
        for number, _ in sample_rows(rows[:10], 3, seed=seed)[0]:
            counts[number - 1] += 1
    assert max(counts) < 240 and min(counts) > 120  # 180 expected each
    assert sample_rows(rows[:4], 10, seed=0)[0] == list(enumerate(rows[:4], 1))


@pytest.mark.slow
def test_a_hundred_thousand_rows_a_minute(tmp_path):
    write_jsonl(
        (Record.triple(words(i, 25), words(i + 10**6, 65), id=str(i)) for i in range(5000)), tmp_path / "rows.jsonl"
    )
    start = time.process_time()
    assert not lint(read_rows(tmp_path / "rows.jsonl", "mmit")).findings
    assert 5000 / (time.process_time() - start) * 60 > 100_000
