"""Every planted fault still has its place in the code; the faults themselves are run by hand, which takes long."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "mutants.py"


def test_every_fault_can_be_planted() -> None:
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None and spec.loader is not None
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    lost = [m.name for m in mutants.MUTANTS if mutants.count(m) != 1 or m.old == m.new]
    assert not lost and len(mutants.MUTANTS) >= 40
    names = [m.name for m in mutants.MUTANTS]
    assert len(set(names)) == len(names)
    for mutant in mutants.MUTANTS:
        first = mutant.tests.split()[0]
        assert (SCRIPT.parents[1] / first).exists(), mutant.name
