"""How many answers about images are right, measured against attributes that are known of the images.

In: questions, answers, and facts such as {"colour": "blue", "shape": "circle"}. Out: a verdict for each answer and the
share of right ones. An answer is held against what it says of an attribute in that attribute's own words; one that says
nothing of them is not checked, and is counted so. It reads words: irony, comparisons and other languages escape it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_YES_NO = re.compile(r"^\W*(yes|no)\b(.*)", re.IGNORECASE | re.DOTALL)
# A denial that reaches over at most two words: "not red", "isn't a red". "No, it is red" denies nothing of red.
_DENIAL = re.compile(r"(?:\b(?:not|no|never|neither|nor|without)|n['\u2019]t)\s+(?:\w+\s+){0,2}$", re.IGNORECASE)

Claim = tuple[str, str, bool]  # attribute, value, whether it is affirmed


class FactCheck:
    """Checks answers and keeps count.

    Args:
        facts: those of all images: an attribute's values are the words that claims are read from.
    """

    def __init__(self, facts: Iterable[Mapping[str, str]]) -> None:
        values: dict[str, dict[str, None]] = {}
        for one in facts:
            for name, value in one.items():
                values.setdefault(name, {})[value.lower()] = None
        self._words = {
            name: re.compile(
                rf"\b({'|'.join(map(re.escape, sorted(found, key=len, reverse=True)))})s?\b", re.IGNORECASE
            )
            for name, found in values.items()
        }
        self._verdicts: list[bool] = []
        self._images: list[str] = []
        self._answers = 0
        self._wrong: Counter[str] = Counter()

    def add(self, question: str, answer: str, facts: Mapping[str, str], *, image: str) -> bool | None:
        """Check one answer and count it.

        Args:
            question, answer: their text. facts: {name: value} of the picture.
            image: its name; the interval resamples pictures, whose answers hang together.

        Returns:
            whether the answer is right, None where it says nothing that can be checked.
        """
        self._answers += 1
        verdict, wrong = self._verdict(question, answer, {name: value.lower() for name, value in facts.items()})
        if verdict is not None:
            self._verdicts.append(verdict)
            self._images.append(image)
            self._wrong.update(wrong)
        return verdict

    def claims(self, text: str) -> list[Claim]:
        """Return what a text says of the attributes."""
        found = []
        for name, words in self._words.items():
            for match in words.finditer(text):
                denied = _DENIAL.search(text[: match.start()].rpartition(".")[2]) is not None
                found.append((name, match[1].lower(), not denied))
        return found

    def report(self) -> dict[str, Any]:
        """Return the number of answers, of those checked and right, and the share with its 95 % interval by image."""
        from mmit.eval.metrics.intervals import clustered

        checked, right = len(self._verdicts), sum(self._verdicts)
        stated: dict[str, Any] = {"answers": self._answers, "checked": checked, "right": right}
        if checked:
            stated["share"] = right / checked
            stated["interval"] = list(clustered([float(v) for v in self._verdicts], self._images))
        return stated | {"wrong by attribute": dict(self._wrong)}

    def _verdict(self, question: str, answer: str, facts: Mapping[str, str]) -> tuple[bool | None, list[str]]:
        said = self.claims(answer)
        plain = _YES_NO.match(answer)
        if plain and not said:
            asked = self.claims(question)
            if not asked or not all(affirmed for *_, affirmed in asked):
                return None, []
            # "Is it a red circle?" "No": right if not all of it is true.
            off = [name for name, value, _ in asked if facts.get(name) != value]
            right = (plain[1].lower() == "yes") == (not off)
            return right, [] if right else sorted({name for name, *_ in asked})
        if not said:
            return None, []
        wrong = sorted({name for name, value, affirmed in said if (facts.get(name) == value) != affirmed})
        return not wrong, wrong
