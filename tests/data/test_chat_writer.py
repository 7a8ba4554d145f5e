"""Pieces become ids, weights and origins: weights follow characters, spaces are lent, marks are tokens."""

from __future__ import annotations

import pytest

from mmit.data.chat_builtin import Piece
from mmit.data.chat_writer import IMAGE_SLOT, Encoded, Writer, _least
from mmit.data.content import piece_tokenizer
from mmit.errors import RecordError
from tests.data.small_tokenizers import FAMILIES, family


def writer(name: str = "byte_level", *, as_processor: bool = False, allowed: frozenset[str] = frozenset()) -> Writer:
    return Writer(piece_tokenizer(family(name)), as_processor=as_processor, allowed=allowed)


def content(text: str, **more: object) -> Piece:
    return Piece("content", text, 1, "text", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_three_lists_are_of_one_length_and_an_image_is_one_slot(name: str) -> None:
    out = writer(name)
    out.bos()
    out.template([(Piece("template", "USER: "), 0.0)], lend_space=True)
    out.images(2)
    out.content(content("what is it"), 0.5, named=False)
    out.template([(Piece("template", "hi"), 0.0)], lend_space=False)
    assert len(out.ids) == len(out.weights) == len(out.origin)
    assert [i for i, origin in zip(out.ids, out.origin, strict=True) if origin == "image"] == [IMAGE_SLOT] * 2
    assert {w for w, origin in zip(out.weights, out.origin, strict=True) if origin != "content"} == {0.0}
    assert {w for w, origin in zip(out.weights, out.origin, strict=True) if origin == "content"} == {0.5}


def test_a_space_at_the_end_of_template_text_goes_to_the_word_after_it() -> None:
    lent, kept = writer(), writer()
    lent.template([(Piece("template", "USER: "), 0.0)], lend_space=True)
    lent.content(content("hello"), 1.0, named=False)
    kept.template([(Piece("template", "USER:"), 0.0)], lend_space=False)
    kept.content(content(" hello"), 1.0, named=False)
    assert (lent.ids, lent.weights) == (kept.ids, kept.weights)
    assert family("byte_level").decode(lent.ids) == "USER: hello"


@pytest.mark.parametrize("lend", [False, True])
def test_spans_count_from_the_text_and_not_from_a_lent_space(lend: bool) -> None:
    out = writer()
    out.template([(Piece("template", "USER: "), 0.0)], lend_space=lend)
    text = "the quick brown fox"
    out.content(content(text), ((9, 1.0), (len(text), 0.0)), named=False)
    tokens = [(i, w) for i, w, o in zip(out.ids, out.weights, out.origin, strict=True) if o == "content"]
    learned = family("byte_level").decode([i for i, w in tokens if w])
    masked = family("byte_level").decode([i for i, w in tokens if not w])
    assert learned.strip() == "the quick" and masked.strip() == "brown fox"


@pytest.mark.parametrize(
    ("start", "end", "weight"),
    [(0, 3, 1.0), (3, 6, 0.0), (2, 4, 0.0), (5, 8, 0.0), (6, 9, 0.5), (4, 4, 0.0), (9, 9, 0.5)],
)
def test_a_token_over_two_spans_has_the_lesser_weight(start: int, end: int, weight: float) -> None:
    assert _least(((3, 1.0), (6, 0.0), (9, 0.5)), start, end) == weight


def test_a_run_of_template_pieces_gives_each_token_the_weight_of_its_piece() -> None:
    out = writer()
    run = [
        (Piece("template", "hello"), 0.0),
        (Piece("template", "<|im_end|>", 1, "end"), 1.0),
        (Piece("template", "\n"), 0.0),
    ]
    out.template(run, lend_space=False)
    end = family("byte_level").convert_tokens_to_ids("<|im_end|>")
    assert [i for i, w in zip(out.ids, out.weights, strict=True) if w] == [end]


def test_control_tokens_of_content_are_those_that_are_named_or_marked() -> None:
    tool = family("byte_level").convert_tokens_to_ids("<tool>")
    plain, named, marked = writer(), writer(allowed=frozenset({"<tool>"})), writer()
    plain.content(content("a <tool> b"), 1.0, named=True)
    named.content(content("a <tool> b"), 1.0, named=True)
    marked.content(content("a <tool> b", marks=((2, 8),)), 1.0, named=False)
    assert tool not in plain.ids and named.ids.count(tool) == 1 and marked.ids == named.ids
    other = writer(allowed=frozenset({"<tool>"}))
    other.content(content("a <tool> b"), 1.0, named=False)  # another role's turn may not hold it
    assert other.ids == plain.ids
    with pytest.raises(RecordError, match="no such token"):
        writer().content(content("a <nothing> b", marks=((2, 11),)), 1.0, named=False)


def test_what_carries_loss_has_a_weight_above_nothing() -> None:
    assert Encoded((1, 2, 3), (0.0, 0.5, 2.0), ("template", "content", "content")).supervised == (False, True, True)
