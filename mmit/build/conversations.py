"""Conversations, descriptions and reasoning about images by a teacher that reads captions and boxes (LLaVA: Liu et al.
2023, arXiv:2304.08485).

In: scenes. Out: records of the image with what the teacher wrote as if it saw it, or the reason why there is none. A
text that lets its sources through (captions, boxes, coordinates) is dropped. Where scenes state attributes, answers are
checked against them: the share of right ones is measured, and decides nothing here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mmit.build.annotated import Dropped, Made
from mmit.build.licences import combined
from mmit.build.parsers import PAIRS, alternating
from mmit.build.replies import answer_turn, asked, problem
from mmit.records import Record, Text, Turn
from mmit.teachers import Desk, Draw, Reply, Request

if TYPE_CHECKING:
    from mmit.build.facts import FactCheck
    from mmit.build.scenes import Scene

KINDS = ("conversation", "detail", "reasoning")
_NUMBER = r"(?:[01]?\.\d+|[01])"
SOURCES = re.compile(
    r"\b(?:captions?|captioned|bounding[ -]?box(?:es)?|coordinates?|bbox(?:es)?|annotations?)\b|"
    r"\b(?:the|these|given|provided) (?:text|list|facts?|descriptions?|information|sentences?) "
    r"(?:says?|states?|lists?|mentions?|provided|given|above)\b|"
    r"\b(?:based on|according to|as (?:described|stated|mentioned|listed) in) (?:the|these|this) "
    r"(?:given |provided )?(?:list|facts?|descriptions?|information|sentences?|text)\b|"
    # A box, two shares one after the other, or one to the three places that `context` gives.
    rf"\[\s*{_NUMBER}\s*,|\b0?\.\d{{2,}}\s*,\s*0?\.\d{{2,}}|(?<![\d.])0?\.\d{{3}}\b",
    re.IGNORECASE,
)
_SYSTEM = (
    "You write examples for an assistant that looks at images. You cannot see the image; what is known of it is given. "
    "Write as one who sees the image. Never speak of captions, boxes, coordinates, lists or descriptions, and say only "
    "what the facts support."
)
_DETAIL = (
    "Describe the image in detail.",
    "What do you see in this image? Leave nothing out.",
    "Give a full account of what this image shows.",
    "Tell me about everything in this image, and where it is.",
    "Could you walk me through this image?",
    "What does this image show? Please be thorough.",
    "Explain this image to someone who cannot see it.",
    "Write a detailed description of this image.",
)
_FORM = "Write each turn on lines of its own that begin with Question: or Answer:, and nothing else."
_ORDERS = {
    "conversation": (
        "Write {rounds} questions that a person asks about the image and their answers, in turn. Ask about objects, "
        "their number, their colours, what they do, where they are and how they stand to each other. Ask only what the "
        "facts answer for certain. " + _FORM
    ),
    "detail": "Answer this question in one or more paragraphs: {question}\nWrite the answer and nothing else.",
    "reasoning": (
        "Write one question about the image that takes thought beyond what is plainly seen, such as why, what for, "
        "what may happen next or what to take care of, and an answer that reasons step by step from what is seen. "
        + _FORM
    ),
}


@dataclass(frozen=True)
class _Asked:
    scene: Scene
    kind: str
    question: str
    request: Request


def requests(
    scenes: Iterable[Scene], draw: Draw, *, kinds: Sequence[str] = KINDS, rounds: int = 3, seed: int = 0
) -> list[Request]:
    """Return the requests of scenes, in the order of the scenes.

    Args:
        scenes: what is known of each picture. draw: how the teacher's tokens are drawn.
        kinds: some of KINDS. rounds: questions of a conversation. seed: of prompts and draws.
    """
    return [one.request for one in _asked(scenes, draw, kinds, rounds, seed)]


def conversations(
    scenes: Iterable[Scene | Dropped],
    desk: Desk,
    draw: Draw,
    *,
    kinds: Sequence[str] = KINDS,
    rounds: int = 3,
    seed: int = 0,
    check: FactCheck | None = None,
) -> Iterator[Made | Dropped]:
    """Yield a record for each scene and kind, or why there is none.

    Args:
        rounds: questions asked for in a conversation.
        check: measures answers against the scenes' facts, and keeps count.

    Raises what `Desk.ask` raises.
    """
    usable = []
    for item in scenes:
        if isinstance(item, Dropped):
            yield item
        else:
            usable.append(item)
    terms = {teacher.name: teacher.terms for teacher in desk.teachers}
    sent = _asked(usable, draw, kinds, rounds, seed)
    for one, reply in zip(sent, desk.ask([one.request for one in sent]), strict=True):
        turns, reason = _turns(one, reply, thoughts=desk.keep_thoughts)
        task = f"conversations-{one.kind}"
        if reason:
            yield Dropped(task, f"{one.scene.source}:{one.scene.row}", reply.id, reason, reply.text[:500])
            continue
        yield Made(task, _record(one, reply, turns, terms[reply.teacher], seed, check), False)


def context(scene: Scene) -> str:
    """Return what the teacher is told of a scene; the number of captions is the real one."""
    count = len(scene.captions)
    head = {0: "There is no caption.", 1: "One caption of the image:"}.get(count, f"{count} captions of the image:")
    lines = [head, *(f"- {text}" for text in scene.captions)]
    if scene.boxes:
        lines += ["", "Objects, with left, top, right and bottom as shares of the image's width and height:"]
        lines += [f"- {box.name}: [{', '.join(f'{value:.3f}' for value in box.at)}]" for box in scene.boxes]
    return "\n".join(lines)


def _asked(scenes: Iterable[Scene], draw: Draw, kinds: Sequence[str], rounds: int, seed: int) -> list[_Asked]:
    sent = []
    for scene in scenes:
        for kind in kinds:
            rng = random.Random(f"{seed}|{scene.id}|{kind}")
            question = rng.choice(_DETAIL)
            order = _ORDERS[kind].format(rounds=rounds, question=question)
            turns = (Turn("system", (Text(_SYSTEM),)), Turn("user", (Text(f"{context(scene)}\n\n{order}"),)))
            sent.append(_Asked(scene, kind, question, Request(turns, replace(draw, seed=rng.getrandbits(31)), kind)))
    return sent


def _turns(one: _Asked, reply: Reply, *, thoughts: bool) -> tuple[list[Turn], str]:
    """Return the turns of a reply without the image, or [] and the reason it cannot be used."""
    if one.kind == "detail":
        reason = problem(reply, one.question)
        turns = [Turn("user", (Text(one.question),)), answer_turn(reply, thought=thoughts)]
    else:
        texts, reason = alternating(reply, PAIRS)
        if not reason and one.kind == "reasoning" and len(texts) > 2:
            reason = "more than one question"
        turns = [Turn("assistant" if n % 2 else "user", (Text(text),)) for n, text in enumerate(texts)]
    if not reason and any(SOURCES.search(turn.text) for turn in turns):
        reason = "mentions captions, boxes or coordinates"
    return ([], reason) if reason else (turns, "")


def _record(
    one: _Asked, reply: Reply, turns: list[Turn], terms: str | None, seed: int, check: FactCheck | None
) -> Record:
    scene, task = one.scene, f"conversations-{one.kind}"
    build = asked("conversations", one.request, [reply], template=one.kind, parents=[scene.id], seed=seed)
    meta = {"task": task, "build": build}
    if check is not None:
        texts = [turn.text for turn in turns]
        verdicts = [check.add(q, a, scene.facts, image=scene.id) for q, a in zip(texts[::2], texts[1::2], strict=True)]
        meta["facts"] = {"right": verdicts.count(True), "wrong": verdicts.count(False)}
    return Record(
        (Turn("user", (scene.image, *turns[0].parts)), *turns[1:]),
        id=f"{scene.id}/{one.kind}",
        source=scene.source,
        row=scene.row,
        licence=combined([scene.licence, terms]),
        meta=meta,
    )
