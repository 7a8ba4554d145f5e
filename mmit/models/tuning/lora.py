"""Methods that PEFT carries out: LoRA with its variants, QLoRA, (IA)3.

In: a model and checked options. Out: the model inside PEFT's wrapper with only the adapter trainable. PEFT
(huggingface/peft) owns the mathematics; here are the names of options and what the variants need. Refuses starts
that need data or are not the same twice.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from mmit.errors import ModelError
from mmit.models.tuning.fused_lora import fuse_lora
from mmit.models.tuning.options import Option, Options
from mmit.models.tuning.reach import (
    bypassed,
    expert_parameters,
    find_targets,
    not_matrices,
    refuse_bypassed,
    refuse_routers,
)

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
# PEFT's own start draws A and leaves B at 0; gaussian, orthogonal: other draws with B A = 0. PiSSA (arXiv:2404.02948)
# and OLoRA (arXiv:2406.01775) take A and B out of the weight, which equals the base up to rounding. Starts from
# data (EVA, CorDA) and PiSSA's randomised SVD would not come out the same when a checkpoint is read.
INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
LORA: Options = {
    "r": Option(16, "whole", least=1),
    "alpha": Option(32, "number", above=0),  # at 0 an adapter is multiplied by 0, and learns nothing
    "dropout": Option(0.0, "number", least=0, below=1),
    "targets": Option("all-linear", "names"),
    "rslora": Option(False, "flag"),  # scale by alpha / sqrt(r), arXiv:2312.03732
    "dora": Option(False, "flag"),  # magnitude and direction apart, arXiv:2402.09353
    "init": Option(True, "text", choices=INITS),
    "layers": Option(None, "numbers"),
    "experts": Option(False, "flag"),  # weights that experts keep as one tensor, which no linear layer holds
    "bias": Option("none", "text", choices=("none", "all", "lora_only")),
    "lr_ratio": Option(1.0, "number", least=1),  # LoRA+: learning rate of B over that of A, arXiv:2402.12354
}
QLORA: Options = {
    **LORA,
    "quant": Option("nf4", "text", choices=("nf4", "fp4")),
    "double_quant": Option(True, "flag"),
}
IA3: Options = {"targets": Option(None, "names"), "feedforward": Option(None, "names")}


def lora_config(options: Mapping[str, Any], *, task: str | None = "CAUSAL_LM") -> LoraConfig:
    """Translate mmit's LoRA options into peft's config. LoRA: arXiv:2106.09685."""
    arguments = {LORA_KEYS[k]: v for k, v in options.items() if k in LORA_KEYS and v is not None}
    try:
        return LoraConfig(task_type=task, **arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(str(error), where="tune.llm.options") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Around whatever wraps a model: peft asks it in a way that transformers has a new name for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def wrap(model: Any, config: PeftConfig, *, where: str) -> PeftModel:
    """Put a model into PEFT's wrapper. Raises ModelError where the targets are not found."""
    try:
        with quietly():
            # autocast off: the engine decides number formats, and keeps float32 masters itself.
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(str(error), where=where, remedy=f"its linear layers are {', '.join(names)}") from error


def mark_adapter(model: PeftModel) -> None:
    """Train the adapter of a model that was wrapped before, as PEFT marks it in a new one."""
    # PEFT marks parameters by a part of their name, such as lora_; which one depends on the kind of adapter.
    prefix = str(model.base_model.prefix)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(prefix in name)
    # Where its config says so, PEFT trains biases of the model besides the adapter; they were frozen with all the rest.
    bias = getattr(model.active_peft_config, "bias", "none")
    for module_name, module in model.named_modules():
        own = getattr(module, "bias", None)
        if isinstance(own, nn.Parameter) and bias != "none" and prefix not in module_name:
            adapted = module_name.endswith("base_layer")
            own.requires_grad_(bias == "all" or adapted)


def tune_lora(llm: Any, options: Mapping[str, Any]) -> PeftModel:
    """LoRA on an LLM; one that has an adapter already keeps it (a continued run)."""
    if not isinstance(llm, PeftModel):
        if getattr(llm, "is_quantized", False) and options["init"] in ("pissa", "olora"):
            raise ModelError(
                f"'{options['init']}' takes the adapter out of the weights, which are quantised",
                where="tune.llm.options.init",
                remedy="use init: true, or mode lora",
            )
        # Looked up in the model before PEFT sees them: PEFT passes over a name that matches nothing, as long as another
        # one matches.
        targets = find_targets(llm, options["targets"], layers=options["layers"])
        unheard = bypassed(llm)
        refuse_bypassed(targets, unheard)
        routers = not_matrices(llm)
        refuse_routers(targets, routers)
        config = lora_config({**options, "targets": targets})
        # Excluded by name too, since peft matches targets by the end of a name.
        if excluded := sorted({*unheard, *routers}):
            config.exclude_modules = "|".join(map(re.escape, excluded))
        if options["experts"]:
            config.target_parameters = _experts(llm)
        llm = wrap(llm, config, where="tune.llm.options.targets")
    mark_adapter(llm)
    fuse_lora(llm)
    return llm


