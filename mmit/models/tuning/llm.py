"""Tuning methods of the language model, one function each, in one table.

In: a composite whose parameters are all frozen, and checked options. Out: the LLM with the method's modules in place
and its parameters trainable. Methods whose tensors a checkpoint keeps by name put the names into `vlm.tuned_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmit.errors import ModelError
from mmit.models import attention
from mmit.models.intrinsic import HASH, Back, IntrinsicPrompt, read_facts, read_subspace
from mmit.models.partition import gathered, shape
from mmit.models.rules import takes_attention
from mmit.models.tuning.bottleneck import insert_adapters
from mmit.models.tuning.lora import IA3, LORA, QLORA, tune_ia3, tune_lora, tune_qlora
from mmit.models.tuning.options import Option, Options
from mmit.models.tuning.structure import attention_and_mlp, base_model, decoder_layers, norms
from mmit.models.virtual import PREFIX, PROMPT, Prefix, SoftPrompt

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

SOME = 4096  # words whose embeddings tell how large they are
INSERTED = "mmit_inserted_bias"  # marks a linear layer whose bias the architecture does not know


@dataclass(frozen=True, slots=True)
class Method:
    """How to set one mode up, the options it takes, and all that the rest of mmit has to know of it."""

    apply: Callable[[VLM, Mapping[str, Any]], None]
    options: Options = field(default_factory=dict)
    whole: bool = False  # every weight changes: checkpoints hold the LLM itself, and nothing hangs on its base
    four_bit: bool = False  # the base is loaded in 4 bits; elsewhere `unquantised` has its twin on plain weights
    adapter: str | None = None  # the kind of PEFT adapter that a checkpoint holds; another mode of it can go on
    starts_at_base: bool = False  # before the first step the model answers as its base does
    by_token: bool = False  # what is added sees one token at a time: records meet no more than in the base


def _frozen(vlm: VLM, options: Mapping[str, Any]) -> None:
    pass


def _full(vlm: VLM, options: Mapping[str, Any]) -> None:
    vlm.llm.requires_grad_(True)


def _lora(vlm: VLM, options: Mapping[str, Any]) -> None:
    if options["init"] in ("pissa", "olora"):
        _needs_named_base(vlm, f"init '{options['init']}' changes the base")
    vlm.llm = tune_lora(vlm.llm, options)


def _needs_named_base(vlm: VLM, reason: str) -> None:
    if "llm" in vlm.whole_parts:
        raise ModelError(
            f"{reason}, which therefore cannot be kept in the checkpoints of a run that starts from a tuned LLM",
            where="tune.llm",
            remedy="set model.llm.name to the llm folder of that checkpoint, which makes it a base like any other",
        )


def _qlora(vlm: VLM, options: Mapping[str, Any]) -> None:
    _needs_named_base(vlm, "4-bit loading rounds the base")
    vlm.llm = tune_qlora(vlm.llm, options)


def _ia3(vlm: VLM, options: Mapping[str, Any]) -> None:
    vlm.llm = tune_ia3(vlm.llm, options)


def train_only(vlm: VLM, component: str, names: Sequence[str]) -> None:
    """Train the named parameters of a component; its checkpoint will hold these alone."""
    module = getattr(vlm, component)
    for name in names:
        module.get_parameter(name).requires_grad_(True)
    vlm.tuned_names[component] = tuple(names)


def _houlsby(vlm: VLM, options: Mapping[str, Any]) -> None:
    llm = base_model(vlm.llm)
    layers = decoder_layers(llm)
    names: list[str] = []
    if options["norms"]:
        inside = {id(p) for p in layers.parameters()}
        chosen = {id(p) for n in norms(llm) for p in llm.get_submodule(n).parameters()} & inside
        chosen_parameters = [p for p in layers.parameters() if id(p) in chosen]
    insert_adapters(llm, size=options["size"], activation=options["activation"], after=_list(options["after"]))
    adapters = {id(p) for n, p in llm.named_parameters() if ".adapter." in n}
    wanted = adapters | ({id(p) for p in chosen_parameters} if options["norms"] else set())
    names = [n for n, p in llm.named_parameters() if id(p) in wanted]
    train_only(vlm, "llm", names)


def _list(value: Any) -> list[str] | None:
    return [value] if isinstance(value, str) else None if value is None else list(value)


def _soft_prompt(vlm: VLM, options: Mapping[str, Any]) -> None:
    count = options["tokens"]
    with gathered(vlm.word_embeddings), torch.no_grad():
        table = vlm.word_embeddings
        # What the model gets for a word: some scale the table's rows inside the embedding module.
        words: Any = vlm.llm.get_input_embeddings()
        if options["init"] == "vocab":
            start = words(torch.randint(len(table), (count,)).to(table.device))
        else:
            some = words(torch.arange(min(len(table), SOME), device=table.device))
            start = torch.randn(count, table.shape[1]).to(some) * some.float().std().to(some.dtype)
    base_model(vlm.llm).add_module(PROMPT, SoftPrompt(start))
    train_only(vlm, "llm", [f"{PROMPT}.embeddings"])


def _intrinsic(vlm: VLM, options: Mapping[str, Any]) -> None:
    where = "tune.llm.options.subspace"
    if not options["subspace"]:
        remedy = "name the folder that mmit analyse intrinsic made"
        raise ModelError("no subspace is named", where=where, remedy=remedy)
    folder, table = Path(options["subspace"]), vlm.word_embeddings
    tokens, (layers, start, digest) = read_facts(folder)["tokens"], read_subspace(folder)
    width = len(layers["outer.bias"]) // tokens
    if width != shape(table)[1]:
        problem = f"{folder} is of a model of width {width}, this one has {shape(table)[1]}"
        raise ModelError(problem, where=where, remedy="make one of soft prompts of this model")
    back = Back({name: tensor.to(table) for name, tensor in layers.items()}, tokens)
    prompt = IntrinsicPrompt(back, start.to(table), digest)
    base_model(vlm.llm).add_module(PROMPT, prompt)
    train_only(vlm, "llm", [f"{PROMPT}.z"])
    vlm.tuned_names["llm"] = (f"{PROMPT}.z", f"{PROMPT}.{HASH}")


def _prefix(vlm: VLM, options: Mapping[str, Any]) -> None:
    llm = base_model(vlm.llm)
    if not takes_attention(type(llm)):
        raise ModelError(
            f"{type(llm).__name__} does not route its attention through transformers' attention interface, where "
            "the prefix is added",
            where="tune.llm.mode",
            remedy="use soft_prompt, which needs nothing of the model",
        )
    if llm.config._attn_implementation != attention.NAME:
        llm.set_attn_implementation(attention.NAME)
    config = llm.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = decoder_layers(llm)
    for layer in layers:
        module = getattr(layer, attention_and_mlp(layer)[0])
        prefix = Prefix(
            tokens=options["tokens"],
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            gated=options["gated"],
            like=vlm.word_embeddings,
        )
        module.add_module(PREFIX, prefix)
    train_only(vlm, "llm", [n for n, _ in llm.named_parameters() if f".{PREFIX}." in n])


def _bitfit(vlm: VLM, options: Mapping[str, Any]) -> None:
    llm = base_model(vlm.llm)
    only = tuple(_list(options["only"]) or ())
    if options["insert_biases"]:
        for name, module in decoder_layers(llm).named_modules():
            if isinstance(module, nn.Linear) and module.bias is None and _chosen(name, only):
                like = module.weight
                module.bias = nn.Parameter(torch.zeros(shape(like)[0], dtype=like.dtype, device=like.device))
                setattr(module, INSERTED, True)
    names = biases(llm, only)
    if not names:
        advice = "set tune.llm.options.insert_biases=true, or use layernorm or lora"
        raise ModelError(
            f"{type(llm).__name__} has no bias" + (f" in modules named {', '.join(only)}" if only else ""),
            where="tune.llm.mode",
            remedy=advice if not options["insert_biases"] else "name other modules in tune.llm.options.only",
        )
    train_only(vlm, "llm", names)


def _chosen(name: str, only: tuple[str, ...]) -> bool:
    return not only or name.rpartition(".")[2] in only


def biases(module: nn.Module, only: tuple[str, ...] = ()) -> list[str]:
    """Names of bias parameters, of all modules or of those with the given last names."""
    named = [n for n, _ in module.named_parameters() if n.rpartition(".")[2] == "bias"]
    return [n for n in named if _chosen(n.rpartition(".")[0], only)]


def norm_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of every normalisation."""
    return [f"{n}.{p}" for n in norms(module) for p, _ in module.get_submodule(n).named_parameters()]


