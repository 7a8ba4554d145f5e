"""DeepSpeed's JSON: found, completed, and refused where it contradicts the config."""

from __future__ import annotations

import json

import pytest

from mmit.configs import shipped
from mmit.errors import ConfigError
from mmit.train.engines.zero import ELSEWHERE, complete, deepspeed_options


@pytest.mark.parametrize("name", sorted(shipped("deepspeed")))
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
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow", ("false", "finite gradient")),
        ({"fp16": {"enabled": True}}, "fp16.enabled", ("true", "train.precision=bf16")),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", ("4", "1")),
        ({"train_batch_size": 32}, "train_batch_size", ("32", "rows_per_step")),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", ("8", "1")),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer", ("true", "false")),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer", ("false", "true")),
        ({"optimizer": {"type": "Lamb"}}, "optimizer", ("Lamb", "train.betas")),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", ("WarmupLR", "train.schedule")),
        ({"amp": {"enabled": True}}, "amp", ("enabled", "train.precision")),
        ({"activation_checkpointing": {"x": 1}}, "activation_checkpointing", ("x", "train.checkpointing")),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning", ("enabled", "data.mixing")),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency", ("enabled", "data.mixing")),
        ({"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop", ("enabled", "model")),
        ({"compression_training": {"x": 1}}, "compression_training", ("x", "tune")),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", ("2", "ranks")),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size", ("2", "ranks")),
        ({"pipeline": {"stages": 2}}, "pipeline", ("2", "ranks")),
        ({"gradient_cliping": 1.0}, "gradient_cliping", ("no such key", "gradient_clipping")),
    ],
)
def test_a_contradiction_names_both_values(options, key, both):
    with pytest.raises(ConfigError) as error:
        complete({"zero_optimization": {"stage": 2}, **options}, precision="bf16", clip=1.0)
    assert error.value.where == f"engine.deepspeed.{key}" and all(b in str(error.value) for b in both)


def test_a_norm_that_is_switched_off_is_refused():
    with pytest.raises(ConfigError, match="norm of every step") as error:
        complete({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, precision="bf16", clip=None)
    assert error.value.where == "engine.deepspeed.zero_optimization.compute_grad_norm"


def test_every_value_that_mmit_decides_is_in_the_list_above():
    tried = {key for _, key, _ in test_a_contradiction_names_both_values.pytestmark[0].args[1]}
    assert tried >= set(ELSEWHERE)


def test_what_agrees_or_is_auto_is_taken():
    auto = {"gradient_clipping": "auto", "train_batch_size": "auto"}
    auto["zero_optimization"] = {"stage": 1}
    auto["bf16"] = {"enabled": "auto", "immediate_grad_update": True}
    whole = complete(auto, precision="bf16", clip=None)
    assert whole["gradient_clipping"] == 0.0 and "train_batch_size" not in whole
    assert whole["bf16"] == {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}
    assert complete({"gradient_clipping": 1}, precision="fp32", clip=1.0)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("given", "trained", "size"),
    [
        ({}, 3_000_001, 3 << 20),
        ({"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}, 1, 1 << 20),
        ({}, 7_000_000_000, 500_000_000),
        ({"reduce_bucket_size": 12345}, 1, 12345),
    ],
)
def test_the_bucket_is_no_larger_than_what_is_trained_and_the_users_own_wins(given, trained, size):
    for stage in (1, 2, 3):
        whole = complete({"zero_optimization": {"stage": stage, **given}}, precision="bf16", clip=1.0, trained=trained)
        assert whole["zero_optimization"] == {"stage": stage, "reduce_bucket_size": size}


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
