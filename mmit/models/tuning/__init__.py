"""Which parameters are trained, and how: one mode per component.

Owns freezing, the tuning methods and the parameter groups. Takes a composite and plain modes, changes the composite
in place, gives groups. Refuses a plan that trains nothing, or next to nothing. The modes of each component are `MODES`;
`mmit.kinds.TUNING` has a line on each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmit.errors import ModelError, nearest
from mmit.models.partition import numel
from mmit.models.tuning.fused_norm import fuse_norms
from mmit.models.tuning.llm import METHODS, Method, biases, norm_parameters
from mmit.models.tuning.lora import LORA, trained_b, tune_vision_lora
from mmit.models.tuning.merge import base_name, is_added, merge
from mmit.models.tuning.options import Option, Options, read_options
from mmit.models.tuning.own import apply_own, read_own_options
from mmit.models.tuning.reach import left_out
from mmit.plugins import FORM, is_spec

if TYPE_CHECKING:
    from torch import nn

    from mmit.models.vision import VisionTower
    from mmit.models.vlm import VLM

__all__ = [
    "MODES",
    "Group",
    "apply_tuning",
    "base_name",
    "check_options",
    "is_added",
    "merge",
    "method_of",
    "parameter_table",
    "quantization",
    "unquantised",
]

COMPONENTS = ("vision", "projector", "llm")
# Dropout would sleep: a tower of which a part is trained stays in eval mode.
VISION_LORA: Options = {k: v for k, v in LORA.items() if k in ("r", "alpha", "rslora", "dora", "lr_ratio")} | {
    "targets": Option(None, "names")
}
MODES: dict[str, dict[str, Options]] = {
    "vision": {"frozen": {}, "full": {}, "layernorm": {}, "bitfit": {}, "lora": VISION_LORA},
    "projector": {"frozen": {}, "full": {}},
    "llm": {name: method.options for name, method in METHODS.items()},
}
LEAST_SHARE = 1e-6  # of a component's parameters: less than this was not meant


@dataclass(frozen=True, slots=True)
class Group:
    """Trained parameters of one component, with their peak learning rate."""

    name: str
    lr: float
    parameters: list[tuple[str, nn.Parameter]]


def apply_tuning(
    vlm: VLM,
    tune: Mapping[str, Mapping[str, Any]],
    *,
    say: Callable[[str], None] = lambda _: None,
    to_train: bool = True,
) -> list[Group]:
    """Set what is trained.

    Args:
        vlm: the composite; its LLM may already be a PeftModel (a continued run).
        tune: {"vision" | "projector" | "llm": {"mode": str, "lr": float | None, "options": dict}}.
        say: is told what a method leaves out.
        to_train: False where a model is only read, which may train nothing: its adapter was merged.

    Returns:
        one group per trained component; with LoRA+ a second one for its B matrices.

    Raises:
        ModelError: unknown component, mode or option; the model does not allow the method; nothing to train.
    """
    options = check_options(tune)
    # Everything frozen first: a method states what it trains, and never what it does not.
    vlm.requires_grad_(False)
    vlm.tuned_names.clear()
    mode = tune["llm"]["mode"]
    method = method_of(mode)
    method.apply(vlm, options["llm"])
    if method.whole:
        vlm.whole_parts.add("llm")
    for line in left_out(vlm, mode=mode):
        say(line)
    if vlm.vision is not None and vlm.projector is not None:
        _tune_vision(vlm, vlm.vision, tune["vision"]["mode"], options["vision"])
        vlm.projector.requires_grad_(tune["projector"]["mode"] == "full")
    fuse_norms(vlm.llm)
    groups = []
    for component in COMPONENTS:
        module = getattr(vlm, component)
        # Asked of the model and not of the plan: what a method of the user's own trains is found like any other.
        trained = [] if module is None else [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if trained:
            _check_share(component, module, trained, mode=tune[component]["mode"])
            ratio = options[component].get("lr_ratio", 1.0)
            groups += _groups(component, trained, lr=float(tune[component]["lr"]), ratio=ratio)
    if not groups and to_train:
        raise ModelError(
            "nothing is trained", where="tune", remedy="set the mode of the projector or the LLM to full or lora"
        )
    return groups


def check_options(tune: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every component's options, defaults filled in; needs no model. Raises ModelError as `apply_tuning` does."""
    return {component: _options(component, plan) for component, plan in tune.items()}


