"""DeepSpeed's own reading of its config, before anything is loaded: what it would refuse later becomes one clear error.

Apart from `zero.py`, which needs no DeepSpeed, and from the engine, which comes after the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmit.errors import ConfigError, nearest
from mmit.train.zero import WHERE


def check_deepspeed(options: Mapping[str, Any]) -> None:
    """Let DeepSpeed read a complete config before anything is loaded.

    Raises:
        ConfigError: it does not take a key or value, or this machine cannot compute in fp16 or offload to NVMe.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = options.get("zero_optimization") or {}
    known = DeepSpeedZeroConfig.model_fields  # some are written otherwise in the JSON: stage3_max_live_parameters
    fields = {*known, *(f.alias for f in known.values() if f.alias)}
    for key in zero:
        if key not in fields:
            where = f"{WHERE}.zero_optimization.{key}"
            raise ConfigError("ZeRO has no such key", where=where, remedy=nearest(key, fields))
    try:
        DeepSpeedConfig(copy.deepcopy(dict(options)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([WHERE, *map(str, first["loc"])])
        raise ConfigError(first["msg"], where=where, remedy="mend it in the DeepSpeed JSON") from error
    except (ValueError, TypeError, AssertionError) as error:
        problem = str(error).split("\n")[0] or "DeepSpeed refuses it"
        raise ConfigError(problem, where=WHERE, remedy="mend the DeepSpeed JSON") from error
    if options["fp16"]["enabled"] and not get_accelerator().is_fp16_supported():
        problem = f"DeepSpeed does not train in fp16 on this {get_accelerator().device_name()}"
        raise ConfigError(problem, where="train.precision", remedy="set train.precision=bf16 or fp32")
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) or {}
        if section.get("device") != "nvme":
            continue
        where, path = f"{WHERE}.zero_optimization.{key}", section.get("nvme_path")
        if not path or not Path(path).is_dir():
            raise ConfigError(f"nvme_path {path}: no such folder", where=where, remedy="name one on the local NVMe")
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible(verbose=False):
            raise ConfigError(
                "offload to NVMe needs libaio, which DeepSpeed does not find here",
                where=where,
                remedy="install libaio (apt install libaio-dev), or use device: cpu",
            )
