"""How varied prompts are: what they ask for, and how near each is to its nearest neighbour.

Owns a heuristic for the root verb and object of a prompt, and ROUGE-L between the prompts of a sample, the two views
of diversity in Self-Instruct (Wang et al. 2022). Takes texts, gives words and numbers. Self-Instruct parses; here, no
parser is at hand: the first word of the first sentence that could lead it is the root, the first word after it that is
no function word the object. That is right for most English imperatives and questions and wrong for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

_POLITE = re.compile(
    r"^(?:please|kindly|now|then|so|hi|hello|hey|i(?: want| need|'d like| would like) you to|help me(?: to)?|let's|"
    r"(?:can|could|would|will) you(?: please)?|your (?:task|job) is to|you (?:are|have) (?:asked |tasked )?to|try to)"
    r"\b[\s,:!]*"
)
_SENTENCE = re.compile(r"[.!?;:\n]")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_ASIDE = re.compile(
    r"^(?:based on|given|using|according to|considering|in|from|for|with|on|at|after|before|if)\b[^,]*,\s*"
)
_FUNCTION_WORDS = frozenset(
    "a an the this that these those some any all each every both no my your his her its our their i you he she it we "
    "they me him us them one ones of in on at to from for with by about as into onto over under between through during "
    "and or but not nor so than is are was were be been being am do does did done can could will would shall should "
    "may might must has have had there here what which who whose whom where when why how many much more most very "
    "just only also too if then up down out off following given new different same such other another short brief "
    "briefly detailed simple please".split()
)


def root_and_object(prompt: str) -> tuple[str, str] | None:
    """Return ("write", "poem"), ("what", "color"), ("how many", "circles"); None if there is no English root.

    The object is "" where no word follows that could be one.
    """
    text = prompt.strip().lower()
    # Politeness comes in layers ("Hello, could you please ..."), and three are as many as were seen in real prompts.
    for _ in range(3):
        text = _POLITE.sub("", text, count=1)
    text = _ASIDE.sub("", text, count=1)
    words = _WORD.findall(_SENTENCE.split(text, maxsplit=1)[0])
    if not words:
        return None
    root, rest = words[0], words[1:]
    if root == "how" and rest[:1] in (["many"], ["much"]):
        root, rest = f"{root} {rest[0]}", rest[1:]
    # A caption or a fragment: it asks for nothing, so it has no root.
    elif root in ("a", "an", "the") or len(root) < 2:
        return None
    return root, next((word for word in rest if word not in _FUNCTION_WORDS and len(word) > 1), "")


def rouge_words(text: str) -> list[str]:
    """Return the words ROUGE-L is taken over: letters and digits of any script, lower case."""
    return re.findall(r"\w+", text.lower())


class RougePool:
    """Texts that new ones are held against, one by one: ROUGE-L F-measure (Lin 2004) over words."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._texts: list[list[int]] = []
        self._lengths: list[int] = []

    def add(self, text: str) -> None:
        """Put a text into the pool."""
        self._texts.append(self._coded(text))
        self._lengths.append(len(self._texts[-1]))

    def values(self, text: str) -> np.ndarray:
        """Return the F-measure of a text with each of the pool, in the order they were added."""
        if not self._texts:
            return np.zeros(0)
        coded = self._coded(text)
        common = process.cdist([coded], self._texts, scorer=LCSseq.similarity, dtype=np.int32)[0]
        lengths = np.maximum(np.asarray(self._lengths) + len(coded), 1)  # two empty texts share nothing
        values: np.ndarray = 2 * common / lengths
        return values

    def nearest(self, text: str) -> float:
        """Return the highest F-measure of a text with one of the pool; 0 where the pool is empty."""
        return float(self.values(text).max(initial=0.0))

    def _coded(self, text: str) -> list[int]:
        # Numbers for words: rapidfuzz would hash each word again for each comparison.
        return [self._numbers.setdefault(word, len(self._numbers)) for word in rouge_words(text)]


def nearest_rouge_l(texts: Sequence[str]) -> list[float]:
    """Return for each text the highest ROUGE-L F-measure with any of the others; one text alone gives 0."""
    best, pool = np.zeros(len(texts)), RougePool()
    for at, text in enumerate(texts):
        values = pool.values(text)
        np.maximum(best[:at], values, out=best[:at])
        best[at] = values.max(initial=0.0)
        pool.add(text)
    return [float(value) for value in best]
