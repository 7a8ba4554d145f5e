"""Text to token ids without letting text turn into control tokens.

Owns the two ways a chat is tokenised: template text, in which the tokenizer's control tokens are meant, and
content, in which they cannot be written at all. Takes a fast Hugging Face tokenizer as an object and leaves
it untouched; gives lists of ids. Refuses tokenizers without a Rust form and text the vocabulary cannot spell.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from mmit.errors import ConfigError, RecordError
from mmit.records import short

# A text is encoded by itself, so threads would cost more than they give, and a pool of threads does not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What stands to the left of a piece: nothing (or an image), a control token, or ordinary text.
After = Literal["start", "control", "text"]

_BYTE_NAME = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WHITESPACE = " \t\r\n\u2581"


class PieceTokenizer:
    """Tokenises template pieces and content pieces so that their ids can be joined.

    The joined ids equal those of tokenising the whole text at once, unless that would put a token across the
    seam between two pieces (some tokenizers have one for "?" and a newline). Content is encoded by a private
    copy of the tokenizer whose control tokens are renamed to names nobody can type, so no spelling, whole or
    in parts, reaches them; ids are unchanged. A second copy, without the space that SentencePiece puts in
    front of a text, encodes whatever does not stand at the start.

    Attributes:
        control_ids: ids that content never yields: all special tokens, and all added tokens except those that
            are only whitespace, which pre-training wrote as ordinary text.
        bos: the text of the BOS token if the tokenizer puts one in front of every text by itself, else "".
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = _backend(tokenizer)
        added = backend.get_added_tokens_decoder()
        control = {i for i, token in added.items() if token.special or token.content.strip(_WHITESPACE)}
        spec = json.loads(backend.to_str())
        model = spec["model"]
        self._unknown_id = _unknown_id(model)
        special = {i for i in tokenizer.all_special_ids if i is not None}
        unknown = set() if self._unknown_id is None else {self._unknown_id}
        self.control_ids: frozenset[int] = frozenset(control | special | unknown)
        self._added_ids = frozenset(added)
        self._names = frozenset(token.content for token in added.values())
        self._byte_names = bool(model.get("byte_fallback"))
        self._alphabet = _alphabet(spec)
        self._spellable: set[str] = set()
        self._prefix_each_section = _prefixes_each_section(spec)

        # Names with a nonce of 128 bits: whoever writes a record cannot know them, and so cannot write a control token.
        _rename(spec, self.control_ids)
        # A tokenizer.json may cut, pad or add tokens by itself; here every token must come from a piece.
        spec.update(truncation=None, padding=None, post_processor=None)
        build = type(backend)
        self._full = _assemble(backend, backend.model, [added[i] for i in sorted(added)])
        self._start = build.from_str(json.dumps(spec))
        renamed = self._start.get_added_tokens_decoder()
        # Ids are what the model knows. Were one to move, every token after it would be another word.
        if renamed.keys() != added.keys():
            raise ConfigError(
                "the tokenizer's added tokens change their ids when it is reloaded",
                remedy="Save it with save_pretrained and load it again, or fix its tokenizer.json.",
            )
        self._middle = _assemble(
            build.from_str(json.dumps(_without_prefix(spec))),
            self._start.model,
            [renamed[i] for i in sorted(renamed)],
        )
        # Asked by trying: whether a BOS is put in front stands in a post-processor, a flag or a class, depending on the
        # tokenizer.
        first = tokenizer("a")["input_ids"][0]
        self.bos = tokenizer.bos_token if tokenizer.bos_token and first == tokenizer.bos_token_id else ""
        self._templates: dict[tuple[str, After], tuple[int, ...]] = {}
        self._runs: dict[tuple[tuple[str, ...], After], tuple[tuple[int, ...], ...]] = {}

    def template(self, text: str, after: After) -> tuple[int, ...]:
        """Encode template text, control tokens included. Cached: a chat format has few distinct pieces."""
        key = (text, after)
        if key not in self._templates:
            if len(self._templates) > 20_000:  # tools and calls are text of the template's, and all different
                self._templates.clear()
            self._templates[key] = tuple(self._encode_template(text, after))
        return self._templates[key]

    def template_run(self, texts: tuple[str, ...], after: After) -> tuple[tuple[int, ...], ...]:
        """Encode neighbouring template texts as one; a token belongs to the text it begins in. Cached."""
        key = (texts, after)
        if key not in self._runs:
            if len(self._runs) > 20_000:
                self._runs.clear()
            ids = self.template("".join(texts), after)
            cuts = [0]
            for number in range(1, len(texts)):
                # Encoded as one text, as the tokenizer would see it; a token over a seam goes to the piece it begins
                # in.
                cuts.append(max(cuts[-1], min(len(ids), len(self.template("".join(texts[:number]), after)))))
            self._runs[key] = tuple(ids[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(ids)], strict=True))
        return self._runs[key]

    def _encode_template(self, text: str, after: After) -> list[int]:
        if self._own_start(after):
            ids: list[int] = self._full.encode(text, add_special_tokens=False).ids
        else:
            # Only the part before the first added token continues the text on the left.
            head = text[: next((start for start, _ in self._spans(text, self._added_ids)), len(text))]
            ids = self._middle.encode(head, add_special_tokens=False).ids
            ids = ids + self._full.encode(text[len(head) :], add_special_tokens=False).ids
        if self._unknown_id in ids and self._full.id_to_token(self._unknown_id) not in text:
            raise ConfigError(
                f"the tokenizer cannot write the chat template's text {text!r}",
                remedy="Choose a chat format that suits this tokenizer.",
            )
        return ids

    def content(self, text: str, after: After) -> list[int]:
        """Encode content: none of the ids is a control token, and they decode to `text`.

        Raises RecordError for a character that the vocabulary cannot spell, rather than losing it.
        """
        if self._byte_names and "<0x" in text:
            return self.content_with_offsets(text, after)[0]
        encoder = self._start if self._own_start(after) else self._middle
        # A batch of one: `encode` finds offsets too, which takes a third of its time.
        ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        self._check(text, ids)
        return ids

    def content_with_offsets(self, text: str, after: After) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode content as `content` does; returns also the (start, end) in `text` of each token."""
        encoder = self._start if self._own_start(after) else self._middle
        if self._byte_names and "<0x" in text:
            # Byte tokens cannot be renamed, since the model looks them up by name: a literal "<0x0A>" is cut.
            ids, offsets, at = [], [], 0
            for part in _cut_byte_names(text):
                found = encoder.encode(part, add_special_tokens=False)
                ids += found.ids
                offsets += [(start + at, end + at) for start, end in found.offsets]
                at += len(part)
                encoder = self._middle
        else:
            found = encoder.encode(text, add_special_tokens=False)
            ids, offsets = found.ids, found.offsets
        self._check(text, ids)
        return ids, offsets

    def _check(self, text: str, ids: list[int]) -> None:
        """Raise RecordError if ids of content leave out, or stand for something else than, a part of its text."""
        if not ids and text.strip():
            _refuse(text)
        # The renaming makes this impossible but for the unknown token, which would lose a character without a word.
        if not self.control_ids.isdisjoint(ids):
            _refuse(next((char for char in text if self._unknown_id in self._alone(char)), text))
        if self._alphabet is not None and not self._spellable.issuperset(text):
            for char in set(text) - self._spellable:
                if not self._alphabet.issuperset(self._symbols(char)):
                    _refuse(char)
                self._spellable.add(char)

    def named_in(self, source: str) -> frozenset[str]:
        """Control tokens that are not special (marks of thoughts, calls, boxes) and stand in a template's source."""
        decoder = self._full.get_added_tokens_decoder()
        names = (decoder[i] for i in self.control_ids if i in decoder)
        return frozenset(t.content for t in names if not t.special and t.content.strip() and t.content in source)

    def is_token(self, text: str) -> bool:
        """Tell whether a text is the name of one added token."""
        return text in self._names

    def special_part(self, text: str) -> tuple[int, ...]:
        """Return the ids of template text from its first special token to its last; () without one."""
        ids = self.template(text, "text")
        added = self._full.get_added_tokens_decoder()
        at = [n for n, i in enumerate(ids) if i in added and added[i].special]
        return ids[at[0] : at[-1] + 1] if at else ()

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """Return the (start, end) of every control token in template text."""
        return self._spans(text, self.control_ids)

    def _spans(self, text: str, which: frozenset[int]) -> list[tuple[int, int]]:
        encoding = self._full.encode(text, add_special_tokens=False)
        wanted = self._added_ids & which
        return [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in wanted]

    def _own_start(self, after: After) -> bool:
        return after == "start" or (after == "control" and self._prefix_each_section)

    def _alone(self, text: str) -> list[int]:
        ids: list[int] = self._middle.encode(text, add_special_tokens=False).ids
        return ids

    def _symbols(self, text: str) -> set[str]:
        """Return the characters `text` is spelled with before merging, stand-ins for bytes if byte-level."""
        if self._middle.normalizer is not None:
            text = self._middle.normalizer.normalize_str(text)
        if self._middle.pre_tokenizer is None:
            return set(text)
        return set().union(*(word for word, _ in self._middle.pre_tokenizer.pre_tokenize_str(text)))


