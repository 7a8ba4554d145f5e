"""Sections of a config become parts: which weights they take, and that parts fit each other from the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmit.errors import ModelError
from mmit.models.assemble import assemble, has_line_end, with_own_towers, without_weights
from tests.models.tuned_models import config_for, tune_plan

ALONE = {"kind": "timm", "name": "vit", "weights": "a.safetensors", "key_order": True, "towers": []}
FUSED = {
    "kind": "fused",
    "name": "",
    "weights": None,
    "key_order": None,
    "towers": [{"kind": "timm", "name": "one", "weights": "1.pt"}, {"kind": "hf", "name": "two", "weights": None}],
}


def test_without_weights_each_encoder_is_random_and_a_fused_whole_stays_unset() -> None:
    assert without_weights(ALONE) == {**ALONE, "weights": False, "key_order": False}
    found = without_weights(FUSED)
    assert found["weights"] is None and [tower["weights"] for tower in found["towers"]] == [False, False]
    assert FUSED["towers"][0]["weights"] == "1.pt"  # type: ignore[index]


def test_a_checkpoint_s_own_encoders_go_before_the_config_s(tmp_path: Path) -> None:
    assert with_own_towers(ALONE, tmp_path) == ALONE
    (tmp_path / "vision" / "1").mkdir(parents=True)
    own = with_own_towers(ALONE, tmp_path)
    assert own == {**ALONE, "name": str(tmp_path / "vision"), "weights": None}
    one, two = with_own_towers(FUSED, tmp_path)["towers"]
    assert one == FUSED["towers"][0] and two["name"] == str(tmp_path / "vision" / "1")  # type: ignore[index]


@pytest.mark.parametrize(
    ("fit", "tiles", "found"),
    [("any_resolution", {}, True), ("any_resolution", {"line_ends": False}, False), ("pad", {}, False)],
)
def test_only_pictures_of_any_resolution_end_their_lines(fit: str, tiles: dict[str, Any], found: bool) -> None:
    assert has_line_end({"fit": fit, "tiles": tiles}) is found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = config_for(tmp_path_factory.mktemp("m"), tune_plan("projector", "full")).model.model_dump()
    return found


def test_the_projector_starts_from_the_seed_alone(model: dict[str, Any]) -> None:
    """Whatever the other parts have drawn: a larger LLM must not move where the projector starts."""
    deeper = {**model, "llm": {**model["llm"], "random_init": {**model["llm"]["random_init"], "num_hidden_layers": 3}}}
    first, second, other = (
        dict(assemble(section, dtype=torch.float32, seed=seed)[0].projector.state_dict())  # type: ignore[union-attr]
        for section, seed in ((model, 1), (deeper, 1), (model, 2))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_empty_composite_has_the_shapes_and_no_numbers(model: dict[str, Any]) -> None:
    whole, tokens = assemble(model, dtype=torch.float32)
    empty, _ = assemble(model, dtype=torch.float32, empty=True)
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes
    assert all(p.is_meta for p in empty.parameters()) and tokens.encode("a")


def test_a_part_that_cannot_be_built_names_its_section(model: dict[str, Any]) -> None:
    for part, change in (("projector", {"kind": "mpl"}), ("vision", {"layer": 99}), ("llm", {"name": "./absent"})):
        wrong = {**model, part: {**model[part], **change, **({"random_init": None} if part == "llm" else {})}}
        with pytest.raises(ModelError) as caught:
            assemble(wrong, dtype=torch.float32)
        assert f"model.{part}" in (caught.value.where or "")
