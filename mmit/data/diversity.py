"""How varied prompts are: what they ask for, and how near each is to its nearest neighbour.

Owns a heuristic for the root verb and object of a prompt, and ROUGE-L between the prompts of a sample, the two views
of diversity in Self-Instruct (Wang et al. 2022). Takes texts, gives words and numbers. Self-Instruct parses; here, no
parser is at hand: the first word of the first sentence that could lead it is the root, the first word after it that is
no function word the object. That is right for most English imperatives and questions and wrong for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
    for _ in range(3):
        text = _POLITE.sub("", text, count=1)
    text = _ASIDE.sub("", text, count=1)
    words = _WORD.findall(_SENTENCE.split(text, maxsplit=1)[0])
    if not words:
        return None
    root, rest = words[0], words[1:]
    if root == "how" and rest[:1] in (["many"], ["much"]):
        root, rest = f"{root} {rest[0]}", rest[1:]
    elif root in ("a", "an", "the") or len(root) < 2:
        return None
    return root, next((word for word in rest if word not in _FUNCTION_WORDS and len(word) > 1), "")


def rouge_words(text: str) -> list[str]:
    """Return the words ROUGE-L is taken over: letters and digits of any script, lower case."""
    return re.findall(r"\w+", text.lower())


def nearest_rouge_l(texts: Sequence[str]) -> list[float]:
    """Return for each text the highest ROUGE-L F-measure (Lin 2004) with any of the others; one text alone gives 0.

    The longest common subsequence is bit-parallel (Hyyro 2004); pairs whose lengths forbid a better value are left
    out, which changes no result.
    """
    words = [rouge_words(text) for text in texts]
    best = [0.0] * len(words)
    order = sorted(range(len(words)), key=lambda row: len(words[row]))
    for at, one in enumerate(order):
        first = words[one]
        where: dict[str, int] = {}
        for place, word in enumerate(first):
            where[word] = where.get(word, 0) | 1 << place
        full = (1 << len(first)) - 1
        for other in order[at + 1 :]:
            second = words[other]
            total = len(first) + len(second)
            # The shorter text's length bounds what they can share; skip if neither could gain.
            if not first or 2 * len(first) <= min(best[one], best[other]) * total:
                continue
            value = 2 * _common(where, full, second) / total
            best[one], best[other] = max(best[one], value), max(best[other], value)
    return best


def _common(where: dict[str, int], full: int, second: Sequence[str]) -> int:
    state = full
    for word in second:
        if match := where.get(word):
            match &= state
            state = ((state + match) | (state - match)) & full
    return full.bit_length() - state.bit_count()


class RougePool:
    """Texts that new ones are held against, one by one."""

    def __init__(self) -> None:
        self._words: list[list[str]] = []

    def add(self, text: str) -> None:
        """Put a text into the pool."""
        self._words.append(rouge_words(text))

    def nearest(self, text: str) -> float:
        """Return the highest ROUGE-L F-measure of a text with one of the pool; 0 where the pool is empty."""
        first = rouge_words(text)
        where: dict[str, int] = {}
        for place, word in enumerate(first):
            where[word] = where.get(word, 0) | 1 << place
        full = (1 << len(first)) - 1
        best = 0.0
        for second in self._words:
            total = len(first) + len(second)
            # The shorter text's length bounds what they can share.
            if total and 2 * min(len(first), len(second)) > best * total:
                best = max(best, 2 * _common(where, full, second) / total)
        return best
