"""What all tests share: places for the extension that DeepSpeed compiles for CPU ranks, and for what data was found."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import typer.testing

# typer builds the commands of the whole tree again at every invoke; one build serves all tests.
typer.testing._get_command = functools.cache(typer.testing._get_command)
# PEFT compiles the template of its model card at every save; what jinja2 shares among templates is compiled once.
_compile = jinja2.Environment.compile
_compile_once = functools.cache(_compile)


def _compiled(self: jinja2.Environment, source: Any, *args: Any, **kwargs: Any) -> Any:
    once = self.shared and isinstance(source, str)
    return (_compile_once if once else _compile)(self, source, *args, **kwargs)


jinja2.Environment.compile = _compiled  # type: ignore[method-assign]
# Where there is no device, torch looks for the driver's library again at every operation on fake tensors.
if not (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()):
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def _own_extension_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile torch extensions into a folder of this session.

    torch waits without end for the lock of a compilation that was killed, and the default folder outlives a session.
    """
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))
    yield
    if before is None:
        del os.environ["TORCH_EXTENSIONS_DIR"]
    else:
        os.environ["TORCH_EXTENSIONS_DIR"] = before


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is found out about data in a folder of this file of tests, not in the user's.

    A dry run links all of it into a folder of its own, so it should stay small.
    """
    before = os.environ.get("MMIT_CACHE")
    os.environ["MMIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MMIT_CACHE"]
    else:
        os.environ["MMIT_CACHE"] = before
