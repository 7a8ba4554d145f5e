"""`train.deterministic`: on for the whole run, off after it, and one error for what torch cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmit.errors import ConfigError
from mmit.train.determinism import WORKSPACE, deterministic
from mmit.train.run import run
from tests.tiny_run import tiny_config


def state() -> tuple[bool, bool, bool]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fill


def test_a_run_computes_deterministically_and_leaves_torch_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    before, inside = state(), []

    def evaluate(model: object, step: int) -> dict[str, float]:
        inside.append(state())
        return {}

    assert run(tiny_config(tmp_path, train={"steps": 1, "deterministic": True}), evaluate=evaluate) == 0
    assert inside == [(True, False, False)] and state() == before


def test_off_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "whatever")
    before = state()
    with deterministic(False):
        assert state() == before


def test_a_workspace_with_which_products_are_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match=":4096:8") as error, deterministic(True):
        pass
    assert error.value.where == "train.deterministic" and not torch.are_deterministic_algorithms_enabled()


def test_what_torch_has_no_such_kernel_for_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    with pytest.raises(ConfigError, match="put_") as error, deterministic(True):
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
    assert error.value.where == "train.deterministic" and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="shapes"), deterministic(True):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