def _layernorm(vlm: VLM, options: Mapping[str, Any]) -> None:
    names = norm_parameters(vlm.llm)
    if not names:
        raise ModelError(
            f"{type(vlm.llm).__name__} has no norm with parameters", where="tune.llm.mode", remedy="use lora or houlsby"
        )
    train_only(vlm, "llm", names)


METHODS: dict[str, Method] = {
    "frozen": Method(_frozen, by_token=True),
    "full": Method(_full, whole=True, by_token=True),
    "lora": Method(_lora, LORA, adapter="lora", starts_at_base=True, by_token=True),
    "qlora": Method(_qlora, QLORA, four_bit=True, adapter="lora", starts_at_base=True, by_token=True),
    "ia3": Method(_ia3, IA3, adapter="ia3", starts_at_base=True, by_token=True),
    "houlsby": Method(
        _houlsby,
        {
            "size": Option(64, "whole", least=1),
            "activation": Option("gelu", "text"),
            "norms": Option(True, "flag"),  # the paper trains the layers' norms as well
            "after": Option(None, "names"),
        },
        starts_at_base=True,
        by_token=True,
    ),
    "soft_prompt": Method(
        _soft_prompt,
        {"tokens": Option(16, "whole", least=1), "init": Option("vocab", "text", choices=("vocab", "normal"))},
    ),
    "intrinsic": Method(_intrinsic, {"subspace": Option("", "text")}),  # arXiv:2110.07867
    "prefix": Method(_prefix, {"tokens": Option(16, "whole", least=1), "gated": Option(True, "flag")}),
    # BitFit (arXiv:2106.10199)
    "bitfit": Method(_bitfit, {"insert_biases": Option(False, "flag"), "only": Option(None, "names")}, by_token=True),
    "layernorm": Method(_layernorm, by_token=True),  # arXiv:2312.11420
}
