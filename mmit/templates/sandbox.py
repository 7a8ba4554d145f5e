"""A Jinja sandbox with bounds, for templates that other people wrote.

In: template text and a mapping of fields. Out: text. On top of Jinja's immutable sandbox (no private attributes, no
changes to what is passed in) every render has a budget of steps, characters and seconds, and every single operation
is bounded, so that no template can hold a process up or fill its memory. Templates cannot read files, include other
templates, or reach anything but their fields. Refuses to print what is no text: None, NaN, a list, a mapping.
"""

from __future__ import annotations

import functools
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mmit.errors import ConfigError, RecordError, nearest

MAX_CHARACTERS = 50_000  # of one rendered text
MAX_VALUE = 200_000  # characters or elements of any value in between
MAX_STEPS = 100_000  # loop rounds, calls and filters of one render
MAX_SECONDS = 0.4  # of the thread's CPU time; with compiling and a last operation it stays below one second
MAX_SOURCE = 20_000  # characters of one template
MAX_TOKENS = 4_000  # of Jinja's lexer, the blanks between them included: what compiling takes grows with them
_MAX_BITS = 4096  # of a whole number
_FIELD = re.compile(r"%%|%[-+0 ]?[0-9]{0,2}(?:\.[0-9]{1,2})?[sdif]")

_FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items join last length list lower map max min "
    "reject rejectattr replace reverse round select selectattr sort string sum title tojson trim truncate unique "
    "upper wordcount"
).split()
_GLOBALS = ("dict", "namespace", "joiner", "cycler")
_STRING_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper".split()
)


_CONTAINERS = (list, tuple, Mapping, set)
_HELPERS = (jinja2.utils.Namespace, jinja2.utils.Cycler, jinja2.utils.Joiner)


class Exceeded(Exception):
    """A template went past one of the bounds."""


