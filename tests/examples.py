"""How many examples property tests try: some by default, all of them in a run of the slow tests."""

from __future__ import annotations

SHARE = 5
LEAST = 20
USUAL = 100  # hypothesis's own number


def load(profile: str) -> None:
    """Load the profile `few` or `all`; it holds for properties that ask for no number too.

    No example has a time to keep to: on a busy machine the first one of a file, which imports, would miss it.
    """
    import hypothesis

    hypothesis.settings.register_profile("all", max_examples=USUAL, deadline=None)
    hypothesis.settings.register_profile("few", max_examples=_few(USUAL), deadline=None)
    hypothesis.settings.load_profile(profile)


def examples(count: int) -> int:
    """The number that the loaded profile makes of `count`."""
    import hypothesis

    return count if hypothesis.settings().max_examples >= USUAL else _few(count)


def _few(count: int) -> int:
    return max(min(count, LEAST), count // SHARE)
