"""Merging: fold what was tuned into the weights, so that a model of the plain architecture remains.

In: a composite with its trained tensors. Out: the same function without wrappers. LoRA, DoRA and (IA)3 fold in;
BitFit, LayerNorm and full tuning are in the weights already. Refuses what no plain weight can express.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from mmit.errors import ModelError
from mmit.models.intrinsic import IntrinsicPrompt
from mmit.models.tuning.bottleneck import INNER, WithAdapter
from mmit.models.tuning.llm import INSERTED
from mmit.models.tuning.own import PLAIN, changes_layout
from mmit.models.tuning.structure import base_model
from mmit.models.virtual import PREFIX, PROMPT, Prefix, SoftPrompt

if TYPE_CHECKING:
    from torch import nn

    from mmit.models.vlm import VLM

STAYS = {
    WithAdapter: "bottleneck adapters are not linear",
    SoftPrompt: "a soft prompt is input, not weights",
    IntrinsicPrompt: "a soft prompt is input, not weights",
    Prefix: "a prefix is keys and values, not weights",
}


def base_name(name: str, llm: Any = None) -> str:
    """Name that a tensor of the architecture's own has without the wrappers around it, in `llm` where it is given."""
    if (plain := getattr(llm, PLAIN, None)) is not None:
        return plain[name]
    # One at a time: PEFT wraps experts once for each of their tensors, so that two wrappers follow each other.
    return ".".join(part for part in name.split(".") if part not in ("base_layer", INNER))


def is_added(llm: Any, name: str) -> bool:
    """A tensor of the state dict was put there by a tuning method."""
    if (plain := getattr(llm, PLAIN, None)) is not None:
        return name not in plain
    parts = name.split(".")
    if PROMPT in parts or PREFIX in parts or any(p.startswith(("lora_", "ia3_")) for p in parts):
        return True
    if "adapter" in parts:
        return isinstance(llm.get_submodule(".".join(parts[: parts.index("adapter")])), WithAdapter)
    return parts[-1] == "bias" and getattr(llm.get_submodule(".".join(parts[:-1])), INSERTED, False)


def why_not_merged(llm: Any) -> list[str]:
    """Reasons why plain weights cannot express what was tuned in an LLM, with or without PEFT's wrapper."""
    llm = base_model(llm)
    reasons = [reason for module in llm.modules() for kind, reason in STAYS.items() if isinstance(module, kind)]
    if any(getattr(m, INSERTED, False) for m in llm.modules()):
        reasons.append("the architecture has no place for the inserted biases")
    if (added := changes_layout(llm)) is not None:
        reasons.append(f"its method is not mmit's, and '{added}' has no place in the architecture")
    if shared := _adapted_and_shared(llm):
        reasons.append(
            f"'{shared[0]}' has an adapter of its own and shares its weight with '{shared[1]}', and one weight cannot "
            "hold what each of them has become"
        )
    return reasons


def _adapted_and_shared(llm: nn.Module) -> tuple[str, str] | None:
    """Names of an adapted module and of another one that has the same weight; None without such a pair."""
    # Zamba's attention layers share their weights, and a tied head those of the word embeddings: adapters are of a
    # module, so that a fold would change all that have the weight by what one of them has learnt.
    owners: dict[int, list[str]] = {}
    for name, module in llm.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, module in llm.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        for parameter in base.parameters(recurse=False):
            others = [o for o in owners[id(parameter)] if llm.get_submodule(o) is not base]
            if others:
                return name, base_name(others[0])
    return None


def merge(vlm: VLM) -> None:
    """Fold the adapters of the LLM and of the vision tower into their weights, in place.

    Raises:
        ModelError: the method cannot be merged, or the weights are quantised.
    """
    llm = base_model(vlm.llm)
    # All refusals before anything is folded: a model that was half merged would be neither.
    reasons = why_not_merged(llm)
    if reasons:
        raise ModelError(
            f"cannot be merged: {reasons[0]}",
            where="tune.llm.mode",
            remedy="use the checkpoint as it is; lora, ia3, bitfit without insert_biases and layernorm can be merged",
        )
    if isinstance(vlm.llm, PeftModel):
        if getattr(llm, "is_quantized", False):
            raise ModelError(
                "4-bit weights would be rounded again by merging",
                where="tune.llm.mode",
                remedy="merge into the base loaded in bf16 or fp32",
            )
        # safe_merge: weights that become infinite or NaN in a half-precision format are an error there, and not a
        # broken model later.
        vlm.llm = vlm.llm.merge_and_unload(safe_merge=True)
    if vlm.vision is not None and isinstance(vlm.vision.encoder, PeftModel):
        vlm.vision.encoder = vlm.vision.encoder.merge_and_unload(safe_merge=True)
    vlm.tuned_names.clear()
