"""The process that renders chat templates: `template_child.py SECONDS FOLDER ...`, the folders jinja2 is in.

In: a line of JSON for each rendering, {"source": Jinja, "variables": {...}, "date": ISO or null}. Out: a line
{"text": ...}, or {"refusal": ...} for a template's own raise_exception, or {"error": ...}. It bounds its memory
and the processor time of each rendering, and dies when it exceeds them; `template_process` starts it, sees it die, and
gives the error. Nothing of mmit is imported, so that it starts in a moment. The environment is that of transformers
(utils/chat_template_utils.py), which a test compares.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

MEMORY = 1 << 29  # bytes: an interpreter with Jinja has 50 MB
LONGEST = 1_000_000  # characters


def environment() -> Any:
    """Return the Jinja environment that transformers renders chat templates in."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the answers; what it encloses is rendered as it stands."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, jinja2.ext.loopcontrols]
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


def answer(request: dict[str, Any], compiled: Any) -> dict[str, str]:
    """Render one request."""
    import jinja2

    try:
        variables = request["variables"]
        if request.get("date") is not None:  # a frozen day instead of the clock
            # Under the name of the global that reads the clock: a variable of the same name goes before it.
            variables = {"strftime_now": datetime.fromisoformat(request["date"]).strftime, **variables}
        text = compiled(request["source"]).render(**variables)
    except jinja2.TemplateError as error:
        # The class itself is what raise_exception() in a template raises.
        return {"refusal" if type(error) is jinja2.TemplateError else "error": str(error)}
    except Exception as error:  # noqa: BLE001 - a template can raise anything, and it must become one clear error
        return {"error": f"{type(error).__name__}: {error}"}
    # Known limit: the text is made before it is measured; what it may take meanwhile is bounded by MEMORY.
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text):,} characters; {LONGEST:,} are allowed"}
    return {"text": text}


def main() -> None:
    """Answer requests until stdin ends, which it does when the parent dies."""
    seconds, sys.path[:0] = float(sys.argv[1]), sys.argv[2:]
    # One process serves every template of a run, and a template is rendered hundreds of times while its form is found
    # out.
    compiled = lru_cache(maxsize=64)(environment().from_string)
    # A process that is ended by its limits must not leave a core file of half a gigabyte behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # not every system bounds the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin.buffer:
        # SIGPROF has no handler, so that it ends the process inside a long call of C code too.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        sys.stdout.write(json.dumps(answer(json.loads(line), compiled)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
