"""A tokenizer as the vocabulary of a GGUF file.

Goes in: a fast tokenizer and the rows of a vocabulary. Comes out: tokens, their types, merges or scores, and
the name by which llama.cpp knows how text is cut before merging. Refuses every way of cutting text that llama.cpp does
not have: a wrong name there gives other tokens, and worse answers, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mmit.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
SPACE = "▁"
BYTES = frozenset(f"<0x{i:02X}>" for i in range(256))

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
LLAMA_3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN_2 = rf"{_WORDS}|\p{{N}}|{_REST}"
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = "|".join((*_LETTERS, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"))
# How byte-level tokenizers cut text, and whether a whole word in the vocabulary goes before its merges -> llama.cpp's
# name. The slow tests hold each against llama.cpp itself.
CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes by words",), False): "gpt-2",
    (("digits", "bytes by words"), False): "smollm",
    ((LLAMA_3, "bytes"), True): "llama-bpe",
    ((LLAMA_3, "bytes"), False): "dbrx",
    ((QWEN_2, "bytes"), False): "qwen2",
    ((QWEN_3_5, "bytes"), False): "qwen35",
    ((TEKKEN, "bytes"), True): "tekken",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level merges) or "llama" (SentencePiece). pre: name of how text is cut before merging.
        tokens, types: one a row of the embeddings. merges: of "gpt2", best first. scores: of "llama", one a token.
        prefix: of "llama", a text begins with a space that it does not have.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    prefix: bool = False


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Describe a tokenizer; `rows` is that of the word embeddings.

    Raises:
        ModelError: llama.cpp does not cut text as this tokenizer does, or has another kind of model.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        _refuse(f"{type(tokenizer).__name__} has no fast (Rust) form")
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model = told["model"]
    if model["type"] != "BPE":
        _refuse(f"its model is {model['type']}, not BPE")
    tokens, types = _listed(tokenizer, rows, unknown=model.get("unk_token"))
    if model.get("byte_fallback"):
        return _sentencepiece(told, tokens, types)
    pairs = _pairs(model["merges"])
    cut = _cut(told), bool(model.get("ignore_merges"))
    if cut not in CUTS:
        _refuse(f"it cuts text in a way that llama.cpp has no name for ({' and '.join(cut[0])})")
    return Vocabulary("gpt2", CUTS[cut], tokens, types, merges=tuple(f"{a} {b}" for a, b in pairs))


def _refuse(reason: str) -> Any:
    raise ModelError(
        f"gguf cannot hold this tokenizer: {reason}",
        where="model.llm",
        remedy="export with --format llava-hf or --format mmit, or train an LLM with a tokenizer as that of Llama, "
        "SmolLM2, Qwen2 or Qwen3",
    )


def _listed(tokenizer: Any, rows: int, *, unknown: str | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their types, one for each row."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        _refuse(f"it has {max(by_id) + 1:,} tokens, and the model {rows:,} rows for them")
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(UNUSED)
            continue
        tokens.append(token)
        if token == unknown:
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number].special else USER)
        else:
            types.append(BYTE if token in BYTES else NORMAL)
    return tuple(tokens), tuple(types)


def _pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """Merges, which older files hold as "a b"."""
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in merges]  # type: ignore[misc]


def _steps(told: dict[str, Any], key: str, parts: str) -> list[dict[str, Any]]:
    found = told[key]
    if found is None:
        return []
    return list(found[parts]) if found["type"] == "Sequence" else [found]


def _cut(told: dict[str, Any]) -> tuple[str, ...]:
    """The steps of a byte-level pre-tokenizer, each as one text; what is not known here keeps its own description."""
    normal = _steps(told, "normalizer", "normalizers")
    # llama.cpp normalises nothing, and text is nearly always composed already.
    steps = [json.dumps(step, ensure_ascii=False) for step in normal if step["type"] != "NFC"]
    for step in _steps(told, "pre_tokenizer", "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            steps.append("bytes by words" if step.get("use_regex", True) else "bytes")
        elif kind == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            steps.append(step["pattern"]["Regex"])
        else:
            steps.append(json.dumps(step, ensure_ascii=False))
    return tuple(steps)


def _sentencepiece(told: dict[str, Any], tokens: tuple[str, ...], types: tuple[int, ...]) -> Vocabulary:
    """SentencePiece's BPE: a token's score is the place of its merges, all of one token's in a row."""
    scores = dict.fromkeys(tokens, 0.0)
    place, last, seen = 0, None, set()
    for a, b in _pairs(told["model"]["merges"]):
        if (whole := a + b) == last:
            continue
        if whole in seen:
            _refuse(f"the merges of its token '{whole}' are not next to each other")
        place, last = place + 1, whole
        seen.add(whole)
        scores[whole] = -float(place)
    listed = tuple(scores[token] if kind in (NORMAL, BYTE) else 0.0 for token, kind in zip(tokens, types, strict=True))
    return Vocabulary("llama", "default", tokens, types, scores=listed, prefix=_prefix(told))


def _prefix(told: dict[str, Any]) -> bool:
    """Whether a text gets a space in front; refuses other ways of treating spaces."""
    steps = _steps(told, "normalizer", "normalizers")
    cut = _steps(told, "pre_tokenizer", "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps == [{"type": "Prepend", "prepend": SPACE}, replace] and not cut:
        return True
    whole = [{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}]  # Gemma
    if steps == [replace] and cut in ([], whole):
        return False
    if not steps and len(cut) == 1 and cut[0]["type"] == "Metaspace" and not cut[0]["split"]:
        return bool(cut[0]["prepend_scheme"] != "never")  # "first" is held against llama.cpp's way with real prompts
    told_steps = ", ".join(step["type"] for step in (*steps, *cut))
    return bool(_refuse(f"it treats spaces in a way that llama.cpp does not ({told_steps})"))


def llama_cpp_ids(tokenizer: Any, found: Vocabulary) -> Callable[[str], list[int]]:
    """Return what gives the ids of a text as llama.cpp does: each part between control tokens is a text of its own."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    for step in _steps(told, "pre_tokenizer", "pretokenizers"):
        if found.model == "llama" and step["type"] == "Metaspace" and step["prepend_scheme"] == "first":
            step["prepend_scheme"] = "always"
    for token in told["added_tokens"]:  # llama.cpp's take no spaces from the text beside them
        token["lstrip"] = token["rstrip"] = token["single_word"] = False
    told["post_processor"] = None
    own = Tokenizer.from_str(json.dumps(told))
    return lambda text: list(own.encode(text, add_special_tokens=False).ids)
