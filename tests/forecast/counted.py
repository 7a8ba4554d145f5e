"""Forecasts for tests of anything but their FLOPs and bytes, which take most of a forecast's time."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mmit.forecast import forecast
from mmit.train.memory import estimate

BYTES, RATES = "measure_bytes", "measure_rates"


@contextmanager
def counted_once(found: dict[str, Any], names: Collection[str] = (BYTES, RATES)) -> Iterator[None]:
    """Inside, bytes and FLOPs are counted for the first forecast and kept in `found`, which all later ones use.

    `names` tells which of the two, for tests that look at the other.
    """
    counts = {(estimate, BYTES): estimate.measure_bytes, (forecast, RATES): forecast.measure_rates}

    def once(name: str, count: Any, *given: Any, **options: Any) -> Any:
        if name not in found:
            found[name] = count(*given, **options)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        for (module, name), count in counts.items():
            if name not in names:
                continue
            patch.setattr(module, name, functools.partial(once, name, count))
        yield
