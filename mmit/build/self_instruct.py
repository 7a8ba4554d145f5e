"""Self-Instruct (Wang et al. 2022, arXiv:2212.10560): a teacher grows instructions from seeds, with images or without.

In: seed tasks, a teacher, and images where the questions are to be about images. Out: records, and every text of the
teacher that gave none, with the rule that dropped it. A round sends its requests together; their replies are filtered
one by one in the order of the requests. So the result depends on the seed and the round's size, never on the number
of requests at a time or on when replies come in.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmit.build.annotated import Dropped, Made
from mmit.build.licences import combined
from mmit.build.replies import finish_problem, problem, same_words, text_problem
from mmit.data.diversity import RougePool
from mmit.errors import ConfigError
from mmit.records import Image, Record, Text, Turn
from mmit.teachers import Desk, Draw, Reply, Request
from mmit.teachers.request import user

# What a language model cannot do or show (the list of Self-Instruct, as whole words); used without images only.
KEYWORDS = tuple("image images graph graphs picture pictures file files map maps draw plot video audio music".split())
KEYWORDS += ("go to", "flowchart", "diagram")
TASK = "self-instruct"
_ITEM = re.compile(r"(?m)^\s*(?:Task\s*)?(\d+)\s*[.):]\s*")
_SIDE = re.compile(r"(?m)^\s*(Input|Output|Class label)\s*:[ \t]*", re.IGNORECASE)
_ROUNDS = 10_000


@dataclass(frozen=True)
class Task:
    """A seed or an accepted task; `output` is "" where only the instruction is known."""

    id: str
    instruction: str
    input: str = ""
    output: str = ""
    classification: bool = False


@dataclass(frozen=True)
class Plan:
    """How a pool grows.

    Attributes:
        target: accepted records to stop at. requests: of a round, sent together.
        human, machine: demonstrations from the seeds and from what was accepted; seeds fill in while there is little.
        new: instructions asked for in a request.
        words: fewest and most of an instruction. rouge_l: highest ROUGE-L with anything in the pool.
        keywords: words no instruction may hold.
        needs_picture: drop questions that the teacher answers alike without the image.
        patience: rounds without an accepted record after which the build stops.
    """

    target: int = 100
    requests: int = 8
    human: int = 6
    machine: int = 2
    new: int = 8
    words: tuple[int, int] = (4, 150)
    rouge_l: float = 0.7
    keywords: tuple[str, ...] = KEYWORDS
    needs_picture: bool = True
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("target", "requests", "human", "new", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"is {getattr(self, name)}", where=name, remedy="Give 1 or more.")
        if not 0 < self.rouge_l <= 1 or not 0 < self.words[0] <= self.words[1]:
            raise ConfigError("filters out of range", where="filters", remedy="Write words: [4, 150], rouge_l: 0.7")


class SelfInstruct:
    """One build. `pictures` makes every question one about an image; `licences` are the seeds' and the images'."""

    def __init__(
        self,
        seeds: Sequence[Task],
        desk: Desk,
        plan: Plan,
        *,
        draw: Draw,
        pictures: Sequence[Image] = (),
        licences: Sequence[str | None] = (),
    ) -> None:
        if len(seeds) < plan.human:
            problem_ = f"{plan.human} demonstrations a request, but {len(seeds)} seeds"
            raise ConfigError(problem_, where="seeds", remedy="Give more seeds, or lower prompt.human.")
        self.seeds, self.desk, self.plan, self.draw = list(seeds), desk, plan, draw
        self.pictures, self.licences = list(pictures), list(licences)
        self.grown: list[Task] = []
        self._outputs: dict[tuple[str, str], str] = {}  # instruction and input -> output
        self._pool = RougePool()
        for seed in seeds:  # seeds are not held against each other: some of the published ones are alike
            self._pool.add(seed.instruction)

    def run(self) -> Iterator[Made | Dropped]:
        """Yield records until the target is reached, or no round has brought one for `patience` rounds.

        Raises BudgetError and MmitError as `Desk.ask` does.
        """
        idle = 0
        for number in range(_ROUNDS):
            before = len(self.grown)
            for item in self._round(number):
                yield item
                if len(self.grown) >= self.plan.target:
                    return
            idle = 0 if len(self.grown) > before else idle + 1
            if idle >= self.plan.patience:
                return

    def first_round(self) -> list[Request]:
        """Return the requests that the first round sends, for a forecast."""
        return [request for request, _ in self._asked(0)]

    def _round(self, number: int) -> Iterator[Made | Dropped]:
        asked = self._asked(number)
        candidates: list[tuple[str, Image | None, Reply]] = []
        for (_, image), reply in zip(asked, self.desk.ask([request for request, _ in asked]), strict=True):
            for text, reason in numbered(reply):
                reason = reason or self._filtered(text)
                if reason:
                    yield _dropped(reply, reason, text)
                    continue
                self._pool.add(text)
                candidates.append((text, image, reply))
        if self.pictures:
            yield from self._see(candidates)
        else:
            yield from self._instances(candidates)

    def _asked(self, number: int) -> list[tuple[Request, Image | None]]:
        plan, asked = self.plan, []
        for at in range(plan.requests):
            rng = random.Random(f"{plan.seed}|{number}|{at}")
            machine = rng.sample(self.grown, min(plan.machine, len(self.grown)))
            human = rng.sample(self.seeds, min(len(self.seeds), plan.human + plan.machine - len(machine)))
            shown = [*human, *machine]
            rng.shuffle(shown)
            image = rng.choice(self.pictures) if self.pictures else None
            listed = "\n".join(f"{n}. {' '.join(task.instruction.split())}" for n, task in enumerate(shown, 1))
            first = len(shown) + 1
            about = "questions about images" if image else "tasks for an assistant that reads and writes text"
            order = f"Write {plan.new} new ones, different from these and from each other, numbered from {first}."
            if image:
                order += " Ask about this image, and only what can be answered by looking at it."
            text = f"These are {about}:\n\n{listed}\n\n{order} Write the list and nothing else."
            draw = replace(self.draw, seed=rng.getrandbits(31))
            asked.append((Request(user(*([image] if image else []), text), draw, "instructions"), image))
        return asked

    def _filtered(self, text: str) -> str:
        low, high = self.plan.words
        words = text.split()
        if reason := text_problem(text):
            return reason
        if len(words) < low:
            return "the instruction is too short"
        if len(words) > high:
            return "the instruction is too long"
        if not self.pictures and text.lower().startswith("write a program"):
            return "asks for a program"
        if not text[0].isascii() or not (text[0].isalnum() or text[0] in "\"'"):
            return "begins with punctuation or another script"
        for word in self.plan.keywords:
            if re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE):
                return "holds a keyword"
        return "too near to the pool (ROUGE-L)" if self._pool.nearest(text) > self.plan.rouge_l else ""

    def _see(self, candidates: Sequence[tuple[str, Image | None, Reply]]) -> Iterator[Made | Dropped]:
        """Answer questions about images; those answered alike without the image are dropped."""
        draw = Draw(max_tokens=self.draw.max_tokens)
        seen = self.desk.ask(Request(user(image, text), draw, "answers") for text, image, _ in candidates if image)
        blind = seen
        if self.plan.needs_picture:
            blind = self.desk.ask(Request(user(text), draw, "without image") for text, _, _ in candidates)
        for (text, image, written), reply, other in zip(candidates, seen, blind, strict=True):
            reason = problem(reply, text)
            if not reason and self.plan.needs_picture and same_words(reply.text, other.text):
                reason = "answered alike without the image"
            if reason:
                yield _dropped(reply, reason, f"{text} -> {reply.text}")
            else:
                yield self._accept(Task("", text, "", reply.text), written, reply, image)

    def _instances(self, candidates: Sequence[tuple[str, Image | None, Reply]]) -> Iterator[Made | Dropped]:
        """Let the teacher write input and output; of classification tasks the output first, for all classes occur."""
        short = Draw(max_tokens=3)
        kinds = self.desk.ask(Request(user(self._classify(text)), short, "classify") for text, *_ in candidates)
        kinds_ = [reply.text.strip().lower().startswith("yes") for reply in kinds]
        draw = Draw(max_tokens=self.draw.max_tokens)
        asked = [
            Request(user(_output_first(text) if kind else _input_first(text)), draw, "instances")
            for (text, *_), kind in zip(candidates, kinds_, strict=True)
        ]
        for (text, _, written), kind, reply in zip(candidates, kinds_, self.desk.ask(asked), strict=True):
            made, refused = [], finish_problem(reply)
            found = [] if refused else instances(reply.text, classification=kind)
            for given, output, reason in found:
                reason = reason or text_problem(output, given)
                if reason:
                    yield _dropped(reply, reason, f"{text} | {given} -> {output}")
                else:
                    made.append((given, output))
            if len({given for given, _ in made}) < len({*made}):
                yield _dropped(reply, "the same input with different outputs", text)
            elif made:
                given, output = made[0]
                yield self._accept(Task("", text, given, output, kind), written, reply, None)
            elif not found:
                yield _dropped(reply, refused or "no input and output found", f"{text} -> {reply.text}")

    def _classify(self, text: str) -> str:
        rng = random.Random(f"{self.plan.seed}|classify")
        yes = [task for task in self.seeds if task.classification]
        no = [task for task in self.seeds if not task.classification]
        shown = rng.sample(yes, min(12, len(yes))) + rng.sample(no, min(19, len(no)))
        rng.shuffle(shown)
        lines = [f"Task: {t.instruction}\nClassification: {'Yes' if t.classification else 'No'}\n" for t in shown]
        head = "Is the task a classification task with a small set of possible outputs? Answer Yes or No."
        return "\n".join([head, "", *lines, f"Task: {text}\nClassification:"])

    def _accept(self, task: Task, written: Reply, reply: Reply, image: Image | None) -> Made:
        name = f"grown-{len(self.grown)}"
        self.grown.append(replace(task, id=name))
        terms = {teacher.name: teacher.terms for teacher in self.desk.teachers}
        build: dict[str, Any] = {"how": TASK, "teacher": reply.teacher, "request": reply.id, "parents": [written.id]}
        text = f"{task.instruction}\n\n{task.input}" if task.input else task.instruction
        record = Record(
            (Turn("user", (*([image] if image else []), Text(text))), Turn("assistant", (Text(task.output),))),
            id=name,
            source=TASK,
            licence=combined([*self.licences, terms[written.teacher], terms[reply.teacher]]),
            meta={"task": TASK, "build": build | {"seed": self.plan.seed, "classification": task.classification}},
        )
        return Made(TASK, record, False)


def numbered(reply: Reply) -> list[tuple[str, str]]:
    """Return the items of a numbered list as (text, reason it cannot be used or "")."""
    if reply.finish == "refused":
        return [(reply.text, finish_problem(reply))]
    pieces = _ITEM.split(reply.text)
    if len(pieces) < 3:
        return [(reply.text, "empty" if not reply.text.strip() else "no numbered list")]
    items: list[tuple[str, str]] = []
    last = 0
    for number, text in zip(pieces[1::2], pieces[2::2], strict=True):
        value = int(number[:9])
        reason = "" if value > last else "the list's numbers repeat"
        items.append((text.strip(), reason or ("" if text.strip() else "empty")))
        last = max(last, value)
    if reply.finish == "length":
        items[-1] = (items[-1][0], finish_problem(reply))
    return items


def instances(text: str, *, classification: bool) -> list[tuple[str, str, str]]:
    """Return (input, output, reason it cannot be used or "") for the instances in a teacher's text."""
    pieces = _SIDE.split(text)
    found: list[tuple[str, str, str]] = []
    given = label = None
    for side, body in zip(pieces[1::2], pieces[2::2], strict=True):
        side, body = side.lower(), body.strip()
        if side == "class label":
            if label is not None:
                found.append(("", label, "a class label without an input"))
            label = body
        elif side == "input":
            if classification and label is not None:
                found.append((body, label, _instance_problem(body, label)))
                label = None
            else:
                if given is not None:
                    found.append((given, "", "an input without an output"))
                given = "" if re.fullmatch(r"(?i)<?(?:no ?input|none|n/a)>?\.?", body) else body
        else:
            found.append((given or "", body, _instance_problem(given or "", body)))
            given = None
    if label is not None:
        found.append(("", label, "a class label without an input"))
    if given is not None:
        found.append((given, "", "an input without an output"))
    return found


def _instance_problem(given: str, output: str) -> str:
    if not output:
        return "empty"
    if given and same_words(given, output):
        return "input and output are the same"
    return "the output ends with a colon" if output.endswith(":") else ""


def _input_first(text: str) -> str:
    form = "Input: (the input, or <noinput> if the task needs none)\nOutput: (the right answer)"
    return f"Task: {text}\n\nWrite one example of this task in exactly this form:\n{form}"


def _output_first(text: str) -> str:
    form = "Class label: (a possible answer)\nInput: (an input that has this answer)"
    return f"Task: {text}\n\nFor each possible answer, write one example in exactly this form:\n{form}"


def _dropped(reply: Reply, reason: str, text: str) -> Dropped:
    return Dropped(TASK, reply.id, "", reason, text[:500])
