"""The desk: asks teachers what the journal does not hold yet, keeps to the budget, and counts what it cost.

In: requests. Out: their replies, in the order of the requests. What was answered once is never asked again. The
ledger is computed from the journal, so it also counts what earlier, interrupted runs spent.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mmit.data.thoughts import split_thought
from mmit.errors import ConfigError, MmitError

if TYPE_CHECKING:
    from mmit.teachers.journal import Entry, Journal
    from mmit.teachers.request import Reply, Request, Teacher


class BudgetError(MmitError):
    """The budget is spent; the build can go on with a larger one."""

    exit_code = 3


@dataclass
class Account:
    """What one teacher did for one purpose. `unstated` counts replies whose server gave no usage."""

    requests: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    unstated: int = 0
    cost: float = 0.0

    def add(self, reply: Reply) -> None:
        """Count a reply."""
        self.requests += 1
        self.attempts += reply.attempts
        self.prompt_tokens += reply.prompt_tokens or 0
        self.new_tokens += reply.new_tokens or 0
        self.unstated += reply.prompt_tokens is None or reply.new_tokens is None
        self.cost += reply.cost or 0.0


def ledger(entries: Iterable[Entry]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return teacher -> purpose -> account, as JSON values."""
    accounts: dict[str, dict[str, Account]] = defaultdict(lambda: defaultdict(Account))
    for entry in entries:
        accounts[entry.reply.teacher][entry.purpose].add(entry.reply)
    return {name: {purpose: asdict(a) for purpose, a in held.items()} for name, held in accounts.items()}


class Desk:
    """Asks one teacher or several.

    Args:
        weights: shares of the requests by teacher; None hands them out in turn.
        budget: {"tokens", "cost", "requests"}: no further request is sent once one of them is reached; those in flight
            end. It covers everything in the journal.
        progress: called after each new reply with the number of replies that this desk has fetched, and the number when
            all that is asked now are there.
        keep_thoughts: whether records keep the thoughts of their answers; stages read it.

    Attributes:
        unrecorded: replies of lenient replays to what they do not hold. They are not journalled: a later, fuller
            recording may answer.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        journal: Journal,
        *,
        weights: Sequence[float] | None = None,
        budget: Mapping[str, float] | None = None,
        progress: Callable[[int, int], None] | None = None,
        keep_thoughts: bool = False,
    ) -> None:
        self.keep_thoughts = keep_thoughts
        self.teachers, self.journal, self.weights = list(teachers), journal, weights
        self.budget = dict(budget or {})
        self.fetched = 0
        self.unrecorded: dict[str, Reply] = {}
        self._progress = progress
        self._turn = 0
        self._tokens, self._cost = 0, 0.0
        for entry in journal.entries.values():
            self._tokens += entry.reply.tokens
            self._cost += entry.reply.cost or 0.0

    def ask(self, requests: Iterable[Request], *, teacher: Teacher | None = None) -> list[Reply]:
        """Return the replies in the order of the requests.

        Args:
            teacher: who is asked; None hands the requests out in turn, or by `weights`.

        Raises:
            BudgetError: the budget is spent. MmitError: a teacher cannot be asked. What came in before is kept.
        """
        asked = [(request, teacher or self._choose(request)) for request in requests]
        # Equal requests are sent once: `wanted` goes by what a reply is found by, the teacher and the request's
        # content.
        for one in self.teachers if teacher is None else [teacher]:
            wanted = {reply_id(one, r): r for r, chosen in asked if chosen is one}
            missing = {name: r for name, r in wanted.items() if name not in self.journal.entries}
            if missing:
                self._fetch(one, missing)
        return [self._reply(reply_id(one, request)) for request, one in asked]

    def _reply(self, name: str) -> Reply:
        entry = self.journal.entries.get(name)
        if entry is None:
            return self.unrecorded[name]
        thought, answer = split_thought(entry.reply.text)
        return replace(entry.reply, text=answer, thought=thought) if thought or not answer else entry.reply

    def _choose(self, request: Request) -> Teacher:
        if len(self.teachers) == 1:
            return self.teachers[0]
        if self.weights is None:
            self._turn += 1
            return self.teachers[(self._turn - 1) % len(self.teachers)]
        # By content, not by draw: the same request goes to the same teacher in every run.
        at = int.from_bytes(hashlib.sha256(request.digest.encode()).digest()[:8], "big") / 2**64 * sum(self.weights)
        for one, weight in zip(self.teachers, self.weights, strict=True):
            at -= weight
            if at < 0:
                return one
        return self.teachers[-1]

    def _fetch(self, teacher: Teacher, missing: Mapping[str, Request]) -> None:
        spent, total = "", self.fetched + len(missing)

        # Asked before each request and not once: what replies cost is known only when they are there.
        def feed() -> Iterator[Request]:
            nonlocal spent
            for request in missing.values():
                if spent := self._spent():
                    return
                yield request

        for request, reply in teacher.ask(feed()):
            name = reply_id(teacher, request)
            if reply.finish == "unrecorded":
                self.unrecorded[name] = replace(reply, id=name, teacher=teacher.name)
                continue
            cost = priced(reply, teacher.price)
            # On disk before anybody sees it: a build that is killed never pays for a reply twice.
            self.journal.add(request, replace(reply, id=name, teacher=teacher.name, cost=cost))
            self._tokens += reply.tokens
            self._cost += cost or 0.0
            self.fetched += 1
            if self._progress is not None:
                self._progress(self.fetched, total)
        if spent:
            left = sum(not self._has(name) for name in missing)
            problem = f"the budget is spent: {spent}; {left:,} requests are not asked yet"
            raise BudgetError(problem, where="budget", remedy="Raise it and run the same command: it goes on.")
        if lost := [r for name, r in missing.items() if not self._has(name)]:
            problem = f"{len(lost)} requests got no reply, the first for '{lost[0].purpose}'"
            raise MmitError(problem, where=teacher.name, remedy="Run the command again.")

    def _has(self, name: str) -> bool:
        return name in self.journal.entries or name in self.unrecorded

    def _spent(self) -> str:
        found = {"tokens": self._tokens, "cost": self._cost, "requests": len(self.journal.entries)}
        for key, limit in self.budget.items():
            if found[key] >= limit:
                return f"{found[key]:,.6g} of {limit:,.6g} {key}"
        return ""


def reply_id(teacher: Teacher, request: Request) -> str:
    """Return what a reply is found by in the journal: its teacher and the content of the request."""
    return hashlib.sha256(f"{teacher.identity}\0{request.digest}".encode()).hexdigest()[:32]


def priced(reply: Reply, price: Mapping[str, float]) -> float | None:
    """Return the cost of a reply, None without a price or without token counts."""
    if not price or reply.prompt_tokens is None or reply.new_tokens is None:
        return None
    return (reply.prompt_tokens * price.get("input", 0.0) + reply.new_tokens * price.get("output", 0.0)) / 1e6


def check_budget(budget: Any) -> dict[str, float]:
    """Check a budget from a config. Raises ConfigError."""
    budget = budget or {}
    if not isinstance(budget, Mapping):
        raise ConfigError("is no mapping", where="budget", remedy="Write budget: {tokens: 200000, cost: 5.0}")
    for key, value in budget.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key not in ("tokens", "cost", "requests") or not number or value <= 0:
            remedy = "Give numbers above 0 for tokens, cost or requests."
            raise ConfigError(f"{key}: {value!r}", where="budget", remedy=remedy)
    return dict(budget)
