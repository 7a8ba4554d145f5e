"""Rules that look at one record or row alone: each finds what it is there for."""

from __future__ import annotations

import json

import pytest

from mmit.data.lint.linter import lint
from mmit.data.lint.rules import RULES, SEVERITIES
from mmit.data.rows import read_rows
from tests.data.lint.test_linter import one, sound, talk

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
    assert one(talk("[USER] What is it? [ASSISTANT]", "A cat.")) == {"role-marker"}
    assert one(talk("Which [user] wrote this?", "The one in [1].")) == set()
    assert not one(talk("What?", "The user: a person."))


def test_answers_that_repeat():
    prompt = "Describe the weather today."
    assert one(talk(prompt, f" {prompt.upper()} It rains.")) == {"repeats-prompt"}
    assert one(talk(prompt, prompt)) == {"repeats-prompt"}
    assert not one(talk("Hello.", "Hello."))
    assert one(talk("A?", "b", "C?", "d", "A?", "b")) == {"repeated-pair"}
    assert not one(talk("A?", "b", "C?", "d", "A?", "e"))


def test_every_rule_is_explained():
    for rule in RULES.values():
        assert rule.severity in SEVERITIES and rule.about and rule.remedy.endswith(".")
