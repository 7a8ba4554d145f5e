"""Which tokens carry loss, and with what weight: the section `data.loss`, applied to the pieces of a conversation.

The weight of a token is that of its text part, else of its turn, else of its role (1 for the assistant, otherwise
`prompt_weight`), times the weights of the record and of its source. Thoughts and tool calls of an answer take the
weight of the answer times `think` and `tool_calls`. A loss is the weighted mean: the sum of weight times loss, divided
by the sum of the weights, both over all ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmit.errors import ConfigError, nearest
from mmit.records import ROLES, Record, Turn

if TYPE_CHECKING:
    from mmit.data.chat_builtin import Piece, Spans


@dataclass(frozen=True, slots=True)
class Loss:
    """Loss weights by what a token belongs to; the defaults supervise answers, and nothing else.

    Attributes:
        roles: weight of what each role says, where no turn or text says otherwise; the assistant's covers the token
            that ends an answer.
        prompt_weight: of every other text token: system, user and tool turns, and the chat format's own text.
        think: factor on thoughts. tool_calls: factor on an answer's calls of tools.
        last_turn: only answers after the last user turn carry loss.
    """

    roles: Mapping[str, float] = field(default_factory=dict, hash=False)
    prompt_weight: float = 0.0
    think: float = 1.0
    tool_calls: float = 1.0
    last_turn: bool = False

    def __post_init__(self) -> None:
        for role in self.roles:
            if role not in ROLES:
                raise ConfigError(f"unknown role '{role}'", where="data.loss.roles", remedy=nearest(role, ROLES))

    def weigher(self, record: Record) -> Callable[[Piece], float | Spans]:
        """Return a function that gives the weight of a piece, or (end, weight) pairs where it changes inside."""
        turns, scale = record.turns, record.weight
        last_user = max((n for n, turn in enumerate(turns) if turn.role == "user"), default=0)
        # Asked for every piece of every record: what does not depend on the piece is found once.
        bases = [self._of_turn(turn) for turn in turns]
        learnt = [not self.last_turn or turn.role != "assistant" or n >= last_user for n, turn in enumerate(turns)]
        factors = {"thought": self.think, "calls": self.tool_calls}
        between = self.prompt_weight * scale

        def weigh(piece: Piece) -> float | Spans:
            turn = piece.turn
            # Text between turns belongs to nobody; an image is never predicted.
            if turn < 0:
                return 0.0 if piece.kind == "image" else between
            if piece.kind == "image" or not learnt[turn]:
                return 0.0
            base = bases[turn]
            # On top of the answer's weight and not in its place: an answer of weight 0 has no thought that is learned.
            if piece.part in factors:
                base *= factors[piece.part]
            if not piece.spans:
                return base * scale
            # A span's own weight goes before the turn's; what the record is worth multiplies both.
            return tuple((end, (base if w is None else float(w)) * scale) for end, w in piece.spans)

        return weigh

    def _of_turn(self, turn: Turn) -> float:
        if turn.weight is not None:
            return float(turn.weight)
        return float(self.roles.get(turn.role, 1.0 if turn.role == "assistant" else self.prompt_weight))


ANSWERS = Loss()
