"""Counts of a server in Prometheus' text format: requests, answers, tokens, times.

In: what happened, told as it happens. Out: text. Keeps no text of a request.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmit.serve.engine import Engine


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of values by the bounds they lie under."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """Count a value."""
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The lines of a histogram."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {total:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """What a server counts itself; the engine's own counts are read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()
        self.first_token, self.answer = Histogram(), Histogram()
        self.image_tokens = 0

    def request(self, route: str, status: int) -> None:
        """Count a request by its route (not by its path, which is any text) and its status."""
        with self._lock:
            self._requests[route, status] += 1

    def text(self) -> str:
        """Return the page."""
        state = self._engine.state()
        with self._lock:
            requests = sorted(self._requests.items())
        families: list[tuple[str, str, str, Iterator[str] | Sequence[str]]] = [
            (
                "mmit_requests_total",
                "counter",
                "Requests by route and status; 499: the client left.",
                [f'mmit_requests_total{{route="{r}",code="{c}"}} {count}' for (r, c), count in requests],
            ),
            (
                "mmit_answers_total",
                "counter",
                "Answers by how they ended.",
                [f'mmit_answers_total{{reason="{r}"}} {count}' for r, count in sorted(state.ended.items())],
            ),
        ]
        numbers: dict[str, tuple[str, str, float]] = {
            "mmit_running": ("gauge", "Answers being written.", state.running),
            "mmit_waiting": ("gauge", "Requests in the queue.", state.waiting),
            "mmit_remembered_bytes": (
                "gauge",
                "Keys and values of beginnings of prompts, features of images.",
                state.remembered,
            ),
            "mmit_refused_total": ("counter", "Requests that found the queue full.", state.refused),
            "mmit_prompt_tokens_total": ("counter", "Tokens of prompts.", state.prompt_tokens),
            "mmit_cached_tokens_total": ("counter", "Of them, those not computed again.", state.cached_tokens),
            "mmit_image_tokens_total": ("counter", "Of the prompts' tokens, those of images.", self.image_tokens),
            "mmit_completion_tokens_total": ("counter", "Tokens of answers.", state.new_tokens),
        }
        families += [(name, kind, told, [f"{name} {value}"]) for name, (kind, told, value) in numbers.items()]
        for name, told, histogram in (
            ("mmit_time_to_first_token_seconds", "From the queue to the first token.", self.first_token),
            ("mmit_answer_seconds", "From the queue to the end of a request's answers.", self.answer),
        ):
            families.append((name, "histogram", told, histogram.lines(name)))
        out = []
        for name, kind, told, lines in families:
            out += [f"# HELP {name} {told}", f"# TYPE {name} {kind}", *lines]
        return "\n".join(out) + "\n"
