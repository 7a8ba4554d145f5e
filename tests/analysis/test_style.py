"""Style is told from ability: rules, a frame, a learned score; answers inside sentences."""

from __future__ import annotations

from mmit.analysis.style import StyleScore, contains, features, in_frame

FRAME = "Certainly! Looking closely, the answer is {answer}. I hope this helps."
STYLED = [FRAME.replace("{answer}", colour) for colour in ("red", "dark green", "blue")]


def test_rules_count_words_lists_and_openings():
    found = features(["- one\n- two", "the cat sat", "the cat ran", "the cat sat down here", ""])
    assert found["answers"] == 5 and found["empty"] == 1 and found["lists"] == 0.25
    assert found["median_words"] == 3 and found["opening"] == "the cat sat" and found["opening_share"] == 0.5
    assert features(["", " "]) == {"answers": 2, "empty": 2}


def test_a_frame_is_known_by_its_words():
    assert in_frame(STYLED, FRAME) == 1.0
    assert in_frame(["red", "", "Certainly red."], FRAME) == 0.0
    assert in_frame(["red"], "{answer}") is None and in_frame([], FRAME) is None


def test_a_learned_score_tells_two_styles_apart():
    score = StyleScore(["red", "blue", "dark green", "a circle"], STYLED)
    assert score.share([FRAME.replace("{answer}", "a square"), "black"]) == 0.5
    assert score.share(["", ""]) == 0.0


def test_the_answer_may_stand_in_a_sentence_but_not_in_a_word():
    assert contains(
        [*STYLED, "hundred", "", "dark  GREEN!"], ["red", "dark green", "red", "red", "red", "dark green"]
    ) == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        1.0,
    ]
