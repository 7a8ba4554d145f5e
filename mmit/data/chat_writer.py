"""The ids, loss weights and origins of a conversation, written piece by piece.

Owns what stands to the left of the next piece (nothing, a control token, text) and the space that a template lends to
the text after it. In: pieces with their weights. Out: three lists of one length. Which weight a piece has is not
decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mmit.data.content import After, PieceTokenizer, cut_tokens
from mmit.errors import RecordError

if TYPE_CHECKING:
    from mmit.data.chat_builtin import Marks, Origin, Piece, Spans

IMAGE_SLOT = -200  # LLaVA's IMAGE_TOKEN_INDEX; no tokenizer has a negative id


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a record, the loss weight of each, and where each comes from; all of one length.

    An image is a single IMAGE_SLOT of weight 0; so is the first token, which nothing predicts.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    origin: tuple[Origin, ...]

    @property
    def supervised(self) -> tuple[bool, ...]:
        """Which tokens carry loss."""
        return tuple(weight > 0 for weight in self.weights)


class Writer:
    """Collects ids, weights and origin, and remembers what stands to the left of the next piece."""

    def __init__(self, tokens: PieceTokenizer, *, as_processor: bool, allowed: frozenset[str]) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.origin: list[Origin] = []
        self._tokens, self._allowed = tokens, allowed
        # As LLaVA does: the text after an image is tokenised like a text of its own.
        self._after_image: After = "control" if as_processor else "start"
        self._after: After = "start"
        self._space = ""

    def bos(self) -> None:
        """Add the token that the tokenizer puts before every text by itself; the text still begins after it."""
        self._add(self._tokens.template(self._tokens.bos, "start"), 0.0, "template")

    def images(self, count: int) -> None:
        """Add the slots of images that stand side by side."""
        self._add([IMAGE_SLOT] * count, 0.0, "image")
        self._after = self._after_image

    def content(self, piece: Piece, weight: float | Spans, *, named: bool) -> None:
        """Add a text; `named`: it may hold the control tokens that content may hold.

        What the piece marks is a control token in any turn. Raises RecordError if the tokenizer does not have it.
        """
        # A space that the template ended with goes before the text: tokenizers keep a space with the word on its right.
        text = self._space + piece.text
        allowed = self._allowed if named else frozenset()
        at = 0
        cut = self._cut(text, allowed, piece.marks) if piece.marks else cut_tokens(text, allowed)
        for part, is_token in cut:
            offsets = None
            # As template text, in which control tokens are meant: the record says that this one is, by a mark or by its
            # template's own list.
            if is_token:
                ids = list(self._tokens.template(part, self._after))
            elif isinstance(weight, tuple):
                ids, offsets = self._tokens.content_with_offsets(part, self._after)
            else:
                ids = self._tokens.content(part, self._after)
            if isinstance(weight, tuple):
                # Spans count from the text's own beginning, tokens from the space that was lent to it.
                shift = at - len(self._space)
                for token, (start, end) in zip(ids, offsets or [(0, len(part))] * len(ids), strict=True):
                    self._add([token], _least(weight, start + shift, end + shift), "content")
            else:
                self._add(ids, weight, "content")
            at += len(part)
            # What stands on the left decides whether the tokenizer puts its own space in front.
            self._after = "control" if is_token else "text"
        self._after, self._space = self._after if text else "text", ""

    def _cut(self, text: str, allowed: frozenset[str], marks: Marks) -> Iterator[tuple[str, bool]]:
        """Cut a text at its marks and at `allowed`: (part, whether it is a control token) pairs."""
        # Marks count from the text's own beginning, and the text may have been lent a space in front.
        at, shift = 0, len(self._space)
        for start, end in ((start + shift, end + shift) for start, end in marks):
            token = text[start:end]
            if not self._tokens.is_token(token):
                remedy = (
                    "Import the data with boxes=norm1000 or norm1, which need no tokens, or use a model that has it."
                )
                raise RecordError(f"boxes are marked by {token}, and the tokenizer has no such token", remedy=remedy)
            if at < start:
                yield from cut_tokens(text[at:start], allowed)
            yield token, True
            at = end
        if at < len(text):
            yield from cut_tokens(text[at:], allowed)

    def template(self, run: Sequence[tuple[Piece, float]], *, lend_space: bool) -> None:
        """Add neighbouring template pieces, encoded as one text; a token takes the weight of the piece it begins in."""
        texts = [piece.text for piece, _ in run]
        # Only before content, or before an answer that is to be written: elsewhere the space is the template's own.
        if lend_space and texts[-1].endswith(" "):
            texts[-1], self._space = texts[-1][:-1], " "
        if not any(texts):
            return
        ids: tuple[int, ...] = ()
        for ids_of_piece, (_, weight) in zip(self._tokens.template_run(tuple(texts), self._after), run, strict=True):
            self._add(ids_of_piece, weight, "template")
            ids = ids_of_piece or ids
        self._after = "control" if ids and ids[-1] in self._tokens.control_ids else "text"

    def _add(self, ids: Sequence[int], weight: float, origin: Origin) -> None:
        # Three lists and no list of triples: this runs for every token of every record, in each epoch.
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.origin += [origin] * len(ids)


def _least(spans: Spans, start: int, end: int) -> float:
    """The least weight of the characters of a token: what is masked is never learnt."""
    # A token may lie over two spans. With the greater weight, text that was masked would be learned through it.
    begin, found = 0, []
    for stop, weight in spans:
        if begin < max(end, start + 1) and stop > start:
            found.append(cast("float", weight))
        begin = stop
    return min(found, default=cast("float", spans[-1][1]))
