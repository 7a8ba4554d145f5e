"""Self-chat (Baize: Xu et al. 2023, arXiv:2304.01196): a teacher plays both sides of a conversation about a topic.

In: topics, each with images or without. Out: multi-turn records, or the reason why a topic gave none. `transcript` lets
the teacher write the whole conversation in one reply, `turns` asks in turn a simulated user and an assistant. Images
stand in the first user turn alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mmit.build.annotated import Dropped, Made
from mmit.build.licences import combined
from mmit.build.parsers import SPEAKERS, alternating
from mmit.build.replies import answer_turn, asked, problem
from mmit.records import Image, Record, Text, Turn
from mmit.teachers import Desk, Draw, Reply, Request
from mmit.teachers.request import user

TASK = "self-chat"
END = "[END]"


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
    """A conversation that grows; `turns` alternate, the user first, and hold no images yet."""

    topic: Topic
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    last: Request | None = None  # the one its last answer was asked with
    reason: str = ""
    ended: bool = False


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
    """Yield a record for each topic, or why there is none.

    Args:
        topics: what to talk about. desk: asks the teachers. draw: how their tokens are drawn.
        style: "turns" asks for one turn at a time, "transcript" for a whole conversation in one reply.
        rounds: questions of a conversation.

    Raises:
        MmitError: what `Desk.ask` raises.
    """
    terms = {teacher.name: teacher.terms for teacher in desk.teachers}
    chats = [_Chat(topic) for topic in topics]
    if style == "transcript":
        requests = [transcript_request(topic, draw, rounds) for topic in topics]
        for chat, request, reply in zip(chats, requests, desk.ask(requests), strict=True):
            chat.replies.append(reply)
            chat.last = request
            texts, chat.reason = alternating(reply, SPEAKERS)
            chat.turns = [Turn("assistant" if n % 2 else "user", (Text(text),)) for n, text in enumerate(texts)]
    else:
        for _ in range(rounds):
            _advance(chats, desk, draw)
    for chat in chats:
        if not chat.turns and not chat.reason:
            chat.reason = "the simulated user says nothing"
        if chat.reason:
            last = chat.replies[-1]
            yield Dropped(TASK, f"{chat.topic.source}:{chat.topic.row}", last.id, chat.reason, last.text[:500])
        else:
            yield _made(chat, terms, style, draw.seed)


def user_request(topic: Topic, said: Sequence[Turn], draw: Draw) -> Request:
    """Return the request for the next turn of the simulated user, who sees the conversation so far."""
    lines = [f"{'You' if turn.role == 'user' else 'Assistant'}: {turn.text}" for turn in said]
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
    questions = [user_request(chat.topic, chat.turns, _draw(chat, draw)) for chat in alive]
    for chat, reply in zip(alive, desk.ask(questions), strict=True):
        chat.replies.append(reply)
        if reply.text.strip().strip('"') == END:
            chat.ended = True
            continue
        chat.reason = _turn_problem(reply)
        if not chat.reason:
            chat.turns.append(Turn("user", (Text(reply.text.strip()),)))
    alive = [chat for chat in alive if not chat.reason and not chat.ended]
    answers = [Request(_shown(chat, thoughts=False), _draw(chat, draw), "assistant") for chat in alive]
    for chat, request, reply in zip(alive, answers, desk.ask(answers), strict=True):
        chat.replies.append(reply)
        chat.last = request
        chat.reason = _turn_problem(reply, chat.turns[-1].text)
        chat.turns.append(answer_turn(reply, thought=desk.keep_thoughts))


def _draw(chat: _Chat, draw: Draw) -> Draw:
    """Give each turn of each topic a seed of its own, so that like openings do not lead to one conversation."""
    return replace(draw, seed=random.Random(f"{draw.seed}|{chat.topic.id}|{len(chat.turns)}").getrandbits(31))


def _turn_problem(reply: Reply, asked: str = "") -> str:
    if reason := problem(reply, asked):
        return reason
    return "a tag inside a turn" if SPEAKERS.anywhere.search(reply.text) or END in reply.text else ""


def _shown(chat: _Chat, *, thoughts: bool) -> tuple[Turn, ...]:
    """Return the turns with the images in the first; the assistant goes on without its earlier thoughts."""
    turns = chat.turns if thoughts else [replace(turn, thinking=None) for turn in chat.turns]
    return (Turn("user", (*chat.topic.images, *turns[0].parts)), *turns[1:])


def _made(chat: _Chat, terms: dict[str, str | None], style: str, seed: int) -> Made:
    topic = chat.topic
    assert chat.last is not None
    build = asked(TASK, chat.last, chat.replies, template=style, parents=[topic.id], seed=seed)
    record = Record(
        _shown(chat, thoughts=True),
        id=f"{topic.id}/chat",
        source=topic.source,
        row=topic.row,
        licence=combined([topic.licence, *(terms[reply.teacher] for reply in chat.replies)]),
        meta={"task": TASK, "build": build},
    )
    return Made(TASK, record, False)
