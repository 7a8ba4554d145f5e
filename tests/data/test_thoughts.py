"""Thoughts are cut off before an answer is scored."""

from __future__ import annotations

import pytest

from mmit.data.thoughts import split_thought


@pytest.mark.parametrize(
    ("answer", "thought", "said"),
    [
        ("yes", "", "yes"),
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("hm\n</think>\n\nyes", "hm", "yes"),  # the prompt ended in <think>
        ("<think>\n\n</think>\n\nyes", "", "yes"),
        ("<think>\nno end of it", "no end of it", ""),
        ("a <think> b", "", "a <think> b"),
    ],
)
def test_split(answer: str, thought: str, said: str) -> None:
    assert split_thought(answer) == (thought, said)