class _Budget(threading.local):
    """What the render of this thread may still spend; `end` is 0 outside of a render."""

    steps = 0
    characters = 0
    end = 0.0
    rng: random.Random | None = None


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's environment, bounded. One instance serves any number of templates and threads."""

    intercepted_binops = frozenset("+ - * / // % **".split())

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, loader=None, finalize=self._printed, cache_size=0)
        self.budget = _Budget()
        known = self.filters
        self.filters = {name: self._bounded_filter(known[name]) for name in _FILTERS}
        self.filters["choice"] = self.filters["random"] = self._bounded_filter(self._choice)
        self.filters["format"] = self._bounded_filter(_format)
        self.filters["most_frequent"] = self._bounded_filter(_most_frequent)
        self.filters["join"] = self._bounded_filter(self._join)
        self.filters["replace"] = self._bounded_filter(self._replace)
        self.filters["round"] = self._bounded_filter(_round)
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"range": _range, "zip": zip}

    # ---- compiling

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded: nodes.Template = _Bounded().visit(tree)
        return bounded

    def compiled(self, source: str, *, where: str) -> Compiled:
        """Compile a template. Raises ConfigError, placed at `where`."""
        try:
            if len(source) > MAX_SOURCE:
                raise jinja2.TemplateSyntaxError(f"{len(source):,} characters, at most {MAX_SOURCE:,}", 1)
            tokens = sum(1 for _ in self.lex(source))
            if tokens > MAX_TOKENS:
                raise jinja2.TemplateSyntaxError(f"{tokens:,} tokens, at most {MAX_TOKENS:,}", 1)
            names = find_undeclared_variables(super()._parse(source, None, None))
            return Compiled(self, self.from_string(source), frozenset(names) - set(self.globals), where)
        except jinja2.TemplateSyntaxError as error:
            problem = f"the template does not compile, line {error.lineno}: {error.message}"
            raise ConfigError(problem, where=where, remedy="Fix the template.") from error
        except RecursionError as error:
            problem = "the template is nested too deeply to compile"
            raise ConfigError(problem, where=where, remedy="Simplify the template.") from error

    # ---- bounds while rendering

    def spend(self, steps: int = 1, characters: int = 0) -> None:
        """Charge the render of this thread. Raises Exceeded."""
        budget = self.budget
        if not budget.end:  # Jinja folds constants while it compiles
            return
        budget.steps -= steps
        budget.characters -= characters
        if budget.steps < 0:
            raise Exceeded(f"it takes more than {MAX_STEPS:,} steps")
        if budget.characters < 0:
            raise Exceeded(f"it writes more than {MAX_CHARACTERS:,} characters")
        if time.thread_time() > budget.end:
            raise Exceeded(f"it takes longer than {MAX_SECONDS:g} s")

    def bounded_loop(self, items: Iterable[Any], characters: int = 0) -> Iterator[Any]:
        """Yield the items of a loop, charging each round and the `characters` of text its body writes."""
        for item in items:
            self.spend(1, characters)
            yield item

    def bounded_concat(self, *values: Any) -> str:
        """Jinja's `~`."""
        for value in values:
            self._text_only(value)
        self._check_size(sum(len(v) if isinstance(v, str) else 20 for v in values))
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One arithmetic operation of a template; Jinja's interface.

        Args:
            context: of the template.
            operator: its sign, such as "+" or "**".
            left, right: its operands.

        Raises:
            Exceeded: the result would be out of bounds.
        """
        self.spend()
        sizes = [len(v) for v in (left, right) if isinstance(v, Sized)]
        if operator == "%" and isinstance(left, str):
            raise Exceeded("'%' on text is not supported; write the text and the value one after the other")
        if operator == "*" and sizes:
            times = [v for v in (left, right) if isinstance(v, int)]
            self._check_size(sizes[0] * max([1, *times]))
        elif sizes:
            self._check_size(sum(sizes))
        if operator == "**" and not (abs(left) <= 1e9 and abs(right) <= 64):
            raise Exceeded(f"the power {left} ** {right} is out of bounds")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > _MAX_BITS:
            raise Exceeded("a whole number grows out of bounds")
        return self.weighed(result)

    def call(self, context: Any, callee: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls: macros, methods of its values, the few global functions; Jinja's interface.

        Args:
            context: of the template.
            callee: what is called.
            args, kwargs: what it is called with.

        Raises:
            Exceeded: a text method that is not among those supported, or a result that is out of bounds.
        """
        self.spend()
        owner = getattr(callee, "__self__", None)
        if isinstance(owner, (str, bytes)):
            name = getattr(callee, "__name__", "")
            if name not in _STRING_METHODS:
                raise Exceeded(f"the text method '{name}' is not supported; {nearest(name, sorted(_STRING_METHODS))}")
            if name == "join":
                return self._join(args[0], str(owner))
            if name == "replace":
                return self._replace(owner, *args)
        return self.weighed(super().call(context, callee, *args, **kwargs))

    def weighed(self, value: Any) -> Any:
        """Refuse a value that holds too many others, counting each as often as it is held.

        A list that holds one list twice, and so on, is small in memory and endless to whoever walks through it. Such
        values can only grow where a list, a tuple or a mapping is made, and all of these places are weighed.
        """
        if not isinstance(value, _CONTAINERS):
            return value
        size = 0
        waiting: list[Any] = [value]
        while waiting:
            held = waiting.pop()
            inside = [*held, *held.values()] if isinstance(held, Mapping) else held
            size += len(held) + sum(len(v) for v in inside if isinstance(v, str))
            self._check_size(size)
            self.spend(1 + len(held) // 100)
            waiting += [v for v in inside if isinstance(v, _CONTAINERS)]
        return value

    def wrap_str_format(self, value: Any) -> Any:
        """Refuse str.format, which Jinja would otherwise run whole, widths of a gigabyte included."""
        if isinstance(getattr(value, "__self__", None), str) and value.__name__ in ("format", "format_map"):
            raise Exceeded("the text method 'format' is not supported; use the filter: '%s'|format(x)")
        return super().wrap_str_format(value)

    def _bounded_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Filters that want the context or environment get it before the value.
        at = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self._walked(v) if i == at else v for i, v in enumerate(args))
            result = function(*args, **kwargs)
            return self._walked(result)

        return bounded

    def _walked(self, value: Any) -> Any:
        if isinstance(value, _HELPERS):
            raise Exceeded(f"a filter takes values, here is a {type(value).__name__.lower()}")
        self.weighed(value)
        if isinstance(value, Sized) and not isinstance(value, jinja2.Undefined):
            self._check_size(len(value))
            self.spend(1 + (len(value) // 100 if isinstance(value, str) else len(value)))
            return value
        return self.bounded_loop(value) if isinstance(value, Iterator) else value

    def _check_size(self, size: int) -> None:
        if size > MAX_VALUE:
            raise Exceeded(f"a value grows to {size:,} characters or elements, at most {MAX_VALUE:,}")

    def _printed(self, value: Any) -> Any:
        if isinstance(value, str):
            self.spend(0, len(value))
            return value
        self._text_only(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise Exceeded("it prints a number that is not finite")
        if not isinstance(value, jinja2.Undefined):  # which raises when it is printed
            self.spend(0, len(str(value)))
        return value

    def _text_only(self, value: Any) -> None:
        if value is None or isinstance(value, (*_CONTAINERS, *_HELPERS)):
            raise Exceeded(f"it prints a {'null' if value is None else type(value).__name__}, which is no text")

    # ---- filters

    @jinja2.pass_context  # or Jinja would draw once, while it compiles
    def _choice(self, context: jinja2.runtime.Context, items: Sequence[Any]) -> Any:
        """PromptSource's random choice; here from the render's own generator."""
        if not items:
            raise Exceeded("'choice' has nothing to choose from")
        rng = self.budget.rng
        return items[0] if rng is None else rng.choice(list(items))

    def _join(self, items: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
        parts = []
        size = 0
        for item in items:
            if attribute is not None:
                item = self.getitem(item, attribute)
            if not isinstance(item, (str, int, float)):
                raise Exceeded(f"'join' joins texts and numbers, here is a {type(item).__name__}")
            parts.append(str(item))
            size += len(parts[-1]) + len(separator)
            self._check_size(size)
        return str(separator).join(parts)

    def _replace(self, given: Any, old: str, new: str, count: int = -1) -> str:
        text = str(given)
        self._check_size(len(text) + text.count(old) * max(0, len(str(new)) - len(old)))
        return text.replace(old, str(new), count)


class Compiled:
    """A template ready to be rendered. `names` are the fields it reads."""

    def __init__(self, sandbox: Sandbox, template: jinja2.Template, names: frozenset[str], where: str) -> None:
        self._sandbox, self._template = sandbox, template
        self.names, self.where = names, where

    def render(self, fields: Mapping[str, Any], *, rng: random.Random | None = None, row: str = "") -> str:
        """Return the text for these fields; `rng` is what the filter `choice` draws from.

        Raises RecordError, naming `row` and the template, where the fields do not suit the template.
        """
        budget = self._sandbox.budget
        budget.steps, budget.characters = MAX_STEPS, MAX_CHARACTERS
        # This thread's own time: a busy machine must not decide what a template gives.
        budget.end, budget.rng = time.thread_time() + MAX_SECONDS, rng
        try:
            return self._template.render(fields)
        except jinja2.UndefinedError as error:
            self._undefined(error, fields, row)
        except (Exceeded, jinja2.TemplateError) as error:
            self._fail(str(error), row, error)
        except RecursionError as error:
            self._fail("it calls itself without end", row, error)
        except Exception as error:  # noqa: BLE001 - a template can raise anything; it reaches the user as one error
            self._fail(f"{type(error).__name__}: {error}", row, error)
        finally:
            budget.end, budget.rng = 0.0, None

    def _undefined(self, error: Exception, fields: Mapping[str, Any], row: str) -> NoReturn:
        missing = sorted(self.names - set(fields))
        if missing:
            problem = f"there is no field '{missing[0]}'"
            self._fail(problem, row, error, remedy=nearest(missing[0], sorted(fields)))
        self._fail(str(error), row, error)

    def _fail(
        self, problem: str, row: str, error: BaseException, *, remedy: str = "Fix the template or the row."
    ) -> NoReturn:
        where = f"{row}, template {self.where}" if row else f"template {self.where}"
        raise RecordError(problem[:300], where=where, remedy=remedy) from error


class _Bounded(NodeTransformer):
    """Puts the budget into loops and `~`, and refuses what would read other templates."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        items = [node.iter, nodes.Const(written)]
        node.iter = nodes.Call(nodes.EnvironmentAttribute("bounded_loop"), items, [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("bounded_concat"), node.nodes, [], None, None, lineno=node.lineno)

    def _weighed(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # the names that a loop or a set fills
            return node
        return nodes.Call(nodes.EnvironmentAttribute("weighed"), [node], [], None, None, lineno=node.lineno)

    visit_List = visit_Tuple = visit_Dict = _weighed

    def _refuse(self, node: nodes.Node) -> NoReturn:
        what = type(node).__name__.lower()
        raise jinja2.TemplateSyntaxError(f"'{what}' is not supported: a template stands for itself", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_Block = _refuse


def _range(*arguments: int) -> range:
    numbers = range(*arguments)
    if len(numbers) > 10_000:
        raise Exceeded(f"range of {len(numbers):,} numbers, at most 10,000")
    return numbers


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if not -15 <= precision <= 15:
        raise Exceeded(f"round to {precision} places")
    if method not in ("common", "ceil", "floor"):
        raise Exceeded(f"round method '{method}'")
    if method == "common":
        return round(value, precision)
    function = math.ceil if method == "ceil" else math.floor
    return float(function(value * 10**precision) / 10**precision)


def _format(text: str, *values: Any) -> str:
    """Jinja's filter: `"%.2f"|format(x)`; widths of at most two digits."""
    fields = [found for found in _FIELD.findall(text) if found != "%%"]
    if _FIELD.sub("", text).count("%") or len(fields) != len(values):
        raise Exceeded("'format' takes one value for each of its fields %s, %d or %.2f")
    return text % values


def _most_frequent(items: Iterable[Any]) -> list[Any]:
    """PromptSource's filter: the items that are there most often."""
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]]
