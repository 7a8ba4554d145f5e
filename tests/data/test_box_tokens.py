"""Boxes marked by a model's own tokens: tokens where the record says so, in every role, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

import tests.data.small_chats as sc
import tests.data.small_tokenizers as st
from mmit.data.chat import chat_format, encode
from mmit.data.chat_builtin import Piece
from mmit.data.formats import FORMATS
from mmit.data.lint.linter import lint
from mmit.data.lint.rules import control_check
from mmit.errors import RecordError
from mmit.records import Record, Text, Turn

BOX = ("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>")
WRITTEN = "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = st.byte_level()
    found.add_special_tokens({"additional_special_tokens": [*st.CONTROL, *BOX]})
    return found


def marked(asked: str = "See <ref-object><bbox>?", answer: str = "At <bbox>.", boxes: str = "qwen2_vl") -> Record:
    """A row of ms-swift's layout, read with tokens."""
    count = (asked + answer).count("<bbox>")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    objects = {"ref": ["the cat"], "bbox": [[0.1, 0.1, 0.5, 0.5]] * count, "bbox_type": "norm1"}
    return FORMATS["messages"]({"messages": turns, "objects": objects}, boxes=boxes)


def test_tokens_in_every_role_as_the_whole_text_is_tokenised(tokenizer: Any) -> None:
    record = marked()
    assert record.turns[0].text == f"See {WRITTEN}?"
    chat = chat_format("chatml", tokenizer)
    encoded = encode(record, chat, tokenizer)
    whole = "".join(piece.text for piece in chat.pieces(record))
    assert list(encoded.ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    box = tokenizer.convert_tokens_to_ids(BOX[0])
    assert [w for i, w in zip(encoded.ids, encoded.weights, strict=True) if i == box] == [0.0, 1.0]
    assert Record.from_json(record.to_json()).turns == record.turns


@pytest.mark.parametrize("template", [sc.CHATML_DEFAULT_SYSTEM, sc.LLAMA3])
def test_through_a_template(tokenizer: Any, template: str) -> None:
    chat = chat_format(template, tokenizer)
    ids = encode(marked("  <ref-object><bbox>  "), chat, tokenizer).ids
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in BOX] == [2, 2, 1, 1]


def test_a_users_letters_stay_letters(tokenizer: Any) -> None:
    """Also beside a token, and where a span of the answer has a weight of its own."""
    parts = (Text("<|box_start|>"), Text("<|box_start|>", token=True), Text("<|im_end|>"))
    spans = (Text("<|box_start|>", 0.5, token=True), Text("<|box_end|> a", 0.25))
    record = Record((Turn("user", parts), Turn("assistant", spans)))
    encoded = encode(record, chat_format("qa", tokenizer), tokenizer)
    box, end = (tokenizer.convert_tokens_to_ids(token) for token in BOX[:2])
    assert [w for i, w in zip(encoded.ids, encoded.weights, strict=True) if i == box] == [0.0, 0.5]
    assert end not in encoded.ids and tokenizer.convert_tokens_to_ids("<|im_end|>") not in encoded.ids
    assert control_check(BOX)(record) == "<|box_end|>, <|box_start|>, <|im_end|>"
    assert control_check(BOX)(marked()) == ""


def test_behind_a_thought_written_in_the_text(tokenizer: Any) -> None:
    answer = Turn("assistant", (Text("<think>\nx\n</think>\n\n"), Text("<|box_start|>", token=True), Text("(1,2)")))
    record = Record((Turn("user", (Text("q"),)), answer))
    ids = encode(record, chat_format("chatml", tokenizer), tokenizer).ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|box_start|>")) == 1


def test_a_tokenizer_without_them_refuses_the_record(tokenizer: Any) -> None:
    for boxes in ("qwen_vl", "internvl"):
        with pytest.raises(RecordError, match="boxes are marked by <ref>, and the tokenizer has no such") as caught:
            encode(marked(boxes=boxes), chat_format("chatml", tokenizer), tokenizer)
        assert "norm1000" in caught.value.remedy


def test_no_other_token_may_be_named() -> None:
    row = {"turns": [{"role": "user", "parts": [{"text": "<|im_end|>", "token": True}]}]}
    with pytest.raises(RecordError, match=r"a token that marks no box: '<\|im_end\|>'"):
        Record.from_json(row)
    with pytest.raises(RecordError, match="a text whose token is 'yes'"):
        Record.from_json({"turns": [{"role": "user", "parts": [{"text": "<box>", "token": "yes"}]}]})


def test_an_own_format_that_drops_them_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(turns: list[Any], end: str, generate: bool) -> list[Piece]:
        texts = [(turn.number, part.text) for turn in turns for part in turn.parts]
        return [Piece("content", text, number, "text") for number, text in texts] + [Piece("template", end, 1, "end")]

    monkeypatch.setattr("mmit.data.chat.own_writer", lambda spec: (write, ""))
    with pytest.raises(RecordError, match="writes as letters"):
        encode(marked(), chat_format("a_module:write", tokenizer), tokenizer)


def test_the_linter_names_boxes_that_are_letters() -> None:
    report = lint([Record.triple("Where is <ref>it</ref><box>(1,2),(3,4)</box>?", "there")])
    assert "box-text" in report.findings
    assert "box-text" not in lint([marked(boxes="qwen_vl")]).findings
