"""The process that renders templates, from inside: one line for each request, a refusal told from a mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from mmit.data import template_child
from mmit.data.template_child import LONGEST, answer, environment

compiled = environment().from_string


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{{ word | trim }}", {"text": "hi"}),
        ("{{ raise_exception('no tools') }}", {"refusal": "no tools"}),
        ("{% if %}", {"error": "Expected an expression, got 'end of statement block'"}),
        ("{{ 1 // 0 }}", {"error": "ZeroDivisionError: integer division or modulo by zero"}),
        ("{{ [1, 2] | tojson }}{% generation %} {{ word }}{% endgeneration %}", {"text": "[1, 2]  hi "}),
        ("{{ {'b': 'ü'} | tojson }}", {"text": '{"b": "ü"}'}),
    ],
)
def test_each_request_has_one_of_three_answers(source: str, found: dict[str, str]) -> None:
    assert answer({"source": source, "variables": {"word": " hi "}}, compiled) == found


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ word.__init__ }}", "{{ x.append(1) }}"])
def test_a_template_reaches_nothing_of_the_interpreter(source: str) -> None:
    given = [1]
    found = answer({"source": source, "variables": {"word": "w", "x": given}}, compiled)
    assert given == [1] and (found.get("text") == "" or "unsafe" in found.get("error", ""))


def test_the_day_is_the_one_of_the_request() -> None:
    request = {"source": "{{ strftime_now('%d %b %Y') }}", "variables": {}, "date": "2024-07-26"}
    assert answer(request, compiled) == {"text": "26 Jul 2024"}


def test_a_text_without_end_is_an_error() -> None:
    request = {"source": f"{{{{ 'x' * {LONGEST + 1} }}}}", "variables": {}}
    assert f"{LONGEST:,} are allowed" in answer(request, compiled)["error"]


def test_it_answers_line_by_line_and_ends_with_its_input(tmp_path: Path) -> None:
    """Alone: no module of mmit is imported, so that it starts in a moment."""
    requests = [{"source": "{{ n }}", "variables": {"n": n}} for n in range(3)]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    folders = {str(Path(module.__file__ or "").parents[1]) for module in (jinja2, __import__("markupsafe"))}
    command = [sys.executable, "-I", "-S", template_child.__file__, "1", *folders]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, cwd=tmp_path, env=dict(os.environ))
    assert [json.loads(line) for line in io.BytesIO(done.stdout)] == [{"text": str(n)} for n in range(3)]
    assert done.returncode == 0, done.stderr.decode()
