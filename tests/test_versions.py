"""The tested range of versions is one range: in pyproject.toml, in the code, and in the lowest environment."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mmit.versions import TESTED, outside

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_table_is_that_of_pyproject(pyproject: dict[str, Any]) -> None:
    assert {name: tuple(ends) for name, ends in pyproject["tool"]["mmit"]["tested"].items()} == TESTED
    assert pyproject["project"]["requires-python"] == f">={TESTED['python'][0]}"
    stated = [text.rpartition(" ")[2] for text in pyproject["project"]["classifiers"] if "Python ::" in text]
    assert (stated[0], stated[-1]) == TESTED["python"]


def test_data_that_may_not_be_used_commercially_come_with_their_own_extra_alone(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"] | {"": pyproject["project"]["dependencies"]}
    assert [name for name, needs in extras.items() if any("elpv" in need for need in needs)] == ["elpv"]


def test_the_lowest_environment_holds_the_lower_bounds(pyproject: dict[str, Any]) -> None:
    """Of everything that is needed, and of the extras that the default tests use."""
    extras = pyproject["project"]["optional-dependencies"]
    named = [*pyproject["project"]["dependencies"], *extras["deepspeed"], *extras["gguf"], *extras["parquet"]]
    named += extras["serve"]
    bounds = dict(re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?", text).groups() for text in named)  # type: ignore[union-attr]
    lines = (ROOT / "tests" / "versions" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for name, bound in bounds.items():
        assert name in pinned, f"{name} is missing in lowest.txt"
        assert bound is None or pinned[name].startswith(bound), f"{name}: {pinned[name]} is not the first {bound}"
    assert all(pinned[name] == lowest for name, (lowest, _) in TESTED.items() if name != "python")


@pytest.mark.parametrize(
    "name, version, inside",
    [
        ("torch", "2.11.0", True),
        ("torch", "2.11.0+cpu", True),
        ("torch", "2.15.0", True),
        ("torch", "2.15.1", False),
        ("torch", "2.9.1", False),
        ("transformers", "5.40.0.dev0", False),
        ("python", "3.13.9", True),
        ("python", "3.14.0", False),
        ("python", "3.9.18", False),
        ("pillow", "1.0", True),
    ],
)
def test_a_version_lies_inside_or_outside(name: str, version: str, inside: bool) -> None:
    assert (outside(name, version) is None) == inside


def test_the_image_has_what_every_command_needs(pyproject: dict[str, Any]) -> None:
    """The Dockerfile names extras that there are, those of `mmit serve`, `mmit export` and the hub among them."""
    told = re.search(r"^ARG EXTRAS=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert told is not None
    extras = set(told[1].split(","))
    assert extras <= pyproject["project"]["optional-dependencies"].keys()
    assert extras >= {"deepspeed", "gguf", "hub", "parquet", "serve"}
