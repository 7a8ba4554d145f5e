"""What is wrong with a teacher's text before anybody learns from it.

In: a reply and the text it answers. Out: a reason, one of few, or "". The rules look at form alone; whether an answer
is right is the business of selection.
"""

from __future__ import annotations

import re

from mmit.teachers import Reply

REFUSAL = re.compile(
    r"^(?:i(?: am|'m|’m) (?:very )?sorry,? (?:but|i)\b|sorry, (?:but|i)\b|i apologi[sz]e|as an ai\b|"
    r"i(?: am|'m|’m) (?:just )?an ai\b|i(?: am|'m|’m) (?:unable|not able) to|"
    r"i (?:can(?:no|')?t|can’t) (?:help|assist|fulfil|comply|provide|answer|see))",
    re.IGNORECASE,
)
# Tags of speakers at the start of a line, and control tokens anywhere: an answer that plays the next turn too.
ROLE_TAG = re.compile(
    r"(?m)^\s*(?:###\s*)?(?:\[\|?(?:human|ai|user|assistant)\|?\]|(?:human|user|assistant)\s*:)|"
    r"<\|[a-z0-9_]+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<image>",
    re.IGNORECASE,
)


def problem(reply: Reply, asked: str = "") -> str:
    """Return why a reply cannot be used, "" if it can."""
    text = reply.text.strip()
    if reply.finish == "refused":
        return "refused by the server"
    if reply.finish == "length":
        return "cut off by length"
    return text_problem(text, asked)


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
    if asked and _words(text) == _words(asked):
        return "repeats the prompt"
    return ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
