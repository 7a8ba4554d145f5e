"""DeepSpeed's JSON: found, completed, and refused where it contradicts the config."""

from __future__ import annotations

import json

import pytest

from mmit.errors import ConfigError
from mmit.train.zero import FOLDER, complete, deepspeed_options


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.json")))
def test_every_json_of_ours_fits(name):
    stage = int(name[4])
    for precision in ("fp32", "bf16") if stage else ("fp32",):
        whole = complete(deepspeed_options(name), precision=precision, clip=1.0)
        assert whole["zero_optimization"]["stage"] == stage and whole["gradient_clipping"] == 1.0
        assert whole["bf16"]["enabled"] == (precision == "bf16")


@pytest.mark.parametrize(
    ("options", "key", "both"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping", ("0.5", "train.clip=1.0")),
        ({"bf16": {"enabled": False}}, "bf16.enabled", ("false", "train.precision=bf16")),
        ({"fp16": {"enabled": True}}, "fp16.enabled", ("true", "train.precision=bf16")),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", ("4", "1")),
        ({"train_batch_size": 32}, "train_batch_size", ("32", "rows_per_step")),
        ({"optimizer": {"type": "Lamb"}}, "optimizer", ("Lamb", "train.betas")),
    ],
)
def test_a_contradiction_names_both_values(options, key, both):
    with pytest.raises(ConfigError) as error:
        complete({"zero_optimization": {"stage": 2}, **options}, precision="bf16", clip=1.0)
    assert error.value.where == f"engine.deepspeed.{key}" and all(b in str(error.value) for b in both)


def test_what_agrees_or_is_auto_is_taken():
    auto = {"gradient_clipping": "auto", "train_batch_size": "auto"}
    auto["zero_optimization"] = {"stage": 1}
    auto["bf16"] = {"enabled": "auto", "immediate_grad_update": True}
    whole = complete(auto, precision="bf16", clip=None)
    assert whole["gradient_clipping"] == 0.0 and "train_batch_size" not in whole
    assert whole["bf16"] == {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}
    assert complete({"gradient_clipping": 1}, precision="fp32", clip=1.0)["gradient_clipping"] == 1.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_needs_a_stage_whose_state_can_be_saved(precision):
    with pytest.raises(ConfigError, match="zero1"):
        complete({}, precision=precision, clip=1.0)
    assert complete({"zero_optimization": {"stage": 1}}, precision=precision, clip=1.0)[precision]["enabled"]


def test_unknown_names_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'zero2'"):
        deepspeed_options("zer2")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        deepspeed_options(str(tmp_path / "x.json"))
    (tmp_path / "y.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="not a JSON object"):
        deepspeed_options(str(tmp_path / "y.json"))
