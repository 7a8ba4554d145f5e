"""DeepSpeed's JSON: found by name, checked against what mmit fills in, completed.

Owns the agreement between a DeepSpeed config and the training config. A value that only mmit may decide can be left
out, be "auto", or be equal to mmit's own; anything else is refused with both values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmit.configs import moved, shipped
from mmit.errors import ConfigError, nearest

BUCKET = 500_000_000  # DeepSpeed's own reduce_bucket_size, in elements
BUCKET_STEP = 1 << 20
WHERE = "engine.deepspeed"
# What the config decides, or mmit itself, and a DeepSpeed JSON may not: key -> who does.
ELSEWHERE = {
    "train_batch_size": "train.rows_per_step",
    "optimizer": "train.betas, train.eps and tune.*.lr",
    "scheduler": "train.schedule and train.warmup",
    "amp": "train.precision",
    "activation_checkpointing": "train.checkpointing",
    "curriculum_learning": "the order of the data (data.mixing, run.seed)",
    "data_efficiency": "the order of the data (data.mixing, run.seed)",
    "progressive_layer_drop": "the model, which runs whole",
    "compression_training": "tune.*",
    "tensor_parallel": "its ranks, which share data and ZeRO's partitions only",
    "sequence_parallel_size": "its ranks, which share data and ZeRO's partitions only",
    "pipeline": "its ranks, which share data and ZeRO's partitions only",
}
# Further sections and keys that DeepSpeed reads at the top of its JSON (docs/_pages/config-json.md there).
KNOWN = (
    "aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile csv_monitor data_types "
    "disable_allgather dump_state elasticity flops_profiler fp16 fp32_allreduce gradient_accumulation_steps "
    "gradient_clipping gradient_predivide_factor hybrid_engine keep_fp32_modules memory_breakdown nebula "
    "prescale_gradients seq_parallel_communication_data_type sparse_gradients steps_per_print tensorboard timers "
    "torch_autocast train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb "
    "weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"
).split()


def deepspeed_options(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: the name of one in mmit/configs/deepspeed or a path. Raises ConfigError."""
    names = shipped("deepspeed")
    path = moved("deepspeed", name) if name.endswith(".json") else names.get(name, Path(name))
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no DeepSpeed config '{name}'", where=WHERE, remedy=f"give the path of a JSON; {nearest(name, names)}"
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"is not JSON: {error}", where=str(path), remedy="fix the file") from None
    if not isinstance(options, dict):
        raise ConfigError("is not a JSON object", where=str(path), remedy="fix the file")
    return options


def zero_stage(options: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    stage = (options.get("zero_optimization") or {}).get("stage", 0)
    return 0 if stage == "auto" else int(stage)


def bucket_size(trained: int) -> int:
    """`reduce_bucket_size` where the JSON leaves it out: DeepSpeed's own, or what all gradients fill if that is less.

    Every rank allocates that many elements, 1 to 2 GB by default, though an adapter's gradients fill a hundredth.
    """
    return min(BUCKET, -(-trained // BUCKET_STEP) * BUCKET_STEP)


def complete(
    options: Mapping[str, Any], *, precision: str, clip: float | None, trained: int | None = None
) -> dict[str, Any]:
    """The whole DeepSpeed config, with all that mmit decides.

    Args:
        options: the JSON; what is "auto" among the options of ZeRO has DeepSpeed's default.
        precision, clip: of the training config.
        trained: number of trained elements, None where it is not known yet.

    Raises:
        ConfigError: a key that DeepSpeed does not have, or a value that contradicts the training config.
    """
    mine: dict[str, tuple[Any, str]] = {
        "bf16.enabled": (precision == "bf16", f"train.precision={precision}"),
        "fp16.enabled": (precision == "fp16", f"train.precision={precision}"),
        "gradient_clipping": (clip or 0.0, f"train.clip={clip}"),
        "train_micro_batch_size_per_gpu": (1, "a packed micro-batch, which is one sequence to DeepSpeed"),
        "gradient_accumulation_steps": (1, "mmit's loop, which accumulates itself"),
        "zero_allow_untested_optimizer": (True, "its own AdamW, which DeepSpeed does not know"),
        # torch's fused AdamW runs on CPUs without a compiler
        "zero_force_ds_cpu_optimizer": (False, "its own AdamW, also under offload"),
    }
    if precision == "bf16":
        mine["bf16.check_grad_overflow"] = (True, "its loop, which skips a step without a finite gradient")
    _refuse_keys(options)
    whole = _agreed(options, mine)
    stage = zero_stage(whole)
    # "auto" is what Hugging Face's Trainer fills in: left out here, DeepSpeed's own defaults hold.
    if isinstance(whole.get("zero_optimization"), Mapping):
        zero = {k: v for k, v in whole["zero_optimization"].items() if v != "auto"}
        if zero.get("compute_grad_norm") is False:  # without it every step would pass for one that is not finite
            raise ConfigError(
                "compute_grad_norm is false, but mmit reads the norm of every step",
                where=f"{WHERE}.zero_optimization.compute_grad_norm",
                remedy="remove it from the DeepSpeed JSON",
            )
        if trained is not None and stage:
            zero.setdefault("reduce_bucket_size", bucket_size(trained))
        whole["zero_optimization"] = zero
    if precision != "fp32" and stage == 0:
        raise ConfigError(
            f"DeepSpeed's ZeRO-0 does not sum {precision} gradients in float32, or keeps a state mmit cannot save",
            where=WHERE,
            remedy="set engine.deepspeed=zero1, which computes the same, or train.precision=fp32",
        )
    return whole


def _refuse_keys(options: Mapping[str, Any]) -> None:
    # DeepSpeed ignores a key that it does not know: a misspelt one would silently do nothing.
    for key, given in options.items():
        if key in ELSEWHERE and given != "auto":
            raise ConfigError(
                f"{key} is {json.dumps(given)}, but mmit decides it by {ELSEWHERE[key]}",
                where=f"{WHERE}.{key}",
                remedy="remove it from the DeepSpeed JSON",
            )
        if key not in ELSEWHERE and key not in KNOWN:
            raise ConfigError("DeepSpeed has no such key", where=f"{WHERE}.{key}", remedy=nearest(key, KNOWN))


def _agreed(options: Mapping[str, Any], mine: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """The options with mmit's own values {"section.key": (value, who decides it)}; refuses one that differs."""
    whole = {k: v for k, v in options.items() if v != "auto"}
    for key, (value, owner_) in mine.items():
        section, _, leaf = key.rpartition(".")
        inner: dict[str, Any] = dict(whole.get(section) or {}) if section else whole
        given = inner.get(leaf, "auto")
        if given != "auto" and given != value:
            raise ConfigError(
                f"{key} is {json.dumps(given)}, but mmit has {json.dumps(value)} from {owner_}",
                where=f"{WHERE}.{key}",
                remedy="remove it from the DeepSpeed JSON, or set both to the same",
            )
        inner[leaf] = value
        if section:
            whole[section] = inner
    return whole
