"""A run that starts from another's weights: what does not fit is named, what differs is told."""

from __future__ import annotations

import os

import pytest

from mmit.errors import CheckpointError, ConfigError
from mmit.train.run import run
from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    assert run(tiny_config(folder, train={"steps": 1, "rows_per_step": 2, "precision": "fp32"})) == 0
    return folder


def later(earlier, tmp_path, **sections):
    for part in ("data", "tokenizer", "vision"):
        if not (tmp_path / part).exists():
            os.symlink(earlier / part, tmp_path / part)
    place = {"dir": str(tmp_path / "run"), "init_from": str(earlier / "run")}
    return tiny_config(tmp_path, run=place, train={"steps": 1, "rows_per_step": 2, "precision": "fp32"}, **sections)


def model(earlier, **parts):
    return {**tiny_config(earlier).model.model_dump(), **parts}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"projector": {"kind": "linear", "options": {}}}}, "projector is mlp, this config's is linear"),
        ({"model": {"vision": None}}, "vision is .*, this config's is none"),
        ({"tune": {"llm": {"mode": "full", "lr": 1e-3}}}, "adapter around the LLM .*mode 'full' cannot go on"),
        ({"tune": {"llm": {"mode": "ia3", "lr": 1e-3}}}, "mode 'ia3' cannot go on"),
    ],
)
def test_a_part_that_cannot_be_meant_is_named_before_loading(earlier, tmp_path, change, told):
    if "model" in change:
        change = {"model": model(earlier, **change["model"])}
    with pytest.raises(ConfigError, match=told) as error:
        run(later(earlier, tmp_path, **change))
    assert "run.init_from" in error.value.where and error.value.remedy


def test_another_size_is_told_and_then_refused_with_the_tensor(earlier, tmp_path, capsys):
    changed = model(earlier, projector={"kind": "mlp", "options": {"depth": 3}})
    with pytest.raises(CheckpointError, match="projector.safetensors: does not fit the model"):
        run(later(earlier, tmp_path, model=changed))
    assert "model.projector.options was {'depth': 2} there and is {'depth': 3} here" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_fits_starts(earlier, tmp_path):
    assert run(later(earlier, tmp_path)) == 0
