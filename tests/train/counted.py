"""Forecasts for tests of anything but their FLOPs and bytes, which take most of a forecast's time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mmit.train import forecast


@contextmanager
def counted_once(found: dict[str, Any]) -> Iterator[None]:
    """Inside, FLOPs and bytes are counted for the first forecast and kept in `found`, which all later ones use."""
    counts = {name: getattr(forecast, name) for name in ("measure_bytes", "measure_rates")}

    def once(name: str, *given: Any, **options: Any) -> Any:
        if name not in found:
            found[name] = counts[name](*given, **options)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            patch.setattr(forecast, name, functools.partial(once, name))
        yield
