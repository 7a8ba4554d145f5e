"""The page of counts: read by Prometheus' own rules, it holds what was counted."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

from mmit.serve.metrics import SECONDS, Histogram, Metrics

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="[^"\\\n]*",?)+)\})? ([0-9.e+-]+|\+Inf)')


def parsed(text: str) -> dict[tuple[str, str], float]:
    """{(name, labels): value}; each family is described before its samples, and once."""
    found: dict[tuple[str, str], float] = {}
    described: list[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            described.append(line.split(" ")[2])
        elif not line.startswith("# TYPE "):
            matched = SAMPLE.fullmatch(line)
            assert matched and matched[1].startswith(described[-1]), line
            assert (matched[1], matched[2] or "") not in found, line
            found[matched[1], matched[2] or ""] = float(matched[3])
    assert len(described) == len(set(described)) and text.endswith("\n")
    return found


def test_a_bucket_counts_all_that_is_not_above_its_bound() -> None:
    draw, histogram = random.Random(0), Histogram()
    values = [draw.expovariate(0.5) for _ in range(200)] + [*SECONDS, 1000.0]  # a value on a bound is below it
    for value in values:
        histogram.add(value)
    found = parsed("# HELP x \n" + "\n".join(histogram.lines("x")) + "\n")
    for bound in SECONDS:
        assert found["x_bucket", f'le="{bound}"'] == sum(value <= bound for value in values)
    assert found["x_bucket", 'le="+Inf"'] == found["x_count", ""] == len(values)
    assert abs(found["x_sum", ""] - sum(values)) < 1e-3


def test_the_page_holds_what_server_and_engine_counted() -> None:
    numbers = {"running": 2, "waiting": 3, "remembered": 5, "refused": 7, "prompt_tokens": 11, "cached_tokens": 13}
    state: Any = SimpleNamespace(**numbers, new_tokens=17, ended={"stop": 19, "timeout": 23})
    metrics = Metrics(SimpleNamespace(state=lambda: state))  # type: ignore[arg-type]
    for route, status in (("/v1/files", 200), ("other", 404), ("other", 404)):
        metrics.request(route, status)
    metrics.image_tokens = 29
    metrics.first_token.add(0.02)
    found = parsed(metrics.text())
    assert found["mmit_requests_total", 'route="/v1/files",code="200"'] == 1
    assert found["mmit_requests_total", 'route="other",code="404"'] == 2
    assert (found["mmit_answers_total", 'reason="stop"'], found["mmit_answers_total", 'reason="timeout"']) == (19, 23)
    names = ("running", "waiting", "remembered_bytes", "refused_total", "prompt_tokens_total", "cached_tokens_total")
    assert [found[f"mmit_{name}", ""] for name in names] == list(numbers.values())
    assert found["mmit_completion_tokens_total", ""] == 17 and found["mmit_image_tokens_total", ""] == 29
    assert found["mmit_time_to_first_token_seconds_count", ""] == 1 and found["mmit_answer_seconds_count", ""] == 0
    state.running = 0
    assert parsed(metrics.text())["mmit_running", ""] == 0  # the engine is asked each time
