"""Tokenizers as the vocabulary of a GGUF file: how text is cut, scores and types of tokens, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers as tk
from transformers import PreTrainedTokenizerFast

from mmit.errors import ModelError
from mmit.models.interop.gguf_tokens import LLAMA_3, QWEN_2, Vocabulary, vocabulary
from tests.data.small_tokenizers import FAMILIES as TOKENIZERS
from tests.data.small_tokenizers import SENTENCES, byte_level

PREPEND = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]


def sentencepiece(merges: list[Any], *, normal: Any = PREPEND, cut: Any = None) -> Vocabulary:
    """The vocabulary of a BPE model with byte fallback: <unk>, <s>, a byte, then what is merged."""
    tokens = ["<unk>", "<s>", "<0x0A>", "a", "b", "c", "ab", "abc", "bc"]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": merges}
    normalizer = normal and {"type": "Sequence", "normalizers": normal}
    told = {"model": model, "normalizer": normalizer, "pre_tokenizer": cut}
    return vocabulary(
        SimpleNamespace(
            backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(told)),
            get_vocab=lambda: {token: number for number, token in enumerate(tokens)},
            added_tokens_decoder={1: SimpleNamespace(special=True)},
        ),
        rows=len(tokens) + 1,
    )


def test_scores_follow_the_order_of_merges_and_types_the_use_of_tokens() -> None:
    found = sentencepiece([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]])
    assert (found.model, found.prefix) == ("llama", True)
    assert found.types == (2, 3, 6, 1, 1, 1, 1, 1, 1, 5)  # unknown, control, byte, normal, ..., a row without a token
    assert found.tokens[-1] == "[PAD9]"
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["ab"] == -1 > scores["bc"] == -2 > scores["abc"] == -3  # its two merges are one token's
    assert sentencepiece(["a b", "b c", "ab c"]).scores == sentencepiece([["a", "b"], ["b", "c"], ["ab", "c"]]).scores


def test_a_token_with_merges_in_two_places_has_no_score() -> None:
    with pytest.raises(ModelError, match="the merges of its token 'abc' are not next to each other"):
        sentencepiece([["ab", "c"], ["b", "c"], ["a", "bc"]])


@pytest.mark.parametrize(
    ("normal", "cut", "prefix"),
    [
        (PREPEND, None, True),
        (PREPEND[1:], None, False),
        (None, {"type": "Metaspace", "split": False, "prepend_scheme": "first"}, True),
        (None, {"type": "Metaspace", "split": False, "prepend_scheme": "never"}, False),
    ],
)
def test_whether_a_text_gets_a_space_in_front_is_read(normal: Any, cut: Any, prefix: bool) -> None:
    assert sentencepiece([["a", "b"]], normal=normal, cut=cut).prefix is prefix


def test_another_treatment_of_spaces_is_refused_by_its_steps() -> None:
    with pytest.raises(ModelError, match=r"treats spaces .* \(Replace, Metaspace\)"):
        cut = {"type": "Metaspace", "split": True, "prepend_scheme": "always"}
        sentencepiece([["a", "b"]], normal=PREPEND[1:], cut=cut)


def fast(*cut: tk.pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts text so, trained on a few sentences."""
    tok = tk.Tokenizer(tk.models.BPE(ignore_merges=ignore_merges))
    tok.pre_tokenizer = tk.pre_tokenizers.Sequence(list(cut))
    tok.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|eos|>"], show_progress=False
    )
    tok.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|eos|>")


def split(pattern: str) -> tk.pre_tokenizers.PreTokenizer:
    return tk.pre_tokenizers.Split(tk.Regex(pattern), "isolated")


BYTES = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


BY_WORDS = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


DIGITS = tk.pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(
    ("cut", "ignore_merges", "pre"),
    [
        ([BY_WORDS], False, "gpt-2"),
        ([DIGITS, BY_WORDS], False, "smollm"),
        ([split(LLAMA_3), BYTES], True, "llama-bpe"),
        ([split(LLAMA_3), BYTES], False, "dbrx"),
        ([split(QWEN_2), BYTES], False, "qwen2"),
    ],
)
def test_the_way_of_cutting_text_is_named(cut: list[Any], ignore_merges: bool, pre: str) -> None:
    tokenizer = fast(*cut, ignore_merges=ignore_merges)
    assert vocabulary(tokenizer, len(tokenizer)).pre == pre


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        (lambda: fast(split(r"\d"), BYTES), r"no name for \(\\d and bytes\)"),
        (lambda: fast(BY_WORDS, ignore_merges=True), "no name for"),
        (lambda: fast(tk.pre_tokenizers.ByteLevel(add_prefix_space=True)), "no name for"),
        (TOKENIZERS["unigram"], "its model is Unigram"),
        (TOKENIZERS["word_piece"], "its model is WordPiece"),
        (byte_level, "300 rows"),
    ],
)
def test_other_tokenizers_are_refused_by_what_sets_them_apart(tokenizer: Any, told: str) -> None:
    made = tokenizer()
    with pytest.raises(ModelError, match=told) as caught:
        vocabulary(made, 300 if tokenizer is byte_level else len(made))
    assert "--format mmit" in caught.value.remedy
