"""Training: `run.py` is read first, then `loop.py`; the folders hold what they call.

The package can be called: `mmit.train(model, data, ...)` is `mmit.api.train`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """Why: importing any module below makes `mmit.train` this package, whatever `mmit` had under that name before."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        """See `mmit.api.train`."""
        return import_module("mmit.api").train(*given, **options)  # by name: the front door lies above this package


sys.modules[__name__].__class__ = _Package