def method_of(mode: str) -> Method:
    """What mmit knows of `tune.llm.mode`; of a method of the user's own that is how to apply it."""
    if is_spec(mode):
        return Method(lambda vlm, options: apply_own(mode, vlm, options))
    return METHODS[mode]


def quantization(mode: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of 4-bit loading for `load_llm`, or None for modes that need none."""
    if not method_of(mode).four_bit:
        return None
    return {"quant": options.get("quant") or "nf4", "double_quant": options.get("double_quant") is not False}


def unquantised(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan for a machine without 4-bit weights: of a QLoRA run the same adapter on plain weights."""
    if not method_of(plan["mode"]).four_bit:
        return dict(plan)
    # The same adapter: how the base is kept makes no difference to its tensors.
    options = {k: v for k, v in (plan.get("options") or {}).items() if k in LORA}
    return {**plan, "mode": "lora", "options": options}


def _options(component: str, plan: Mapping[str, Any]) -> dict[str, Any]:
    if component not in MODES:
        raise ModelError(f"unknown component '{component}'", where="tune", remedy=nearest(component, MODES))
    modes, mode = MODES[component], plan["mode"]
    where = f"tune.{component}.options"
    if component == "llm" and is_spec(mode):
        return read_own_options(mode, plan.get("options") or {}, where=where)
    if mode not in modes:
        remedy = nearest(mode, modes) + (f", or {FORM} of your own" if component == "llm" else "")
        raise ModelError(f"unknown mode '{mode}'", where=f"tune.{component}.mode", remedy=remedy)
    return read_options(plan.get("options") or {}, modes[mode], mode=mode, where=where, others=modes)


def _tune_vision(vlm: VLM, tower: VisionTower, mode: str, options: Mapping[str, Any]) -> None:
    choose: dict[str, Callable[[nn.Module], list[str]]] = {"layernorm": norm_parameters, "bitfit": biases}
    if mode == "full":
        tower.unfreeze()
        vlm.whole_parts.add("vision")
    elif mode == "lora":
        tower.encoder = tune_vision_lora(tower.encoder, options)
        tower.adapt([])
    elif mode in choose:
        tower.adapt(choose[mode](tower.encoder))
        names = tuple(n for n, p in tower.named_parameters() if p.requires_grad)
        if not names:
            raise ModelError(f"the encoder has nothing that {mode} trains", where="tune.vision.mode", remedy="use full")
        vlm.tuned_names["vision"] = names


def _check_share(component: str, module: nn.Module, trained: list[tuple[str, nn.Parameter]], *, mode: str) -> None:
    count, total = numel(p for _, p in trained), numel(module.parameters())
    # A method that finds a bias or two in a model without biases would run for days and learn nothing.
    if count < LEAST_SHARE * total:
        raise ModelError(
            f"mode '{mode}' trains {count} of {total} parameters, next to nothing",
            where=f"tune.{component}.mode",
            remedy="give it more (tokens, modules, insert_biases), or use lora",
        )


def _groups(component: str, trained: list[tuple[str, nn.Parameter]], *, lr: float, ratio: float) -> list[Group]:
    fast = set(trained_b([n for n, _ in trained])) if ratio != 1 else set()
    groups = [Group(component, lr, [(n, p) for n, p in trained if n not in fast])]
    if fast:
        groups.append(Group(f"{component}_lora_b", lr * ratio, [(n, p) for n, p in trained if n in fast]))
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
                "total": numel(parameters),
                "trained": numel(p for p in parameters if p.requires_grad),
                "dtype": "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            }
        )
    return rows
