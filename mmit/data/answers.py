"""From new token ids back to the text of an answer, finished or still growing.

Owns what belongs to an answer: no control token, nothing from a stop text on, no whitespace around it (unless it
continues a text). A thought between other marks, control tokens or text, is written between <think> and </think>.
Takes a tokenizer object and ids; gives text. Chooses no token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

from mmit.errors import ConfigError

_BYTE_NAME = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CONTEXT = 8  # ids before the new ones that are decoded with them: the first id of a text loses its space
TAIL = 32  # ids of a growing text that are decoded anew for each new one, before their text is kept


class AnswerText:
    """Reads the ids of answers; `stop` are texts that end one and are left out of it.

    `thought` are the ids that open and close a thought (`ChatFormat.thought_marks`), `marks` pairs of texts that do so
    where no special token does (`ChatFormat.own_thought`). `strip=False` keeps the whitespace around a finished answer:
    it matters where a text is continued.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] | None = (),
        *,
        strip: bool = True,
        thought: tuple[Sequence[int], Sequence[int]] | None = None,
        marks: Sequence[tuple[str, str]] = (),
    ) -> None:
        given = [stop] if isinstance(stop, str) else () if stop is None else stop  # a text is a sequence of texts too
        if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
            raise ConfigError(f"stop is {stop!r}", remedy="Give a text or a list of texts that end an answer.")
        if "" in given:
            raise ConfigError(
                f"stop is {stop!r}, and every answer holds the empty text",
                remedy="Give texts of a character or more, or leave stop out.",
            )
        self._tokenizer, self.stop = tokenizer, tuple(given)
        self._strip = strip
        self._thought = None if thought is None else (list(thought[0]), list(thought[1]))
        self._marks = tuple(marks) if thought is None else ()
        self._special = frozenset(tokenizer.all_special_ids)
        self._growing: tuple[_Growing, _Growing] | None = None  # of a thought, of what is none

    def growing(self) -> AnswerText:
        """A reader for one answer that grows: equal to this one, but it decodes the last ids only."""
        made = copy.copy(self)
        made._growing = (_Growing(self._decoded, self._may_change), _Growing(self._decoded, self._may_change))
        return made

    def whole(self, ids: Sequence[int]) -> str:
        """Return the text of a finished answer."""
        text = self._cut(ids)[0]
        return text.strip() if self._strip else text

    def ended(self, ids: Sequence[int]) -> bool:
        """Tell whether a stop text has been reached."""
        return self._cut(ids)[1]

    def settled(self, ids: Sequence[int]) -> str:
        """Return the part of a growing answer that later tokens cannot change.

        Held back are a character whose bytes are not all there yet, whitespace that may turn out to be the last,
        and what may be the beginning of a stop text.
        """
        ids = self._marked(list(ids))
        # A run of byte tokens that is no valid UTF-8 in the end is shown as replacement characters from its start.
        while ids and self._may_change(ids[-1]):
            ids.pop()
        text, ended = self._cut(ids)
        if not ended:
            text = text.rstrip("\ufffd")
            if any(opening.startswith(text.strip()) for opening, _ in self._marks):
                return ""
            # What may be the beginning of a stop text is held back: it could not be taken back once it was sent.
            awaited = (*self.stop, *(closing for _, closing in self._marks))
            begun = (n for s in awaited for n in range(1, len(s)) if text.endswith(s[:n]))
            text = text[: len(text) - max(begun, default=0)]
        return text.strip() if self._strip else text

    def _may_change(self, token: int) -> bool:
        """Whether the text of a token at the end depends on what follows."""
        if token in self._special:
            return True
        name = self._tokenizer.convert_ids_to_tokens(token)
        return name is not None and _BYTE_NAME.fullmatch(name) is not None

    def _cut(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Text up to the first stop text, and whether there is one."""
        text = self._shown(list(ids))
        # The first of them in the text ends the answer, not the first in the list.
        ends = [at for s in self.stop if (at := text.find(s)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def _shown(self, ids: list[int]) -> str:
        if self._thought is None:
            return self._between_think(self._text(ids))
        opening, closing = self._thought
        inside = bool(opening) and ids[: len(opening)] == opening
        begin, end = len(opening) if inside else 0, _last(ids, closing)
        if end >= 0:
            thought = self._text(ids[begin:end], of_thought=True)
            # Whatever marks a model uses, what is shown has these: `split_thought` and the chat page read one form.
            return f"<think>\n{thought}\n</think>\n\n{self._text(ids[end + len(closing) :])}"
        return f"<think>\n{self._text(ids[begin:], of_thought=True)}" if inside else self._text(ids)

    def _between_think(self, text: str) -> str:
        for opening, closing in self._marks:
            if text.lstrip().startswith(opening):
                thought, found, answer = text.lstrip()[len(opening) :].partition(closing)
                if not found:
                    return f"<think>\n{thought.lstrip()}"
                return f"<think>\n{thought.strip()}\n</think>\n\n{answer.lstrip()}"
        return text

    def _marked(self, ids: list[int]) -> list[int]:
        """Hold back what may be the beginning of a mark of a thought: some of its tokens are ordinary text."""
        if self._thought is None:
            return ids
        opening, closing = self._thought
        if len(ids) < len(opening) and ids == opening[: len(ids)]:
            return []
        # Contract: what was shown is never taken back, so the longest beginning of a mark at the end has to wait for
        # its rest.
        begun = max((n for n in range(1, len(closing)) if ids[-n:] == closing[:n]), default=0)
        return ids[: len(ids) - begun]

    def _text(self, ids: list[int], *, of_thought: bool = False) -> str:
        return self._decoded(ids) if self._growing is None else self._growing[not of_thought].text(ids)

    def _decoded(self, ids: list[int]) -> str:
        # No cleaning up: it would join "it 's" and change code.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Growing:
    """The text of ids that grow, equal to decoding all of them, at the cost of decoding the last ones.

    The text of a beginning is kept once nothing that follows can change it: it ends between two characters, behind an
    id whose text stands for itself. What follows it is what decoding adds to some ids before it. Checked against the
    whole text whenever the ids have doubled; a tokenizer that decodes otherwise is decoded whole from then on.
    """

    def __init__(self, decode: Callable[[list[int]], str], may_change: Callable[[int], bool]) -> None:
        self._decode, self._may_change = decode, may_change
        self._ids: list[int] = []  # the beginning that is kept, and its text
        self._text = ""
        self._before: list[int] = []  # its last ids, and their text by themselves
        self._head = ""
        self._check_at = 2 * TAIL

    def text(self, ids: list[int]) -> str:
        """The text of all ids."""
        known = len(self._ids)
        if self._check_at == 0 or ids[:known] != self._ids:
            return self._decode(ids)
        text = self._text + self._added(ids[known:])
        if len(ids) >= self._check_at:
            self._check_at = 2 * len(ids)
            if text != (whole := self._decode(ids)):
                self._check_at = 0
                return whole
        if len(ids) - known > TAIL:
            self._keep(ids)
        return text

    def _added(self, new: list[int]) -> str:
        return self._decode([*self._before, *new])[len(self._head) :]

    def _keep(self, ids: list[int]) -> None:
        """Keep the text up to the last place where that is safe, if there is one."""
        known = len(self._ids)
        for place in range(len(ids) - CONTEXT, known + CONTEXT, -1):
            if self._may_change(ids[place - 1]):
                continue
            before = ids[place - CONTEXT : place]
            head = self._decode(before)
            if head.strip() and not head.endswith("\ufffd"):
                text = self._text + self._added(ids[known:place])
                self._ids, self._text, self._before, self._head = ids[:place], text, before, head
                return


def token_text(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """The text of one token, with replacement characters where it is a part of a character, and its bytes."""
    name: str = tokenizer.convert_ids_to_tokens(token) or ""
    if _BYTE_NAME.fullmatch(name):
        data = bytes([int(name[3:5], 16)])
        return data.decode("utf-8", "replace"), data
    if "\u2581" in name:  # SentencePiece's space, which decoding drops at the beginning of a text
        text = name.replace("\u2581", " ")
        return text, text.encode()
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text and all(char in _BYTES for char in name):
        return text, bytes(_BYTES[char] for char in name)
    return text, text.encode()


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level BPE (GPT-2) writes bytes: itself where one can be seen, else from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTES = _byte_characters()


def _last(ids: list[int], wanted: list[int]) -> int:
    """Where `wanted` begins for the last time, -1 where it is not."""
    if wanted and wanted[-1] not in ids:
        return -1
    places = range(len(ids) - len(wanted), -1, -1)
    return next((at for at in places if ids[at : at + len(wanted)] == wanted), -1)
