"""A user's own parts: `my_pkg.my_mod:Name` in a config stands for what that module defines.

In: a spec, and what is needed at its place. Out: the class or function. Imports from the working directory and the
Python path, and nowhere else in mmit is a module imported because a config or a checkpoint names it. Whoever reads a
checkpoint asks `refuse_own_code` first. Refuses what does not fit its place before anything is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmit.errors import CheckpointError, ConfigError, MmitError, nearest

_SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
FORM = "my_pkg.my_mod:Name"


def is_spec(name: object) -> bool:
    """Whether a name has the form `module:Name`."""
    return isinstance(name, str) and _SPEC.fullmatch(name) is not None


@contextmanager
def calling(what: str, *, where: str, remedy: str, kind: type[MmitError]) -> Iterator[None]:
    """Around a call of a user's own part: whatever it raises becomes one error that says how it is called.

    Args:
        what: the part, as the beginning of a sentence; "" where `where` names it.
        where, remedy, kind: of the error.

    Raises:
        MmitError: of `kind`; one that the part raises itself stays as it is.
    """
    try:
        yield
    except MmitError:
        raise
    except Exception as error:
        raised = f"raised {type(error).__name__}: {error}"
        raise kind(f"{what} {raised}" if what else raised, where=where, remedy=remedy) from error


def own_object(spec: str, *, where: str, expects: str) -> Any:
    """Import what a spec names.

    Args:
        spec: `module:Name`.
        where: the config key that holds it.
        expects: what is needed there, for messages.

    Raises:
        ConfigError: there is no such module, it raises while it is imported, or it has no such name.
    """
    module_name, _, name = spec.partition(":")
    module = _module(module_name, where=where, expects=expects)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        remedy = f"{nearest(name, public)}; needed here is {expects}" if public else f"define {expects}"
        raise ConfigError(f"{_told(module)} has no '{name}'", where=where, remedy=remedy)
    return getattr(module, name)


def own_class(spec: str, base: type, *, keywords: Iterable[str], methods: Iterable[str], where: str) -> Any:
    """Import a class of the user's own.

    Args:
        spec: `module:name`. base: what it must be a subclass of.
        keywords: what its __init__ must take. methods: it must override one of these.
        where: the key of the config, for errors.

    Raises:
        ConfigError: as `own_object` does, and where the class is another.
    """
    takes = ", ".join(keywords)
    expects = f"a subclass of {base.__module__}.{base.__name__} whose __init__ takes {takes}"
    found = own_object(spec, where=where, expects=expects)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(f"{spec} is {_kind(found)}", where=where, remedy=f"needed here is {expects}")
    names = list(methods)
    if all(getattr(found, name, None) is getattr(base, name, None) for name in names):
        raise ConfigError(f"{spec} defines no {names[0]}", where=where, remedy=f"override {' or '.join(names)}")
    _takes(found, spec, positional=(), keywords=list(keywords), where=where, expects=expects)
    return found


def own_function(
    spec: str, *, positional: Sequence[str] = (), keywords: Sequence[str] = (), gives: str, where: str
) -> Any:
    """Import a callable that takes the positional and keyword arguments.

    Args:
        gives: what it returns, for messages.

    Raises:
        ConfigError: as `own_object`, and where it cannot be called like that.
    """
    expects = f"a function ({', '.join([*positional, *(f'{k}=' for k in keywords)])}) -> {gives}"
    found = own_object(spec, where=where, expects=expects)
    if not callable(found):
        raise ConfigError(f"{spec} is {_kind(found)}", where=where, remedy=f"needed here is {expects}")
    _takes(found, spec, positional=positional, keywords=keywords, where=where, expects=expects)
    return found


def own_options(function: Any, known: Iterable[str]) -> dict[str, Any]:
    """Keyword arguments of a function besides the `known` ones, with their defaults; `inspect._empty` where none is."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in named and p.name not in set(known)}


def takes_any_keyword(function: Any) -> bool:
    """Whether a function or class takes keyword arguments of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def source_hash(spec: str, *, where: str) -> str:
    """A hash of the code behind a spec: of its module's file, or of all Python files of the package it is in.

    Other modules that these import are not part of it.
    """
    module_name = spec.partition(":")[0]
    module = _module(module_name, where=where, expects="a module")
    top = sys.modules.get(module_name.partition(".")[0])
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    own = getattr(module, "__file__", None)
    if not files and own:
        files = [Path(own)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def refuse_own_code(named: Mapping[str, object], *, where: str, allowed: bool) -> None:
    """Refuse to import what a checkpoint names, unless `allowed`.

    Args:
        named: {config key: its value}; values that are no specs are passed over.
        where: the checkpoint.

    Raises:
        CheckpointError: with the specs.
    """
    found = [f"{spec} ({key})" for key, spec in named.items() if is_spec(spec)]
    if found and not allowed:
        raise CheckpointError(
            f"needs code that is not mmit's: {', '.join(found)}; loading a checkpoint imports none unasked",
            where=where,
            remedy="If you trust that code and have it here: mmit.load(..., allow_code=True), or --allow-code.",
        )


def _module(name: str, *, where: str, expects: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a file here hides no installed package
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            file = f"{name.replace('.', '/')}.py"
            raise ConfigError(
                f"there is no module '{name}'",
                where=where,
                remedy=f"put {file} into the working directory ({here}) or onto PYTHONPATH, or install its package; "
                f"needed is {expects}",
            ) from error
        raise _broken(name, error, where) from error
    except MmitError:
        raise
    except Exception as error:
        raise _broken(name, error, where) from error


def _broken(name: str, error: Exception, where: str) -> ConfigError:
    lines = [(f.f_code.co_filename, line) for f, line in _frames(error) if "importlib" not in f.f_code.co_filename]
    place = " ({}, line {})".format(*lines[-1]) if lines else ""
    problem = f"importing '{name}' raised {type(error).__name__}: {error}{place}"
    return ConfigError(problem, where=where, remedy=f"make `python -c 'import {name}'` work")


def _frames(error: BaseException) -> Iterable[tuple[Any, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _takes(
    function: Any, spec: str, *, positional: Sequence[str], keywords: Sequence[str], where: str, expects: str
) -> None:
    """Raise ConfigError unless a call with these arguments binds; options without a default are not its business."""
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
    missing = [] if any_keyword else [name for name in keywords if name not in names]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    places = [p for p in places if p.name not in keywords]
    enough = any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(places) >= len(positional)
    if missing or not enough:
        problem = f"{spec} takes no argument {', '.join(missing)}" if missing else f"{spec} takes too few arguments"
        raise ConfigError(problem, where=where, remedy=f"needed here is {expects}")


def _kind(found: object) -> str:
    return f"the class {found.__name__}" if inspect.isclass(found) else f"a {type(found).__name__}"


def _told(module: Any) -> str:
    file = getattr(module, "__file__", None)
    return f"the module '{module.__name__}'" + (f" ({file})" if file else "")
