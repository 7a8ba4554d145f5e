"""What a card says of licences and sizes, in the words of the hub; the card as a whole: tests/cli/test_data_card.py."""

from __future__ import annotations

import pytest

from mmit.build.card import hub_licences, size_category


@pytest.mark.parametrize(
    ("expression", "ids"),
    [
        ("Apache-2.0", ["apache-2.0"]),
        ("GPL-3.0-or-later AND LicenseRef-unknown", ["gpl-3.0", "unknown"]),
        ("(MIT OR GPL-2.0-only)", ["other"]),
        ("LicenseRef-mine", ["other"]),
    ],
)
def test_licences_become_the_hubs(expression: str, ids: list[str]) -> None:
    assert hub_licences([expression]) == ids


def test_sizes_are_the_hubs() -> None:
    sizes = {999: "n<1K", 1000: "1K<n<10K", 99_999: "10K<n<100K", 10**6: "1M<n<10M", 10**9: "n>1B"}
    assert {n: size_category(n) for n in sizes} == sizes
