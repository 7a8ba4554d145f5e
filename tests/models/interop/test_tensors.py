"""Tensors of foreign folders: every shard is read, every key is claimed once, and what does not fit is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmit.errors import ModelError
from mmit.models.interop.tensors import complain, fill_module, folder_tensors, split_by_prefix

PARTS = {"a": torch.zeros(2), "b": torch.ones(3), "c": torch.full((1,), 2.0)}


def sharded(folder: Path, kind: str = "safetensors") -> Path:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    places = {"a": f"{stem}-1.{kind}", "b": f"{stem}-2.{kind}", "c": f"{stem}-1.{kind}"}
    for name in set(places.values()):
        own = {key: PARTS[key] for key in places if places[key] == name}
        save_file(own, folder / name) if kind == "safetensors" else torch.save(own, folder / name)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_and_shards_hold_the_same(tmp_path: Path, kind: str) -> None:
    found = folder_tensors(sharded(tmp_path, kind))
    assert found.keys() == PARTS.keys() and all(torch.equal(found[k], PARTS[k]) for k in PARTS)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")  # one safe file goes before shards of either kind
    assert folder_tensors(tmp_path).keys() == {"a"}


def test_a_folder_that_is_not_whole_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights") as none:
        folder_tensors(tmp_path)
    assert "model.safetensors.index.json" in (none.value.remedy or "")
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for name in ("model-9.safetensors", "../model-1.safetensors", "/etc/hostname"):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "d": name}}))
        with pytest.raises(ModelError, match="which is not there"):
            folder_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "d": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"1 missing: d\)"):
        folder_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        folder_tensors(tmp_path)


def test_the_first_prefix_that_fits_takes_a_key() -> None:
    given = {"model.tower.x": PARTS["a"], "model.y": PARTS["b"], "head": PARTS["c"]}
    prefixes = [
        ("model.tower.", "vision", ""),
        ("model.", "llm", "model."),
        ("head", "llm", "lm_head"),
        ("no", "p", ""),
    ]
    parts = split_by_prefix(given, prefixes, where="w")
    assert {part: list(tensors) for part, tensors in parts.items()} == {
        "vision": ["x"], "llm": ["model.y", "lm_head"], "p": []
    }  # fmt: skip
    with pytest.raises(ModelError, match="1 left over: head"):
        split_by_prefix(given, prefixes[:2], where="w")


def test_a_module_is_filled_by_names_and_shapes_that_are_exactly_its_own() -> None:
    module, given = nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    fill_module(module, given, where="w")
    assert all((p == 1).all() for p in module.parameters())
    wrong = {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)}
    with pytest.raises(ModelError) as caught:
        fill_module(module, wrong, where="w")
    told = caught.value.problem
    assert "1 missing: bias" in told and "1 left over: extra" in told
    assert "weight (2, 2) instead of (3, 2)" in told and (module.weight == 1).all()


def test_long_lists_are_cut_and_nothing_to_tell_is_no_error() -> None:
    complain("fine", missing=[], where="w")
    with pytest.raises(ModelError, match=r"9 missing: k0, .*k7, \.\.\.\)"):
        complain("bad", missing=[f"k{n}" for n in range(9)], where="w")
