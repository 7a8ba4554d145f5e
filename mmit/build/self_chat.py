"""Self-chat (Baize: Xu et al. 2023, arXiv:2304.01196): a teacher plays both sides of a conversation about a topic.

In: topics, each with images or without. Out: multi-turn records, or the reason why a topic gave none. `transcript` lets
the teacher write the whole conversation in one reply, `turns` asks in turn a simulated user and an assistant. Images
stand in the first user turn alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mmit.build.annotated import Dropped, Made
from mmit.build.licences import combined
from mmit.build.replies import finish_problem, problem, text_problem
from mmit.records import Image, Record, Text, Turn
from mmit.teachers import Desk, Draw, Reply, Request
from mmit.teachers.request import user

TASK = "self-chat"
END = "[END]"
_TAG = re.compile(r"(?m)^[ \t]*\[(Human|AI)\][ \t]*:?[ \t]*")
_ANY_TAG = re.compile(r"\[\|?(?:human|ai|user|assistant)\|?\]", re.IGNORECASE)


@dataclass(frozen=True)
class Topic:
    """What a conversation is about, and where it comes from."""

    id: str
    text: str
    images: tuple[Image, ...]
    source: str
    row: int
    licence: str | None


@dataclass
class _Chat:
    """A conversation that grows; `said` alternates, the user first."""

    topic: Topic
    said: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    reason: str = ""
    ended: bool = False


def parse_transcript(reply: Reply) -> tuple[list[str], str]:
    """Return the texts of a transcript, the user's first, or [] and the reason it cannot be used."""
    if reason := finish_problem(reply):
        return [], reason
    pieces = _TAG.split(reply.text.strip())
    if not reply.text.strip():
        return [], "empty"
    if len(pieces) < 3:
        return [], "no [Human] and [AI] tags"
    if pieces[0].strip():
        return [], "text before the first tag"
    tags, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
    if tags[0] != "Human":
        return [], "the assistant speaks first"
    for before, after in zip(tags, tags[1:], strict=False):
        if before == after:
            return [], "one side speaks twice in a row"
    if tags[-1] == "Human":
        return [], "the last turn has no answer"
    for text in texts:
        if _ANY_TAG.search(text):
            return [], "a tag inside a turn"
        if reason := text_problem(text):
            return [], "an empty turn" if reason == "empty" else reason
    return texts, ""


def transcript_request(topic: Topic, draw: Draw, rounds: int) -> Request:
    """Return the request for a whole conversation."""
    shown = "the image and the topic" if topic.images else "the topic"
    order = (
        f"Write a conversation of about {rounds} rounds between a human and an AI assistant on {shown}: {topic.text}\n"
        "Begin each turn on a new line with [Human] or [AI]. The human speaks first, the AI last and helpfully. "
        "Write the turns and nothing else."
    )
    return Request(user(*topic.images, order), draw, "transcript")


def self_chat(
    topics: Sequence[Topic], desk: Desk, draw: Draw, *, style: str = "turns", rounds: int = 3
) -> Iterator[Made | Dropped]:
    """Yield a record for each topic, or why there is none. Raises what `Desk.ask` raises."""
    terms = {teacher.name: teacher.terms for teacher in desk.teachers}
    chats = [_Chat(topic) for topic in topics]
    if style == "transcript":
        replies = desk.ask(transcript_request(topic, draw, rounds) for topic in topics)
        for chat, reply in zip(chats, replies, strict=True):
            chat.replies.append(reply)
            chat.said, chat.reason = parse_transcript(reply)
    else:
        for _ in range(rounds):
            _advance(chats, desk, draw)
    for chat in chats:
        if not chat.said and not chat.reason:
            chat.reason = "the simulated user says nothing"
        if chat.reason:
            last = chat.replies[-1]
            yield Dropped(TASK, f"{chat.topic.source}:{chat.topic.row}", last.id, chat.reason, last.text[:500])
        else:
            yield _made(chat, terms, style)


def user_request(topic: Topic, said: Sequence[str], draw: Draw) -> Request:
    """Return the request for the next turn of the simulated user, who sees the conversation so far."""
    lines = [f"{'You' if n % 2 == 0 else 'Assistant'}: {text}" for n, text in enumerate(said)]
    so_far = "The conversation so far:\n" + "\n".join(lines) if said else "The conversation begins."
    about = "the image you see and this topic" if topic.images else "this topic"
    order = (
        f"You are a person who talks with an AI assistant about {about}: {topic.text}\n\n{so_far}\n\n"
        f"Write what you say next, in one or two sentences and without a name before it. If nothing is left to ask, "
        f"write {END}."
    )
    return Request(user(*topic.images, order), draw, "simulated user")


def _advance(chats: Sequence[_Chat], desk: Desk, draw: Draw) -> None:
    """Add one round to every conversation that goes on; all of one side are asked together."""
    alive = [chat for chat in chats if not chat.reason and not chat.ended]
    asked = [user_request(chat.topic, chat.said, _draw(chat, draw)) for chat in alive]
    for chat, reply in zip(alive, desk.ask(asked), strict=True):
        chat.replies.append(reply)
        if reply.text.strip().strip('"') == END:
            chat.ended = True
            continue
        chat.reason = _turn_problem(reply)
        if not chat.reason:
            chat.said.append(reply.text.strip())
    alive = [chat for chat in alive if not chat.reason and not chat.ended]
    answers = [Request(_turns(chat), _draw(chat, draw), "assistant") for chat in alive]
    for chat, reply in zip(alive, desk.ask(answers), strict=True):
        chat.replies.append(reply)
        chat.reason = _turn_problem(reply, chat.said[-1])
        chat.said.append(reply.text.strip())


def _draw(chat: _Chat, draw: Draw) -> Draw:
    """Give each turn of each topic a seed of its own, so that like openings do not lead to one conversation."""
    return replace(draw, seed=random.Random(f"{draw.seed}|{chat.topic.id}|{len(chat.said)}").getrandbits(31))


def _turn_problem(reply: Reply, asked: str = "") -> str:
    if reason := problem(reply, asked):
        return reason
    return "a tag inside a turn" if _ANY_TAG.search(reply.text) or END in reply.text else ""


def _turns(chat: _Chat) -> tuple[Turn, ...]:
    turns = [Turn("assistant" if n % 2 else "user", (Text(text),)) for n, text in enumerate(chat.said)]
    return (Turn("user", (*chat.topic.images, *turns[0].parts)), *turns[1:])


def _made(chat: _Chat, terms: dict[str, str | None], style: str) -> Made:
    topic = chat.topic
    names = list(dict.fromkeys(reply.teacher for reply in chat.replies))
    build = {"how": TASK, "template": style, "teacher": ", ".join(names), "parents": [topic.id]}
    record = Record(
        _turns(chat),
        id=f"{topic.id}/chat",
        source=topic.source,
        row=topic.row,
        licence=combined([topic.licence, *(terms[name] for name in names)]),
        meta={"task": TASK, "build": build | {"requests": [reply.id for reply in chat.replies]}},
    )
    return Made(TASK, record, False)
