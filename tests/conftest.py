"""What all tests share: places for the extension that DeepSpeed compiles for CPU ranks, and for what data was found."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest
import typer.testing

# typer builds the commands of the whole tree again at every invoke; one build serves all tests.
typer.testing._get_command = functools.cache(typer.testing._get_command)


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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is found out about data in a folder of this session, not in the user's."""
    before = os.environ.get("MMIT_CACHE")
    os.environ["MMIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MMIT_CACHE"]
    else:
        os.environ["MMIT_CACHE"] = before
