"""A method of one's own: its options, what it may train, and what a checkpoint could not keep is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from mmit.errors import ModelError
from mmit.models.tuning.own import apply_own, changes_layout, read_own_options
from tests.models.tuned_models import composite, config_for, tune_plan

SPEC = "own_methods:method"


@pytest.fixture
def vlm(tmp_path: Path) -> Any:
    found, _ = composite(config_for(tmp_path, tune_plan("projector", "full")))
    found.requires_grad_(False)
    return found


def given(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    module = ModuleType("own_methods")
    module.method = method  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_methods", module)


def biases(vlm: Any, share: float = 1.0, *, layers: int) -> None:
    for name, parameter in vlm.llm.named_parameters():
        parameter.requires_grad_("norm" in name and layers > 0)


def beside(vlm: Any) -> None:
    vlm.llm.extra = nn.Linear(2, 2)


def wrapped(vlm: Any) -> None:
    """The same weights under another name, and none new."""
    layer = vlm.llm.model.layers[0]
    layer.mlp = nn.Sequential(layer.mlp.requires_grad_(True), nn.Identity())


def nothing(vlm: Any) -> None:
    pass


def replaced(vlm: Any) -> None:
    vlm.llm.model.norm.weight = nn.Parameter(torch.ones_like(vlm.llm.model.norm.weight))


def failing(vlm: Any) -> None:
    raise KeyError("q_proj")


def test_options_are_those_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, biases)
    assert read_own_options(SPEC, {"layers": 2}, where="w") == {"share": 1.0, "layers": 2}
    with pytest.raises(ModelError, match="has no option 'layer'") as caught:
        read_own_options(SPEC, {"layer": 2}, where="w")
    assert "layers" in (caught.value.remedy or "")
    with pytest.raises(ModelError, match="needs the option 'layers'"):
        read_own_options(SPEC, {}, where="w")


def test_what_it_trains_is_what_the_checkpoint_keeps(monkeypatch: pytest.MonkeyPatch, vlm: Any) -> None:
    given(monkeypatch, biases)
    apply_own(SPEC, vlm, {"layers": 1})
    trained = tuple(name for name, p in vlm.llm.named_parameters() if p.requires_grad)
    assert vlm.tuned_names["llm"] == trained and trained and changes_layout(vlm.llm) is None


@pytest.mark.parametrize(("method", "name"), [(beside, "extra.weight"), (wrapped, "model.layers.0.mlp.")])
def test_new_and_renamed_tensors_are_known(monkeypatch: pytest.MonkeyPatch, vlm: Any, method: Any, name: str) -> None:
    plain = set(vlm.llm.state_dict())
    given(monkeypatch, method)
    apply_own(SPEC, vlm, {})
    assert (changes_layout(vlm.llm) or "").startswith(name)
    assert set(vlm.llm.mmit_plain_names.values()) == plain  # each of the base's own is found again


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (nothing, "trains nothing of the LLM"),
        (replaced, "removes or replaces weights of the LLM, such as model.norm.weight"),
        (failing, "raised KeyError: 'q_proj'"),
    ],
)
def test_what_could_not_be_kept_is_refused(
    monkeypatch: pytest.MonkeyPatch, vlm: Any, method: Any, problem: str
) -> None:
    given(monkeypatch, method)
    with pytest.raises(ModelError, match=problem) as caught:
        apply_own(SPEC, vlm, {})
    assert caught.value.where == "tune.llm.mode" and caught.value.remedy
