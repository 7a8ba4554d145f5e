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
from mmit.records import ROLES, Record

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
        turns = record.turns
        last_user = max((n for n, turn in enumerate(turns) if turn.role == "user"), default=0)

        def of_turn(number: int) -> float:
            turn = turns[number]
            if turn.weight is not None:
                return float(turn.weight)
            return float(self.roles.get(turn.role, 1.0 if turn.role == "assistant" else self.prompt_weight))

        def weigh(piece: Piece) -> float | Spans:
            if piece.kind == "image":
                return 0.0
            if piece.turn < 0:
                return self.prompt_weight * record.weight
            if self.last_turn and turns[piece.turn].role == "assistant" and piece.turn < last_user:
                return 0.0
            base = of_turn(piece.turn)
            base *= {"thought": self.think, "calls": self.tool_calls}.get(piece.part, 1.0)
            if not piece.spans:
                return base * record.weight
            return tuple((end, (base if w is None else float(w)) * record.weight) for end, w in piece.spans)

        return weigh


ANSWERS = Loss()