def cut_tokens(text: str, allowed: frozenset[str]) -> list[tuple[str, bool]]:
    """Cut a text at the names of tokens: (part, whether it is one of `allowed`) pairs."""
    if not allowed or not any(token in text for token in allowed):
        return [(text, False)]
    # Longest first, so that a token that begins with another is found whole.
    pattern = "|".join(re.escape(token) for token in sorted(allowed, key=lambda token: (-len(token), token)))
    parts = re.split(f"({pattern})", text)
    return [(part, number % 2 == 1) for number, part in enumerate(parts) if part]


def _refuse(text: str) -> NoReturn:
    raise RecordError(
        f"the tokenizer has no token for '{short(text)}'",
        remedy="Remove or replace it, or use a model whose vocabulary has every byte.",
    )


_cache: weakref.WeakKeyDictionary[Any, tuple[int, PieceTokenizer]] = weakref.WeakKeyDictionary()


def piece_tokenizer(tokenizer: Any) -> PieceTokenizer:
    """Return the PieceTokenizer of a tokenizer, built once and again after tokens were added to it."""
    size = _backend(tokenizer).get_vocab_size()
    found = _cache.get(tokenizer)
    if found is None or found[0] != size:
        found = _cache[tokenizer] = (size, PieceTokenizer(tokenizer))
    return found[1]


