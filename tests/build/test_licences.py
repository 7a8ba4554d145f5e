"""Licences of built rows: all that a row is made of counts, and what is not allowed by name stops the build."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mmit.build.licences import UNKNOWN, check_allowed, check_stated, combined, terms_of
from mmit.errors import ConfigError


def test_the_terms_of_all_parts_are_joined_once_whatever_their_order() -> None:
    assert combined(["MIT", "CC-BY-4.0 AND MIT", None]) == f"CC-BY-4.0 AND {UNKNOWN} AND MIT"
    assert combined(["b AND a"]) == combined(["a", "b"]) == combined([combined(["b"]), "a"])
    assert combined([]) == combined([""]) == UNKNOWN
    assert terms_of("MIT OR GPL-3.0-only AND X") == ["(MIT OR GPL-3.0-only)", "X"]
    assert terms_of("(MIT OR X)") == ["(MIT OR X)"]


@pytest.mark.parametrize(
    ("licence", "allowed", "passes"),
    [
        ("MIT AND CC-BY-SA-4.0", None, True),
        ("CC-BY-NC-4.0", None, False),
        ("AGPL-3.0-only", None, False),
        (UNKNOWN, None, False),
        ("MIT OR GPL-3.0-only", None, True),  # a choice is met by one of its names
        ("GPL-3.0-only OR AGPL-3.0-only", None, False),
        ("MIT AND GPL-3.0-only", None, False),
        ("CC-BY-NC-4.0", ["CC-BY-NC-4.0"], True),
        ("MIT", ["CC-BY-NC-4.0"], False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only"], True),
        (UNKNOWN, [UNKNOWN], True),
    ],
)
def test_each_term_is_held_against_the_list(licence: str, allowed: Any, passes: bool) -> None:
    counts = Counter({licence: 3, "MIT": 1}) if allowed is None else Counter({licence: 3})
    if passes:
        check_allowed(counts, allowed, where="a test")
        return
    with pytest.raises(ConfigError, match=r"terms that are not allowed: .* \(3 rows\)") as error:
        check_allowed(counts, allowed, where="a test")
    assert "allow_licences: [" in error.value.remedy


def test_the_commonest_term_that_is_refused_comes_first_with_all_its_rows() -> None:
    counts = Counter({"CC-BY-NC-4.0": 2, "GPL-3.0-only AND MIT": 2, "GPL-3.0-only": 1})
    with pytest.raises(ConfigError, match=r"allowed: GPL-3.0-only \(3 rows\), CC-BY-NC-4.0 \(2 rows\)"):
        check_allowed(counts, None, where="a test")


def test_a_source_without_a_licence_is_named_before_a_record_is_made() -> None:
    check_stated({"a": "MIT"}, None)
    check_stated({"a": None}, [UNKNOWN])
    with pytest.raises(ConfigError, match="it states no licence") as error:
        check_stated({"a": "MIT", "b": " "}, None)
    assert error.value.where == "b"
