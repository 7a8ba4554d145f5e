"""mmit.data.template_process: templates render as in transformers, within a bound of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mmit.data import template_process
from mmit.data.chat_template import ChatTemplate
from mmit.data.template_process import Exceeded, Failed, Refused, render
from mmit.errors import ConfigError
from tests.data.small_tokenizers import byte_level

TALK = [{"role": "user", "content": "Hi <b>'\"&\n ü"}, {"role": "assistant", "content": "Ho"}]
FEATURES = """
{%- for m in messages %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {% generation %}{{ m.role | upper }}: {{ m['content'] | trim }}{% endgeneration %}
    {{- bos_token ~ eos_token }}
    {%- set box = namespace(n=0) %}{% set box.n = box.n + loop.index %}
    {{ [m, box.n, none, 1.5] | tojson }} {{ {'b': 1, 'a': 'ü'} | tojson(indent=1, sort_keys=true) }}
    {%- if tools is none and documents is none and not add_generation_prompt %} {{ word }}{% endif %}
    {{ 'é'.encode is defined }} {{ dict(a=1) }} {{ "%s" % m.role }} {{ undefined_name }}
{%- endfor %}
{{ strftime_now('%Y') }}
"""
HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "one long string": "{{ 'x' * 10 ** 10 }}",
    "width": "{{ '%5000000000d' % 1 }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "lists": "{% set n = namespace(s=1) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "a number": "{{ (9 ** (9 ** 9)) % 7 }}",
    "center": "{{ 'x' | center(9000000000) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
}


def test_as_in_transformers() -> None:
    tokenizer = byte_level()
    theirs = tokenizer.apply_chat_template(TALK, chat_template=FEATURES, tokenize=False, word="w")
    given = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": False}
    assert render(FEATURES, {"messages": TALK, "word": "w", **given}) == theirs and "Hi <b>'\"&" in theirs


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of its own that gives a template a twentieth of a second."""
    server = template_process._Server()
    monkeypatch.setattr(template_process, "_server", server)
    monkeypatch.setattr(template_process, "SECONDS", 0.05)
    yield
    server._stop()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_error(name: str, impatient: None) -> None:
    began = os.times()
    with pytest.raises(Failed) as caught:
        render(HOSTILE[name], {})
    # Processor time of a process is counted here once it has ended. This includes its start.
    assert os.times().children_user - began.children_user < 1.5
    assert len(str(caught.value)) < 300
    assert render("{{ word }}", {"word": "as ever"}) == "as ever"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_something_else_ends_or_holds_is_no_mistake_of_the_template(
    sent: signal.Signals, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = template_process._server._started

    def struck(times: list[int]) -> Any:
        def start() -> Any:
            process = started()
            monkeypatch.setattr(template_process, "PATIENCE", 0.05 if times else 20.0)
            if times:
                os.kill(process.pid, times.pop())
            return process

        return start

    monkeypatch.setattr(template_process._server, "_started", struck([sent]))
    assert render("{{ word }}", {"word": "as ever"}) == "as ever"
    monkeypatch.setattr(template_process._server, "_started", struck([sent, sent]))
    told = "ends with -9" if sent == signal.SIGKILL else "no answer for 0.05 s"
    with pytest.raises(Exceeded, match=told):
        render("{{ word }}", {"word": "as ever"})


def test_the_error_names_the_template(impatient: None) -> None:
    with pytest.raises(ConfigError, match="chat template 'evil': the template fails: it takes more than 0.05 s"):
        ChatTemplate(HOSTILE["loop"], byte_level(), where="chat template 'evil'")


def test_refusals_and_mistakes() -> None:
    with pytest.raises(Refused, match="^no system$"):
        render("{{ raise_exception('no system') }}", {})
    with pytest.raises(Failed, match="unexpected '}'"):
        render("{{ }", {})
    with pytest.raises(Failed, match="ZeroDivisionError"):
        render("{{ 1 // 0 }}", {})
    with pytest.raises(Failed, match="unsafe"):
        render("{{ ''.__class__.__mro__ }}", {})
    with pytest.raises(Failed, match="1,000,001 characters; 1,000,000 are allowed"):
        render(" " * 1_000_001, {})
    with pytest.raises(Failed, match="it writes 1,000,001 characters"):
        render("{{ 'x' * 1000001 }}", {})


def _ask(number: int) -> list[str]:
    return [render("{{ n }}", {"n": n}) for n in range(number, number + 200)]


def test_forks_have_their_own() -> None:
    _ask(0)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        answers = pool.map(_ask, range(0, 3000, 200), chunksize=1)
        assert answers == [[str(n) for n in range(first, first + 200)] for first in range(0, 3000, 200)]
    assert _ask(7)[0] == "7"


def test_it_ends_with_its_parent() -> None:
    def work(pipe: multiprocessing.connection.Connection) -> None:
        render("", {})
        process = template_process._server._process
        assert process is not None
        pipe.send(process.pid)
        time.sleep(60)

    here, there = multiprocessing.get_context("fork").Pipe()
    parent = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    parent.start()
    pid = here.recv()
    parent.kill()
    parent.join()
    for _ in range(100):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":  # waits for init, which a container may lack
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")