def checked_tokens(tokens: Sequence[str], tokenizer: Any) -> frozenset[str]:
    """Check that each is a token that was added to the tokenizer; raises ConfigError."""
    for token in tokens:
        if not piece_tokenizer(tokenizer).is_token(token):
            problem = f"content_tokens names '{token}', which is no added token of the tokenizer"
            raise ConfigError(problem, where="model.chat.content_tokens", remedy="Check its spelling.")
    return frozenset(tokens)


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no fast (Rust) form",
            remedy="Load it with AutoTokenizer.from_pretrained, or convert it to a tokenizer.json.",
        )
    return backend


def _assemble(parts: Any, model: Any, added: list[Any]) -> Any:
    """Build a tokenizer from the normalizer and pre-tokenizer of `parts`, a shared model and added tokens."""
    out = type(parts)(model)
    if parts.normalizer is not None:
        out.normalizer = parts.normalizer
    if parts.pre_tokenizer is not None:
        out.pre_tokenizer = parts.pre_tokenizer
    out.add_tokens(added)
    return out


def _rename(spec: dict[str, Any], ids: frozenset[int]) -> None:
    """Give the tokens `ids` of a tokenizer.json, wherever they are named, names that no text contains."""
    nonce = secrets.token_hex(16)
    new = {i: f"\ue000{nonce}-{i}\ue000" for i in ids}
    for token in spec["added_tokens"]:
        token["content"] = new.get(token["id"], token["content"])
    model = spec["model"]
    if model["type"] == "Unigram":  # a list of [name, score]; the unknown token is known by id
        for i in ids & set(range(len(model["vocab"]))):
            model["vocab"][i][0] = new[i]
        return
    unknown = _unknown_id(model)
    if unknown is not None:
        model["unk_token"] = new[unknown]
    old = {name for name, i in model["vocab"].items() if i in ids}
    model["vocab"] = {new.get(i, name): i for name, i in model["vocab"].items()}
    if model["type"] == "BPE" and old:
        skip = len(model.get("continuing_subword_prefix") or "")
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if old.isdisjoint((a, b, a + b[skip:]))]


def _unknown_id(model: dict[str, Any]) -> int | None:
    """Return the id a model writes for text it cannot spell, None if it has none."""
    unigram = model["type"] == "Unigram"
    number: int | None = model["unk_id"] if unigram else model["vocab"].get(model.get("unk_token"))
    return number


def _alphabet(spec: dict[str, Any]) -> frozenset[str] | None:
    """Return the characters a BPE model can spell if it drops others without a trace, else None."""
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or _unknown_id(model) is not None:
        return None
    alphabet = frozenset(name for name in model["vocab"] if len(name) == 1)
    byte_level = any(part["type"] == "ByteLevel" for part in _parts(spec))
    # 256 printable stand-ins: then every byte has a token and there is nothing to check.
    return None if byte_level and len(alphabet) == 256 else alphabet


def _parts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """List the normalizers and pre-tokenizers of a tokenizer.json, sequences taken apart."""

    def flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
        if part is None:
            return []
        members = part.get("normalizers") or part.get("pretokenizers")
        return [part] if members is None else [leaf for member in members for leaf in flat(member)]

    return flat(spec["normalizer"]) + flat(spec["pre_tokenizer"])


def _prefixes_each_section(spec: dict[str, Any]) -> bool:
    """Tell whether a space is put before the text after every control token, not only at the very start."""
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme") == "always" or part.get("add_prefix_space")
        for part in _parts(spec)
    )


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """Return `spec` with a placeholder model and with nothing that adds or strips text at the ends."""

    def edit(part: dict[str, Any] | None) -> dict[str, Any] | None:
        if part is None or part["type"] in ("Prepend", "Strip"):
            return None
        for members in ("normalizers", "pretokenizers"):
            if members in part:
                return {**part, members: [kept for member in part[members] if (kept := edit(member))]}
        if part["type"] == "Metaspace":
            return {**part, "prepend_scheme": "never"}
        return {**part, "add_prefix_space": False} if "add_prefix_space" in part else part

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    edited = {key: edit(spec[key]) for key in ("normalizer", "pre_tokenizer")}
    return {**spec, **edited, "model": model, "added_tokens": []}


def _cut_byte_names(text: str) -> list[str]:
    """Cut "a<0x0A>b" into "a<" and "0x0A>b", so that no part holds the name of a byte token."""
    cuts = [0, *(match.start() + 1 for match in _BYTE_NAME.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
