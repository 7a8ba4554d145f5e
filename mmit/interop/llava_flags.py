"""LLaVA's training flags (`llava/train/train_mem.py`) as an mmit config.

Goes in: the command line that LLaVA's scripts give. Comes out: plain data for `Config`, and notes on flags that have
no counterpart. Flags left out take LLaVA's defaults, which are not those of its recipes. A flag that would change the
result and cannot be honoured is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mmit.errors import ConfigError, nearest

# flag -> (type, LLaVA's default)
FLAGS: dict[str, tuple[type, Any]] = {
    "model_name_or_path": (str, "facebook/opt-125m"),
    "version": (str, "v0"),
    "vision_tower": (str, None),
    "mm_projector_type": (str, "linear"),
    "mm_vision_select_layer": (int, -1),
    "mm_vision_select_feature": (str, "patch"),
    "pretrain_mm_mlp_adapter": (str, None),
    "tune_mm_mlp_adapter": (bool, False),
    "freeze_mm_mlp_adapter": (bool, False),
    "mm_use_im_start_end": (bool, False),
    "mm_use_im_patch_token": (bool, True),
    "mm_patch_merge_type": (str, "flat"),
    "mm_projector_lr": (float, None),
    "image_aspect_ratio": (str, "square"),
    "data_path": (str, None),
    "image_folder": (str, None),
    "lora_enable": (bool, False),
    "lora_r": (int, 64),
    "lora_alpha": (int, 16),
    "lora_dropout": (float, 0.05),
    "lora_bias": (str, "none"),
    "bits": (int, 16),
    "model_max_length": (int, 512),
    "output_dir": (str, "./checkpoints/llava"),
    "num_train_epochs": (float, 3.0),
    "max_steps": (int, -1),
    "per_device_train_batch_size": (int, 8),
    "gradient_accumulation_steps": (int, 1),
    "learning_rate": (float, 5e-5),
    "weight_decay": (float, 0.0),
    "warmup_ratio": (float, 0.0),
    "lr_scheduler_type": (str, "linear"),
    "max_grad_norm": (float, 1.0),
    "bf16": (bool, False),
    "fp16": (bool, False),
    "gradient_checkpointing": (bool, False),
    "save_steps": (int, 500),
    "save_total_limit": (int, None),
    "logging_steps": (int, 500),
    "dataloader_num_workers": (int, 0),
    "group_by_modality_length": (bool, False),
    "seed": (int, 42),
}
# Flags that change speed or bookkeeping, not the model.
WITHOUT_EFFECT = (
    "deepspeed",
    "tf32",
    "lazy_preprocess",
    "is_multimodal",
    "evaluation_strategy",
    "eval_strategy",
    "per_device_eval_batch_size",
    "save_strategy",
    "report_to",
    "run_name",
    "double_quant",
    "quant_type",
    "cache_dir",
)
CHATS = {"plain": "plain", "v0_plain": "plain", "v1": "vicuna_v1", "vicuna_v1": "vicuna_v1", "chatml_direct": "chatml"}
SCHEDULES = ("cosine", "linear", "constant")


def config_from_flags(arguments: Sequence[str], *, ranks: int = 1) -> tuple[dict[str, Any], list[str]]:
    """Return (plain data for `Config`, notes).

    Args:
        arguments: as given to train_mem.py.
        ranks: processes that train; LLaVA's batch size is per device.

    Raises:
        ConfigError: an unknown flag or value, or one that mmit cannot honour.
    """
    f, notes = _parse(arguments)
    _refuse(f)
    kind = f["mm_projector_type"]
    depth = int(kind[3 : kind.index("x_gelu")]) if kind.startswith("mlp") and kind.endswith("x_gelu") else 0
    rows = f["per_device_train_batch_size"] * f["gradient_accumulation_steps"] * ranks
    vision = {
        "kind": "hf",
        "name": f["vision_tower"],
        "layer": f["mm_vision_select_layer"],
        "select": f["mm_vision_select_feature"],
        "fit": {"pad": "pad", "square": "crop"}[f["image_aspect_ratio"]],
    }
    steps = f["max_steps"] if f["max_steps"] > 0 else None
    return {
        "run": {"dir": f["output_dir"], "seed": f["seed"], "resume": "auto"},
        "model": {
            "vision": vision,
            "projector": {"kind": "mlp", "options": {"depth": depth}} if depth else {"kind": "linear"},
            "llm": {"name": f["model_name_or_path"]},
            "chat": {"format": CHATS[f["version"]]},
        },
        "tune": _tune(f),
        "data": {
            "train": [{"path": f["data_path"], "format": "llava", "image_root": f["image_folder"]}],
            "max_length": f["model_max_length"],
            "pack_tokens": f["model_max_length"],
            "packing": False,  # a row is a record, as a place in LLaVA's batch is
            "group": f["group_by_modality_length"],
            "share_prefix": False,
            "workers": f["dataloader_num_workers"],
        },
        "train": {
            "epochs": None if steps else f["num_train_epochs"],
            "steps": steps,
            "rows_per_step": rows,
            "micro_rows": f["per_device_train_batch_size"],
            "schedule": f["lr_scheduler_type"],
            "warmup": f["warmup_ratio"],
            "weight_decay": f["weight_decay"],
            "clip": f["max_grad_norm"] or None,
            "precision": "bf16" if f["bf16"] else "fp16" if f["fp16"] else "fp32",
            "save_every": f["save_steps"],
            "log_every": f["logging_steps"],
            "checkpointing": "full" if f["gradient_checkpointing"] else "none",
            **({"keep_last": f["save_total_limit"]} if f["save_total_limit"] else {}),
        },
    }, notes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="LLaVA's flags", remedy="check the command line")


def _parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name, (kind, default) in FLAGS.items():
        extra: dict[str, Any] = {"nargs": "?", "const": True} if kind is bool else {}
        parser.add_argument(f"--{name}", type=_truth if kind is bool else kind, default=default, **extra)
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", nargs="?", const="True")
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        word = unknown[0].lstrip("-").split("=")[0]
        raise ConfigError(f"unknown flag {unknown[0]}", where="LLaVA's flags", remedy=nearest(word, FLAGS))
    flags = vars(found)
    notes = [f"--{name} has no counterpart and no effect" for name in WITHOUT_EFFECT if flags[name] is not None]
    return flags, notes


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return text.lower() == "true"


def _refuse(f: dict[str, Any]) -> None:
    """Raise for what cannot be honoured."""

    def need(fine: bool, flag: str, remedy: str) -> None:
        if not fine:
            raise ConfigError(f"--{flag} {f[flag]} cannot be honoured", where="LLaVA's flags", remedy=remedy)

    for flag in ("data_path", "vision_tower"):
        need(f[flag] is not None, flag, f"give --{flag}")
    need(f["version"] in CHATS, "version", nearest(f["version"], CHATS))
    need(f["image_aspect_ratio"] in ("pad", "square"), "image_aspect_ratio", "give pad or square")
    need(f["mm_patch_merge_type"] == "flat", "mm_patch_merge_type", "give flat")
    for flag in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        need(not f[flag], flag, f"give --{flag} False, as LLaVA-1.5's recipes do")
    kind = f["mm_projector_type"]
    known = kind == "linear" or (kind.startswith("mlp") and kind.endswith("x_gelu") and kind[3:-6].isdigit())
    need(known, "mm_projector_type", "give linear or mlpNx_gelu")
    remedy = "make a checkpoint of it with mmit import-model --base, and set run.init_from"
    need(f["pretrain_mm_mlp_adapter"] is None, "pretrain_mm_mlp_adapter", remedy)
    need(f["lr_scheduler_type"] in SCHEDULES, "lr_scheduler_type", nearest(f["lr_scheduler_type"], SCHEDULES))
    need(f["bits"] in (4, 16), "bits", "give 4 or 16")
    need(f["lora_bias"] == "none", "lora_bias", "give none")


def _tune(f: dict[str, Any]) -> dict[str, Any]:
    lr = f["learning_rate"]
    if f["tune_mm_mlp_adapter"]:  # LLaVA's first stage
        llm: dict[str, Any] = {"mode": "frozen"}
    elif f["lora_enable"]:
        options = {"r": f["lora_r"], "alpha": f["lora_alpha"], "dropout": f["lora_dropout"]}
        llm = {"mode": "qlora" if f["bits"] == 4 else "lora", "lr": lr, "options": options}
    else:
        llm = {"mode": "full", "lr": lr}
    projector = {"mode": "frozen"} if f["freeze_mm_mlp_adapter"] else {"mode": "full", "lr": f["mm_projector_lr"] or lr}
    return {"llm": llm, "projector": projector}
