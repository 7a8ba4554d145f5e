"""A teacher's text before anybody learns from it: what is wrong with it, and what a record says of where it is from.

In: a reply and the text it answers. Out: a reason, one of few, or ""; the rules look at form alone, whether an answer
is right is the business of selection. `asked` gives `meta.build`, with the same keys for every stage that asks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmit.records import Text, Turn

if TYPE_CHECKING:
    from mmit.teachers import Reply, Request

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


def asked(
    how: str,
    request: Request,
    replies: Sequence[Reply],
    *,
    template: str,
    parents: Sequence[str],
    seed: int,
    score: float | None = None,
) -> dict[str, Any]:
    """Return the provenance of a record that teachers wrote.

    Args:
        how: the stage. template: the wording or style it asked with.
        request: what the record's answer was asked with; its digest is the prompt's hash.
        replies: all that the record is made of, the answer's last.
        parents: ids of the rows, seeds or records it was made from.
        seed: of the build. score: what a selection gave it; None where none was asked for.
    """
    return {
        "how": how,
        "template": template,
        "teacher": ", ".join(dict.fromkeys(reply.teacher for reply in replies)),
        "request": replies[-1].id,
        "requests": [reply.id for reply in replies],
        "prompt": request.digest,
        "parents": list(parents),
        "seed": seed,
        "score": score,
    }