def _experts(llm: Any) -> list[str]:
    if not (found := expert_parameters(llm)):
        raise ModelError(
            f"{type(llm).__name__} has no experts that share a tensor",
            where="tune.llm.options.experts",
            remedy="set experts: false; experts that are linear layers are among all-linear",
        )
    return found


def tune_qlora(llm: Any, options: Mapping[str, Any]) -> PeftModel:
    """LoRA over 4-bit weights (arXiv:2305.14314). The LLM must have been loaded with `quantization`."""
    base = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    if not getattr(base, "is_quantized", False):
        raise ModelError(
            "the LLM was not loaded in 4 bits",
            where="tune.llm.mode",
            remedy="start the run with mode qlora, or use mode lora",
        )
    return tune_lora(llm, options)


def tune_ia3(llm: Any, options: Mapping[str, Any]) -> PeftModel:
    """(IA)3: learned factors, 1 at the start, on keys, values and the feed-forward part (arXiv:2205.05638)."""
    if not isinstance(llm, PeftModel):
        targets, feedforward = options["targets"], options["feedforward"]
        if (targets is None) != (feedforward is None):
            raise ModelError(
                "give targets and feedforward together",
                where="tune.llm.options",
                remedy="e.g. targets: [k_proj, v_proj, down_proj] and feedforward: [down_proj]",
            )
        config = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)
        llm = wrap(llm, config, where="tune.llm.options.targets")
    mark_adapter(llm)
    return llm


def tune_vision_lora(encoder: nn.Module, options: Mapping[str, Any]) -> PeftModel:
    """LoRA on the linear layers of a vision encoder.

    Layers inside torch's fused attention are left alone: it reads their weights past any adapter.

    Raises:
        ModelError: the encoder has no linear layer.
    """
    if isinstance(encoder, PeftModel):
        mark_adapter(encoder)
        fuse_lora(encoder)
        return encoder
    fused = [f"{n}." for n, m in encoder.named_modules() if isinstance(m, nn.MultiheadAttention)]
    linear = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and not n.startswith(tuple(fused))]
    if not linear:
        raise ModelError(
            "the encoder has no linear layer to put LoRA on",
            where="tune.vision.mode",
            remedy="use layernorm, bitfit or full",
        )
    where = "tune.vision.options.targets"
    chosen = find_targets(encoder, options["targets"], layers=None, where=where) if options["targets"] else linear
    config = lora_config({**options, "targets": chosen}, task=None)
    adapted = wrap(encoder, config, where="tune.vision.options.targets")
    fuse_lora(adapted)
    return adapted


def trained_b(names: Sequence[str]) -> list[str]:
    """The LoRA B matrices among parameter names, which LoRA+ trains faster."""
    return [n for n in names if ".lora_B." in n or ".lora_embedding_B." in n]


@torch.no_grad()
def put_adapter(model: PeftModel, tensors: Mapping[str, torch.Tensor], name: str = "default") -> None:
    """Give the adapter `name` its values. `tensors` has every name of PEFT's state dict and no other.

    Raises:
        ModelError: PEFT left tensors as they were, and they cannot be reached.
    """
    set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    # PEFT takes names for published ones and renames them as transformers does when it loads weights. A rule may match
    # names that are the model's own already: Laguna's "mlp.shared_expert.", with a dot for any letter, makes
    # "shared_experts.." of "shared_experts", and PEFT drops what it then does not know without a word.
    left = _unlike(model, tensors, name)
    for key, value in left.items():
        value.copy_(tensors[key])
    if left and (still := _unlike(model, tensors, name)):
        raise ModelError(
            f"peft does not load {len(still)} tensors of the adapter, such as {min(still)}",
            where=type(model.get_base_model()).__name__,
            remedy="choose other layers (tune.llm.options.targets), or another version of peft",
        )


def _unlike(model: PeftModel, tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Tensors of the adapter that do not have these values."""
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {k: v for k, v in own.items() if not torch.equal(v.nan_to_num(), tensors[k].to(v).nan_to_num())}
