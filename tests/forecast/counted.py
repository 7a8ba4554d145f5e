"""Forecasts for tests of anything but their FLOPs and bytes, which take most of a forecast's time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mmit.forecast import forecast
from mmit.train.memory import estimate


@contextmanager
def counted_once(found: dict[str, Any]) -> Iterator[None]:
    """Inside, FLOPs and bytes are counted for the first forecast and kept in `found`, which all later ones use."""
    counts = {(estimate, "measure_bytes"): estimate.measure_bytes, (forecast, "measure_rates"): forecast.measure_rates}

    def once(name: str, count: Any, *given: Any, **options: Any) -> Any:
        if name not in found:
            found[name] = count(*given, **options)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        for (module, name), count in counts.items():
            patch.setattr(module, name, functools.partial(once, name, count))
        yield
