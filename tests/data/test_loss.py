"""Loss weights: what belongs to a span, a turn, a role and a record, and what the section data.loss changes."""

from __future__ import annotations

import pytest

from mmit.data.chat_builtin import Piece
from mmit.data.loss import ANSWERS, Loss
from mmit.errors import ConfigError
from mmit.records import Record, Text, Turn

ASKED, ANSWER = Turn("user", (Text("q"),)), Turn("assistant", (Text("a"),))


def content(turn: int, part: str = "text", spans: tuple[tuple[int, float | None], ...] = ()) -> Piece:
    return Piece("content", "words", turn, part, spans)  # type: ignore[arg-type]


def test_by_default_answers_alone_carry_loss() -> None:
    weigh = ANSWERS.weigher(Record((Turn("system", (Text("s"),)), ASKED, ANSWER)))
    assert [weigh(content(turn)) for turn in range(3)] == [0.0, 0.0, 1.0]
    assert weigh(Piece("template", "<|im_end|>", 2, "end")) == 1.0  # an answer's end is a part of it
    assert weigh(Piece("template", "<|im_start|>user")) == 0.0
    assert weigh(Piece("image", "", 1)) == weigh(Piece("image")) == 0.0


def test_a_turns_weight_goes_before_its_roles_and_the_records_multiplies_both() -> None:
    turns = (Turn("user", (Text("q"),), weight=0.5), ANSWER, ASKED, Turn("assistant", (Text("a"),), weight=0.0))
    weigh = Loss(roles={"user": 0.25, "assistant": 2.0}).weigher(Record(turns, weight=3.0))
    assert [weigh(content(turn)) for turn in range(4)] == [1.5, 6.0, 0.75, 0.0]


def test_the_prompts_weight_is_for_all_text_that_nothing_else_weighs() -> None:
    weigh = Loss(prompt_weight=0.1, roles={"system": 0.4}).weigher(
        Record((Turn("system", (Text("s"),)), ASKED, ANSWER))
    )
    assert [weigh(content(turn)) for turn in range(3)] == [0.4, 0.1, 1.0]
    assert weigh(Piece("template", "between")) == 0.1
    assert weigh(Piece("image", "", 1)) == 0.0  # which is never predicted


def test_thoughts_and_calls_are_factors_on_the_answers_weight() -> None:
    turns = (ASKED, Turn("assistant", (Text("a"),), weight=2.0))
    weigh = Loss(think=0.5, tool_calls=0.25).weigher(Record(turns))
    assert [weigh(content(1, part)) for part in ("text", "thought", "calls")] == [2.0, 1.0, 0.5]


def test_spans_have_weights_of_their_own_and_the_rest_is_the_turns() -> None:
    weigh = ANSWERS.weigher(Record((ASKED, ANSWER), weight=2.0))
    assert weigh(content(1, spans=((2, 0.5), (3, None), (5, 0.0)))) == ((2, 1.0), (3, 2.0), (5, 0.0))


def test_only_what_answers_the_last_user_turn_is_learned_if_asked_for() -> None:
    turns = (ASKED, ANSWER, ASKED, ANSWER, Turn("tool", (Text("r"),)), ANSWER)
    weigh = Loss(last_turn=True).weigher(Record(turns))
    assert [weigh(content(turn)) for turn in (1, 3, 5)] == [0.0, 1.0, 1.0]


def test_an_unknown_role_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"(?s)data\.loss\.roles.*unknown role 'asistant'.*assistant"):
        Loss(roles={"asistant": 1.0})
