"""Versions of the libraries that decide results most: the lowest and the newest the default tests run on.

On Python 3.13 it was a part of them: data formats, commands and runs.

The same table stands in pyproject.toml under [tool.mmit.tested]; a test holds them equal. Refuses nothing: a newer
version may work, and `mmit env` says that it was not tried.
"""

from __future__ import annotations

import re

TESTED = {
    "python": ("3.10", "3.13"),
    "torch": ("2.11.0", "2.15.0"),
    "transformers": ("5.17.0", "5.24.0"),
    "peft": ("0.18.0", "0.21.2"),
    "deepspeed": ("0.19.0", "0.19.8"),
}


def outside(name: str, version: str) -> str | None:
    """Where a version lies outside the tested range, the range in words; None inside it, or for another package."""
    if name not in TESTED:
        return None
    lowest, newest = TESTED[name]
    depth = len(_numbers(newest))  # 3.13.2 is a 3.13
    if _numbers(lowest) <= _numbers(version) and _numbers(version)[:depth] <= _numbers(newest):
        return None
    return f"outside the tested {lowest} to {newest}"


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version, "2.11.0+cpu" or "3.14.0rc1" alike; shorter ones count as continued by zeros."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
