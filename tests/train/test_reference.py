"""The reference of a preference method: measured once, kept, and read again for the same records alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmit.errors import CheckpointError
from mmit.train.objective import Method, Preference
from mmit.train.reference import FILE, References

VLM: Any = torch.nn.Linear(1, 1)
ENGINE: Any = None


def held(content: str = "a", records: tuple[int, ...] = (0, 0, 1)) -> Any:
    measured = SimpleNamespace(contents=[content], record=np.array(records), length=np.ones(len(records)))
    return SimpleNamespace(scan=measured, data=SimpleNamespace(compares="pairs"))


def references(data: dict[str, Any], begin: Path | None = None, *, kind: Any = "dpo") -> tuple[References, list[str]]:
    told: list[str] = []
    return References.of(Method(kind), ENGINE, data, vlm=VLM, begin=begin, say=told.append), told


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many units were measured, call by call; the numbers are those of the units."""
    calls: list[int] = []

    def measure(self: Preference, engine: Any, data: Any, units: int) -> torch.Tensor:
        calls.append(units)
        return torch.arange(2.0 * units).view(units, 2)

    monkeypatch.setattr(Preference, "measure", measure)
    return calls


def kept(folder: Path, data: dict[str, Any]) -> References:
    (folder / "trainer").mkdir()
    found, _ = references(data)
    found.write(folder)
    return found


def test_a_run_that_goes_on_reads_what_was_measured_at_its_start(tmp_path: Path, measured: list[int]) -> None:
    first = kept(tmp_path, {"train": held(), "eval": held("b", (4,))})
    assert measured == [3, 1]
    again, told = references({"train": held(), "eval": None}, tmp_path)
    assert measured == [3, 1] and told == []  # its own weights could not give these numbers any more
    reference = again.at_work("train").reference
    assert reference is not None and torch.equal(reference, first.tables["train"])
    assert again.at_work("eval").reference is None


@pytest.mark.parametrize("other", [held("c"), held(records=(0, 1, 1)), held(records=(0, 0))])
def test_other_records_or_another_order_are_refused(tmp_path: Path, measured: list[int], other: Any) -> None:
    kept(tmp_path, {"train": held()})
    with pytest.raises(CheckpointError, match="measured on other records than those of data.train"):
        references({"train": other}, tmp_path)


def test_a_checkpoint_without_a_readable_reference_is_refused(tmp_path: Path, measured: list[int]) -> None:
    kept(tmp_path, {"train": held()})
    for harm in (lambda: (tmp_path / FILE).write_bytes(b"x" * 9), (tmp_path / FILE).unlink):
        harm()
        with pytest.raises(CheckpointError, match="has no readable reference") as error:
            references({"train": held()}, tmp_path)
        assert "run.init_from" in error.value.remedy


def test_a_method_without_a_reference_measures_and_keeps_nothing(tmp_path: Path, measured: list[int]) -> None:
    found, told = references({"train": held()}, kind="orpo")
    found.write(tmp_path)
    assert (measured, told, found.tables, list(tmp_path.iterdir())) == ([], [], {}, [])
