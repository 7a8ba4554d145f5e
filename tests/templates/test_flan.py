"""FLAN's patterns: parsed from a Python file that is never run."""

from __future__ import annotations

import pytest

from mmit.errors import ConfigError
from mmit.templates import load
from mmit.templates.flan import read_patterns

FLAN = """
import os
PATTERNS = {
    "sum": [("{text}\\n\\nSum it up {{briefly}}.", "{summary}"), ("Sum: {text}", "{summary}"),
            ("Write a text about: {summary}", "{text}")],
}
COMPUTED = {k: v for k, v in PATTERNS.items()}
os.system("exit 1")
"""


def test_flan_patterns_are_parsed_and_never_run(tmp_path):
    path = tmp_path / "templates.py"
    path.write_text(FLAN)
    patterns, skipped = read_patterns(path)
    assert len(patterns["sum"]) == 3 and list(skipped) == ["COMPUTED"]
    bank = load(f"flan:{path}#sum")
    assert [t.inverted for t in bank.templates] == [False, False, True]
    assert bank.templates[0].names == {"text", "summary"}
    with pytest.raises(ConfigError, match=r"no patterns for 'summ'(.|\n)*'sum'"):
        load(f"flan:{path}#summ")
    path.write_text("PATTERNS = make()")
    with pytest.raises(ConfigError, match="has no literal mapping 'PATTERNS'"):
        load(f"flan:{path}#sum")
