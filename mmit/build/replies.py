"""What is wrong with a teacher's text before anybody learns from it.

In: a reply and the text it answers. Out: a reason, one of few, or "". The rules look at form alone; whether an answer
is right is the business of selection.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mmit.records import Text, Turn

if TYPE_CHECKING:
    from mmit.teachers import Reply

REFUSAL = re.compile(
    r"^(?:i(?: am|'m|’m) (?:very )?sorry,? (?:but|i)\b|sorry, (?:but|i)\b|i apologi[sz]e|as an ai\b|"
    r"i(?: am|'m|’m) (?:just )?an ai\b|i(?: am|'m|’m) (?:unable|not able) to|"
    r"i (?:can(?:no|')?t|can’t) (?:help|assist|fulfil|comply|provide|answer|see))",
    re.IGNORECASE,
)
# Tags of speakers at the start of a line, and control tokens anywhere: an answer that plays the next turn too.
ROLE_TAG = re.compile(
    r"(?m)^\s*(?:###\s*)?(?:\[\|?(?:human|ai|user|assistant)\|?\]|(?:human|user|assistant)\s*[:\uff1a])|"
    r"<\|[a-z0-9_]+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<image>|</?think>",
    re.IGNORECASE,
)
_FINISH = {
    "refused": "refused by the server",
    "length": "cut off by length",
    "unrecorded": "not in the replayed journal",
}


def problem(reply: Reply, asked: str = "") -> str:
    """Return why a reply cannot be used, "" if it can."""
    if reason := finish_problem(reply):
        return reason
    if reply.thought and not reply.text.strip():
        return "a thought without an answer"
    return text_problem(reply.text, asked)


def answer_turn(reply: Reply, *, thought: bool) -> Turn:
    """Return the assistant's turn of a reply, with its thought where that is kept."""
    return Turn("assistant", (Text(reply.text.strip()),), thinking=(reply.thought or None) if thought else None)


def finish_problem(reply: Reply) -> str:
    """Return why no text of a reply can be used, "" if it ended by itself."""
    return _FINISH.get(reply.finish, "")


def text_problem(text: str, asked: str = "") -> str:
    """Return why a text cannot be an answer to `asked`, "" if it can."""
    text = text.strip()
    if not text:
        return "empty"
    if "\ufffd" in text:
        return "not valid UTF-8"
    if REFUSAL.search(text):
        return "a refusal"
    if ROLE_TAG.search(text):
        return "role tags or control tokens"
    if asked and same_words(text, asked):
        return "repeats the prompt"
    return ""


def same_words(one: str, other: str) -> bool:
    """Tell whether two texts are the same but for case, spaces and punctuation."""
    first, second = (re.findall(r"\w+", text.lower()) for text in (one, other))
    return first == second
