"""mmit's text against the template's: equal where nothing is wrong, and a difference is shown where it begins."""

from __future__ import annotations

import pytest

from mmit.data.chat import TemplateFormat, chat_format
from mmit.data.chat_builtin import Piece
from mmit.data.chat_check import IMAGE, difference, expected_text, text_of
from mmit.records import Image, Record, Text, Turn
from tests.data.small_tokenizers import byte_level

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECORD = Record(
    (Turn("user", (Image("a.png"), Text("What is it?"))), Turn("assistant", (Text("A cat."),), thinking="hm"))
)


@pytest.fixture
def chat() -> TemplateFormat:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    found = chat_format("hf", tokenizer)
    assert isinstance(found, TemplateFormat)
    return found


def test_a_record_is_what_the_template_writes(chat: TemplateFormat) -> None:
    assert difference(RECORD, chat) == ""
    text = text_of(RECORD, chat)
    assert text == expected_text(RECORD, chat) and f"{IMAGE}What is it?" in text and "hm" in text


def test_a_difference_is_shown_where_it_begins(chat: TemplateFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chat.pieces(RECORD)
    last = max(n for n, piece in enumerate(whole) if piece.kind == "content")
    changed = [p._replace(text="A dog.") if n == last else p for n, p in enumerate(whole)]
    monkeypatch.setattr(TemplateFormat, "pieces", lambda self, record: changed)
    at = text_of(RECORD, chat).index("dog")
    told = difference(RECORD, chat)
    assert told.startswith(f"at character {at} mmit has '") and "A dog." in told and "A cat." in told
    changed[last:] = []  # a text that ends too early differs at its end
    assert "A cat." in difference(RECORD, chat)


def test_an_end_that_mmit_adds_is_no_difference(chat: TemplateFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [*chat.pieces(RECORD), Piece("template", "<|eos|>", 1, "added")]
    monkeypatch.setattr(TemplateFormat, "pieces", lambda self, record: whole)
    assert difference(RECORD, chat) == ""


def test_formats_in_code_have_no_template_to_differ_from() -> None:
    assert difference(RECORD, chat_format("qa", byte_level())) == ""
