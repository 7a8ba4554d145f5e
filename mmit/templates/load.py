"""Opens banks of templates: one by a spec that says what kind of file it is, or those that a config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmit.configs import shipped_banks
from mmit.errors import ConfigError
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


def open_banks(named: Any, folder: Path) -> list[Bank]:
    """Open the banks of a config: a shipped name, a file, a spec, or a list of these. Raises ConfigError."""
    banks = []
    for name in named if isinstance(named, list) else [named]:
        if not isinstance(name, str) or not name:
            raise ConfigError("'bank' is missing", where="bank", remedy="Name a bank: a file, or a shipped one: shapes")
        if (files := shipped_banks().get(name)) is not None:
            banks += [load(str(file)) for file in files]
        elif ":" in name:
            kind, _, rest = name.partition(":")
            banks.append(load(f"{kind}:{folder / rest}"))
        else:
            banks.append(load(str(folder / name)))
    return banks
