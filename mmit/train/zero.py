"""DeepSpeed's JSON: found by name, checked against what mmit fills in, completed.

Owns the agreement between a DeepSpeed config and the training config. A value that only mmit may decide can be left
out, be "auto", or be equal to mmit's own; anything else is refused with both values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, nearest

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
WHERE = "engine.deepspeed"


def deepspeed_options(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: a short name from configs/deepspeed/ or a path. Raises ConfigError."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = [p.stem for p in FOLDER.glob("*.json")]
        raise ConfigError(
            f"no DeepSpeed config '{name}'", where=WHERE, remedy=f"give the path of a JSON; {nearest(name, names)}"
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"is not JSON: {error}", where=str(path), remedy="mend the file") from None
    if not isinstance(options, dict):
        raise ConfigError("is not a JSON object", where=str(path), remedy="mend the file")
    return options


def complete(options: Mapping[str, Any], *, precision: str, clip: float | None) -> dict[str, Any]:
    """The whole DeepSpeed config. Raises ConfigError where `options` contradicts the training config."""
    mine: dict[str, tuple[Any, str]] = {
        "bf16.enabled": (precision == "bf16", f"train.precision={precision}"),
        "fp16.enabled": (precision == "fp16", f"train.precision={precision}"),
        "gradient_clipping": (clip or 0.0, f"train.clip={clip}"),
        "train_micro_batch_size_per_gpu": (1, "a packed micro-batch, which is one sequence to DeepSpeed"),
        "gradient_accumulation_steps": (1, "mmit's loop, which accumulates itself"),
    }
    for key in ("train_batch_size", "optimizer", "scheduler"):
        if key in options and options[key] != "auto":
            given = json.dumps(options[key])
            owner = {"optimizer": "train.betas, train.eps and tune.*.lr", "scheduler": "train.schedule"}
            raise ConfigError(
                f"{key} is {given}, but mmit decides it by {owner.get(key, 'train.rows_per_step')}",
                where=f"{WHERE}.{key}",
                remedy="remove it from the DeepSpeed JSON",
            )
    whole = {k: v for k, v in options.items() if v != "auto"}
    for key, (value, owner_) in mine.items():
        section, _, leaf = key.rpartition(".")
        inner: dict[str, Any] = dict(whole.get(section) or {}) if section else whole
        given_ = inner.get(leaf, "auto")
        if given_ != "auto" and given_ != value:
            raise ConfigError(
                f"{key} is {json.dumps(given_)}, but mmit has {json.dumps(value)} from {owner_}",
                where=f"{WHERE}.{key}",
                remedy="remove it from the DeepSpeed JSON, or set both to the same",
            )
        inner[leaf] = value
        if section:
            whole[section] = inner
    if precision == "bf16":
        whole["bf16"].setdefault("check_grad_overflow", True)  # else a NaN gradient is applied
    stage = int((whole.get("zero_optimization") or {}).get("stage", 0))
    if precision != "fp32" and stage == 0:
        raise ConfigError(
            f"DeepSpeed's ZeRO-0 does not sum {precision} gradients in float32, or keeps a state mmit cannot save",
            where=WHERE,
            remedy="set engine.deepspeed=zero1, which computes the same, or train.precision=fp32",
        )
    whole["zero_allow_untested_optimizer"] = True
    whole["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW runs on CPUs without a compiler
    return whole
