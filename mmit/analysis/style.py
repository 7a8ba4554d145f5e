"""How answers sound, apart from whether they are right (Gudibande et al., arXiv:2305.15717).

In: texts of answers. Out: numbers that rules can count, a share of answers in a given frame of words, and a learned
score of two styles. `contains` judges whether a longer answer says the right thing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmit.analysis.transform import ANSWER
from mmit.eval.metrics.similarity import common_subsequence

_LIST = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+\S")
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def features(answers: Sequence[str]) -> dict[str, Any]:
    """Return what rules say of answers: median words, share with lists, the commonest opening; nothing of no answers.

    Empty answers have no style: they are counted, and enter nothing else.
    """
    said = [answer for answer in answers if answer.strip()]
    found: dict[str, Any] = {"answers": len(answers), "empty": len(answers) - len(said)}
    if not said:
        return found
    lengths = sorted(len(words(answer)) for answer in said)
    openings = Counter(" ".join(words(answer)[:3]) for answer in said)
    opening, count = min(openings.items(), key=lambda item: (-item[1], item[0]))
    found |= {"median_words": lengths[len(lengths) // 2], "lists": sum(map(bool, map(_LIST.search, said))) / len(said)}
    return found | {"opening": opening, "opening_share": count / len(said)}


def in_frame(answers: Sequence[str], frame: str) -> float | None:
    """Return the share of answers that have at least 80 % of a frame's words in their order.

    None where the frame is {answer} alone, and without answers. An empty answer is in no frame.
    """
    wanted = words(frame.replace(ANSWER, " "))
    if not wanted or not answers:
        return None
    return sum(common_subsequence(words(answer), wanted) >= 0.8 * len(wanted) for answer in answers) / len(answers)


class StyleScore:
    """Which of two styles a text is in: naive Bayes over words, pairs of words and length, with add-one smoothing.

    Args:
        plain, styled: texts of both styles, such as the training answers of two arms.
    """

    def __init__(self, plain: Sequence[str], styled: Sequence[str]) -> None:
        self._counts = [Counter(t for text in texts for t in _tokens(text)) for texts in (plain, styled)]
        self._known = set(self._counts[0]) | set(self._counts[1])
        self._totals = [sum(counts.values()) + len(self._known) for counts in self._counts]

    def styled(self, text: str) -> bool:
        """Whether the second style is the likelier one; an empty text has none."""
        if not text.strip():
            return False
        score = 0.0
        for token in _tokens(text):
            if token in self._known:
                plain, styled = (
                    (counts[token] + 1) / total for counts, total in zip(self._counts, self._totals, strict=True)
                )
                score += math.log(styled / plain)
        return score > 0

    def share(self, answers: Sequence[str]) -> float | None:
        """Return the share of answers in the second style; None without answers."""
        return sum(map(self.styled, answers)) / len(answers) if answers else None


def _tokens(text: str) -> list[str]:
    said = words(text)
    return [*said, *map(" ".join, zip(said, said[1:], strict=False)), f"#{min(20, len(said)) // 4}"]


def contains(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """A metric for answers in sentences: 1 where the reference stands in the answer as whole words.

    Use it as `metric: mmit.analysis.style:contains`. An answer that lists every possibility is right by it too: look at
    the style beside it.
    """
    found = []
    for prediction, reference in zip(predictions, references, strict=True):
        said, wanted = words(prediction), words(str(reference))
        size = len(wanted)
        found.append(float(any(said[at : at + size] == wanted for at in range(len(said) - size + 1)) and bool(wanted)))
    return found
