"""Which parameters are trained, and how: one mode per component.

Owns freezing, PEFT adapters on the LLM and the parameter groups. Takes a composite and plain modes, changes the
composite in place, gives groups. Refuses a plan that trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.vlm import VLM

COMPONENTS = ("vision", "projector", "llm")
LORA_KEYS = {  # ours -> peft's
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "init": "init_lora_weights",
    "layers": "layers_to_transform",
    "bias": "bias",
}
# What peft would notice late or not at all: type, least value, first value that is too large.
LORA_NUMBERS: dict[str, tuple[type, int, float]] = {
    "r": (int, 1, math.inf),
    "alpha": (float, 0, math.inf),
    "dropout": (float, 0, 1),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Trained parameters of one component, with their peak learning rate."""

    name: str
    lr: float
    parameters: list[tuple[str, nn.Parameter]]


def lora_config(options: Mapping[str, Any]) -> LoraConfig:
    """Translate mmit's LoRA options (`LORA_KEYS`) into peft's config. LoRA: arXiv:2106.09685."""
    for key in options:
        if key not in LORA_KEYS:
            raise ModelError(f"unknown LoRA option '{key}'", where="tune.llm.options", remedy=nearest(key, LORA_KEYS))
    for key, (kind, least, below) in LORA_NUMBERS.items():
        value = options.get(key)
        if value is not None and (type(value) not in (int, kind) or not least <= value < below):
            what = "a whole number" if kind is int else "a number"
            limits = f"{least} or more" + (f" and below {below:g}" if below < math.inf else "")
            raise ModelError(f"is {value!r}", where=f"tune.llm.options.{key}", remedy=f"give {what}, {limits}")
    arguments = {LORA_KEYS[k]: v for k, v in options.items() if v is not None}
    arguments.setdefault("target_modules", "all-linear")
    try:
        return LoraConfig(task_type="CAUSAL_LM", **arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(str(error), where="tune.llm.options") from error


def _tune_llm(vlm: VLM, mode: str, options: Mapping[str, Any]) -> None:
    if mode == "lora":
        if not isinstance(vlm.llm, PeftModel):
            try:
                # autocast off: the engine decides number formats, and keeps float32 masters itself.
                vlm.llm = get_peft_model(vlm.llm, lora_config(options), autocast_adapter_dtype=False)
            except ValueError as error:
                raise ModelError(str(error), where="tune.llm.options.targets") from error
        for name, parameter in vlm.llm.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif options:
        raise ModelError(f"mode '{mode}' takes no options, got {sorted(options)}", where="tune.llm.options")
    else:
        vlm.llm.requires_grad_(mode == "full")


MODES: dict[str, tuple[str, ...]] = {
    "vision": ("frozen", "full"),
    "projector": ("frozen", "full"),
    "llm": ("frozen", "full", "lora"),
}


def apply_tuning(vlm: VLM, tune: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """Set what is trained.

    Args:
        vlm: the composite; its LLM may already be a PeftModel (a continued run).
        tune: {"vision" | "projector" | "llm": {"mode": str, "lr": float | None, "options": dict}}.

    Returns:
        one group per trained component.

    Raises:
        ModelError: unknown component, mode or option; nothing to train.
    """
    for component, plan in tune.items():
        if component not in MODES:
            raise ModelError(f"unknown component '{component}'", where="tune", remedy=nearest(component, MODES))
        if plan["mode"] not in MODES[component]:
            raise ModelError(
                f"unknown mode '{plan['mode']}'",
                where=f"tune.{component}.mode",
                remedy=nearest(plan["mode"], MODES[component]),
            )
    vlm.requires_grad_(False)
    _tune_llm(vlm, tune["llm"]["mode"], tune["llm"].get("options") or {})
    if vlm.vision is not None and vlm.projector is not None:
        if tune["vision"]["mode"] == "full":
            vlm.vision.unfreeze()
        vlm.projector.requires_grad_(tune["projector"]["mode"] == "full")
    groups = []
    for component in COMPONENTS:
        module = getattr(vlm, component)
        trained = [] if module is None else [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if trained:
            groups.append(Group(component, float(tune[component]["lr"]), trained))
    if not groups:
        raise ModelError(
            "nothing is trained", where="tune", remedy="set the mode of the projector or the LLM to full or lora"
        )
    return groups


def parameter_table(vlm: VLM) -> list[dict[str, Any]]:
    """Rows {component, total, trained, dtype} for the echo at the start of a run."""
    rows = []
    for component in COMPONENTS:
        module = getattr(vlm, component)
        if module is None:
            continue
        parameters = list(module.parameters())
        rows.append(
            {
                "component": component,
                "total": sum(p.numel() for p in parameters),
                "trained": sum(p.numel() for p in parameters if p.requires_grad),
                "dtype": "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            }
        )
    return rows


def trained_state(vlm: VLM, component: str) -> dict[str, torch.Tensor]:
    """Copies of the trained tensors of a component, by name inside it."""
    return {
        name: p.detach().cpu().contiguous()
        for name, p in getattr(vlm, component).named_parameters()
        if p.requires_grad
    }
