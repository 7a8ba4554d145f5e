"""What all tests share: one place for the extension that DeepSpeed compiles for CPU ranks."""

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
