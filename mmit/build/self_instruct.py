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

from mmit.build.annotated import Dropped, Made
from mmit.build.licences import combined
from mmit.build.parsers import instances, numbered, tasks
from mmit.build.replies import answer_turn, asked, finish_problem, problem, same_words, text_problem
from mmit.data.diversity import RougePool
from mmit.errors import ConfigError, nearest
from mmit.records import Image, Record, Text, Turn
from mmit.teachers import Desk, Draw, Reply, Request
from mmit.teachers.request import user

# What a language model cannot do or show (the list of Self-Instruct, as whole words); used without images only.
KEYWORDS = tuple("image images graph graphs picture pictures file files map maps draw plot video audio music".split())
KEYWORDS += ("go to", "flowchart", "diagram")
TASK = "self-instruct"
STYLES = ("steps", "alpaca")
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
class InstructPlan:
    """How a pool grows.

    Attributes:
        target: accepted records to stop at. requests: of a round, sent together.
        human, machine: demonstrations from the seeds and from what was accepted; seeds fill in while there is little.
        new: instructions asked for in a request.
        words: fewest and most of an instruction. rouge_l: highest ROUGE-L with anything in the pool.
        keywords: words no instruction may hold.
        needs_picture: drop questions that the teacher answers alike without the image.
        patience: rounds without an accepted record after which the build stops.
        style: "steps" asks for instructions, then for the kind, input and output of each; "alpaca" (Taori et al. 2023)
            for whole tasks in one call, without images.
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
    style: str = "steps"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ConfigError(f"unknown style '{self.style}'", where="style", remedy=nearest(self.style, STYLES))
        for name in ("target", "requests", "human", "new", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"is {getattr(self, name)}", where=name, remedy="Give 1 or more.")
        if not 0 < self.rouge_l <= 1 or not 0 < self.words[0] <= self.words[1]:
            raise ConfigError("filters out of range", where="filters", remedy="Write words: [4, 150], rouge_l: 0.7")


@dataclass(frozen=True)
class _Asked:
    """A request for new instructions: its image, and the ids of its demonstrations."""

    request: Request
    image: Image | None
    shown: list[str]


@dataclass(frozen=True)
class _Candidate:
    """An instruction that passed the filters, and where it was written."""

    text: str
    asked: _Asked
    reply: Reply

    @property
    def images(self) -> tuple[Image, ...]:
        return (self.asked.image,) if self.asked.image else ()


class SelfInstruct:
    """One build. `pictures` makes every question one about an image; `licences` are the seeds' and the images'."""

    def __init__(
        self,
        seeds: Sequence[Task],
        desk: Desk,
        plan: InstructPlan,
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
        if plan.style == "alpaca" and pictures:
            remedy = "Leave pictures out, or style."
            raise ConfigError("writes tasks without images", where="style: alpaca", remedy=remedy)
        self._shown = [seed for seed in seeds if seed.output] if plan.style == "alpaca" else self.seeds
        if len(self._shown) < plan.human:
            problem_ = f"{plan.human} demonstrations a request, but {len(self._shown)} seeds with an output"
            raise ConfigError(problem_, where="seeds", remedy="Give more seeds, or lower prompt.human.")
        self.grown: list[Task] = []
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
        return [asked_.request for asked_ in self._asked(0)]

    def _round(self, number: int) -> Iterator[Made | Dropped]:
        sent = self._asked(number)
        candidates: list[_Candidate] = []
        for one, reply in zip(sent, self.desk.ask([one.request for one in sent]), strict=True):
            if self.plan.style == "alpaca":
                yield from self._whole(one, reply)
                continue
            for text, reason in numbered(reply):
                reason = reason or self._filtered(text)
                if reason:
                    yield _dropped(reply, reason, text)
                    continue
                self._pool.add(text)
                candidates.append(_Candidate(text, one, reply))
        if self.pictures:
            yield from self._see(candidates)
        else:
            yield from self._instances(candidates)

    def _whole(self, one: _Asked, reply: Reply) -> Iterator[Made | Dropped]:
        """Filter the tasks of a reply that holds instruction, input and output of each."""
        for task in tasks(reply):
            reason = task.reason or self._filtered(task.instruction) or text_problem(task.output, task.input)
            if reason:
                yield _dropped(reply, reason, f"{task.instruction} | {task.input} -> {task.output}")
                continue
            self._pool.add(task.instruction)
            made = Task("", task.instruction, task.input, task.output)
            yield self._accept(made, _Candidate(task.instruction, one, reply), one.request, reply)

    def _asked(self, number: int) -> list[_Asked]:
        plan, sent = self.plan, []
        for at in range(plan.requests):
            rng = random.Random(f"{plan.seed}|{number}|{at}")
            machine = rng.sample(self.grown, min(plan.machine, len(self.grown)))
            human = rng.sample(self._shown, min(len(self._shown), plan.human + plan.machine - len(machine)))
            shown = [*human, *machine]
            rng.shuffle(shown)
            image = rng.choice(self.pictures) if self.pictures else None
            text = _one_call(shown, plan.new) if plan.style == "alpaca" else _more(shown, plan.new, image=bool(image))
            draw = replace(self.draw, seed=rng.getrandbits(31))
            request = Request(user(*([image] if image else []), text), draw, "instructions")
            sent.append(_Asked(request, image, [task.id for task in shown]))
        return sent

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

    def _see(self, candidates: Sequence[_Candidate]) -> Iterator[Made | Dropped]:
        """Answer questions about images; those answered alike without the image are dropped."""
        draw = Draw(max_tokens=self.draw.max_tokens)
        requests = [Request(user(*one.images, one.text), draw, "answers") for one in candidates]
        seen = blind = self.desk.ask(requests)
        if self.plan.needs_picture:
            blind = self.desk.ask(Request(user(one.text), draw, "without image") for one in candidates)
        for one, request, reply, other in zip(candidates, requests, seen, blind, strict=True):
            text = one.text
            # What the teacher says without the image must be known to tell whether the question needs it.
            reason = problem(reply, text) or (finish_problem(other) if other.finish == "unrecorded" else "")
            if not reason and self.plan.needs_picture and same_words(reply.text, other.text):
                reason = "answered alike without the image"
            if reason:
                yield _dropped(reply, reason, f"{text} -> {reply.text}")
            else:
                yield self._accept(Task("", text, "", reply.text), one, request, reply)

    def _instances(self, candidates: Sequence[_Candidate]) -> Iterator[Made | Dropped]:
        """Let the teacher write input and output; of classification tasks the output first, for all classes occur."""
        short = Draw(max_tokens=3)
        kinds = self.desk.ask(Request(user(self._classify(one.text)), short, "classify") for one in candidates)
        kinds_ = [reply.text.strip().lower().startswith("yes") for reply in kinds]
        draw = Draw(max_tokens=self.draw.max_tokens)
        sent = [
            Request(user(_output_first(one.text) if kind else _input_first(one.text)), draw, "instances")
            for one, kind in zip(candidates, kinds_, strict=True)
        ]
        for one, kind, request, reply in zip(candidates, kinds_, sent, self.desk.ask(sent), strict=True):
            text = one.text
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
                yield self._accept(Task("", text, given, output, kind), one, request, reply)
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

    def _accept(self, task: Task, one: _Candidate, request: Request, reply: Reply) -> Made:
        name = f"grown-{len(self.grown)}"
        self.grown.append(replace(task, id=name))
        terms = {teacher.name: teacher.terms for teacher in self.desk.teachers}
        replies = [reply] if reply is one.reply else [one.reply, reply]
        style, parents = self.plan.style, one.asked.shown
        build = asked(TASK, request, replies, template=style, parents=parents, seed=self.plan.seed)
        text = f"{task.instruction}\n\n{task.input}" if task.input else task.instruction
        # Without an image the reply holds a whole example; its thought is about writing that, not about the answer.
        answer = answer_turn(replace(reply, text=task.output), thought=bool(one.images) and self.desk.keep_thoughts)
        record = Record(
            (Turn("user", (*one.images, Text(text))), answer),
            id=name,
            source=TASK,
            licence=combined([*self.licences, *(terms[reply.teacher] for reply in replies)]),
            meta={"task": TASK, "build": build | {"classification": task.classification}},
        )
        return Made(TASK, record, False)


def _more(shown: Sequence[Task], new: int, *, image: bool) -> str:
    listed = "\n".join(f"{n}. {' '.join(task.instruction.split())}" for n, task in enumerate(shown, 1))
    about = "questions about images" if image else "tasks for an assistant that reads and writes text"
    order = f"Write {new} new ones, different from these and from each other, numbered from {len(shown) + 1}."
    if image:
        order += " Ask about this image, and only what can be answered by looking at it."
    return f"These are {about}:\n\n{listed}\n\n{order} Write the list and nothing else."


def _one_call(shown: Sequence[Task], new: int) -> str:
    listed = "\n###\n".join(
        f"{n}. Instruction: {' '.join(task.instruction.split())}\n{n}. Input: {task.input or '<noinput>'}\n"
        f"{n}. Output: {task.output}"
        for n, task in enumerate(shown, 1)
    )
    return (
        f"Continue this list with {new} new tasks for an assistant that reads and writes text, numbered from "
        f"{len(shown) + 1} and in exactly this form. The verbs, the topics and the kinds of tasks differ: questions, "
        "classification, rewriting, planning, and others. An instruction has one or two sentences. An input is what "
        "it works on, at most 100 words, or <noinput> where it needs none. The output does what is asked. "
        f"Write the list and nothing else.\n\n{listed}\n###"
    )


def _input_first(text: str) -> str:
    form = "Input: (the input, or <noinput> if the task needs none)\nOutput: (the right answer)"
    return f"Task: {text}\n\nWrite one example of this task in exactly this form:\n{form}"


def _output_first(text: str) -> str:
    form = "Class label: (a possible answer)\nInput: (an input that has this answer)"
    return f"Task: {text}\n\nFor each possible answer, write one example in exactly this form:\n{form}"


def _dropped(reply: Reply, reason: str, text: str) -> Dropped:
    return Dropped(TASK, reply.id, "", reason, text[:500])
