"""Records as what is compared: two answers to one prompt, or one with a verdict; and partners for KTO."""

from __future__ import annotations

import numpy as np
import pytest

from mmit.data.packing import Sample
from mmit.data.preference import compared, conversations, kind_of, mates, mismatch
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text, Turn

ASKED, GOOD, BAD = (Turn(role, (Text(text),)) for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
PAIR, LABELLED, PLAIN = Record((ASKED, GOOD), rejected=BAD), Record((ASKED, GOOD), label=True), Record((ASKED, GOOD))


def test_a_pair_becomes_two_conversations_of_which_the_answer_alone_carries_loss() -> None:
    earlier = Turn("assistant", (Text("before", weight=1.0),))
    record = Record((ASKED, earlier, ASKED, GOOD), rejected=BAD)
    chosen, rejected = conversations(record, "pairs")
    assert chosen.turns[-1] == GOOD and rejected.turns[-1] == BAD
    assert chosen.turns[:-1] == rejected.turns[:-1]
    assert all(turn.weight == 0 for turn in chosen.turns[:-1]) and chosen.turns[1].parts == (Text("before"),)
    assert chosen.rejected is rejected.rejected is None


def test_each_method_learns_from_its_own_kind_and_refuses_the_others() -> None:
    records = {"": PLAIN, "pairs": PAIR, "labels": LABELLED}
    for compares in records:
        for kind, record in records.items():
            assert kind_of(record) == kind
            if kind == compares or (compares == "" and kind == "labels"):  # a good answer may be learned plainly
                assert conversations(record, compares)  # type: ignore[arg-type]
            else:
                with pytest.raises(RecordError, match="Set train.objective.kind="):
                    conversations(record, compares)  # type: ignore[arg-type]


def test_plain_tuning_refuses_what_was_found_bad() -> None:
    with pytest.raises(RecordError, match="labelled bad"):
        conversations(Record((ASKED, GOOD), label=False), "")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Turn("assistant", (Image("a.png"), Text("b"))), "has an image"),
        (Turn("assistant", (Text("b"),), weight=0.5), "loss weights of its own"),
        (Turn("assistant", (Text("b", weight=2.0),)), "loss weights of its own"),
    ],
)
def test_a_compared_answer_is_text_of_weight_one(answer: Turn, problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        conversations(Record((ASKED, GOOD), rejected=answer), "pairs")


@pytest.mark.parametrize("count", [2, 3, 50])
def test_partners_are_one_cycle_through_all(count: int) -> None:
    partner, at, seen = mates(count), 0, []
    for _ in range(count):
        seen.append(at)
        at = int(partner[at])
    assert at == 0 and sorted(seen) == list(range(count))
    assert np.array_equal(partner, mates(count))  # the same in every run, so that a reference may be kept
    with pytest.raises(ConfigError, match="only one"):
        mates(1)


def test_a_mismatch_is_one_prompt_with_the_answer_of_another() -> None:
    mine = Sample((1, 2, -200, 3, 4), (0, 0, 0, 1.0, 1.0), ("picture",), 0, (10,))
    theirs = Sample((7, 8, 9), (0, 0.5, 0.5), (), 1)
    found = mismatch(mine, theirs, max_length=100)
    assert found.ids == (1, 2, -200, 8, 9) and found.weights == (0.0, 0.0, 0.0, 1.0, 1.0)
    assert (found.images, found.widths, found.record) == (mine.images, mine.widths, mine.record)
    assert mismatch(mine, theirs, max_length=13).ids == (1, 2, -200, 8)  # the image takes 10 of them


def test_targets_are_counted_answer_by_answer() -> None:
    good, bad = Sample((1, 2, 3), (0, 1.0, 1.0), record=4), Sample((1, 5), (0, 2.0), record=4)
    found = compared([[good, bad]], [9], [True])
    assert (found.units, found.records, found.weights, found.good, found.lengths) == ([9], [4], [1.0], [True], [2, 1])
