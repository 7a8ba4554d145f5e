"""Opens a bank of templates by a spec that says what kind of file it is."""

from __future__ import annotations

from pathlib import Path

from mmit.templates.bank import Bank, read_bank
from mmit.templates.flan import read_flan
from mmit.templates.promptsource import read_promptsource


def load(spec: str) -> Bank:
    """Open and check a bank.

    Args:
        spec: the path of a YAML file in mmit's layout, `promptsource:FILE` (or the folder that holds its
            templates.yaml), or `flan:FILE#KEY`, one key of FLAN's PATTERNS.

    Raises:
        ConfigError: the file is missing or breaks a rule.
    """
    kind, _, rest = spec.partition(":")
    if kind == "promptsource":
        bank = read_promptsource(Path(rest))
    elif kind == "flan":
        path, _, key = rest.partition("#")
        bank = read_flan(Path(path), key)
    else:
        bank = read_bank(Path(spec))
    # Published collections carry doubles (FLAN's cola-1 is its cola-4); they stay as published.
    bank.check(repeated=kind in ("promptsource", "flan"))
    return bank
