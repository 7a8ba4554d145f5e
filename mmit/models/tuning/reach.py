"""What an adapter reaches: targets looked up in the model, layers whose weights are read past them, what is left out.

In: a model before or after it is wrapped. Out: names of modules and tensors, lines of text. Refuses a target that is
no module of the model, and one that an adapter on it could not change.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmit.errors import ModelError, nearest
from mmit.models.calls import call
from mmit.models.modes import evaluation_mode
from mmit.models.partition import is_part, numel, shape
from mmit.models.tuning.structure import base_model

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

WHERE = "tune.llm.options.targets"
ALL_LINEAR = "all-linear"


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers, without the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def find_targets(model: nn.Module, given: Any, *, layers: Sequence[int] | None, where: str = WHERE) -> Any:
    """Targets as PEFT takes them, every one looked up in the model.

    Args:
        given: "all-linear", names of modules (or how their names end), one name, or one regular expression.
        layers: restricts names to these decoder layers, which PEFT does for lists alone.

    Raises:
        ModelError: a name or the expression matches nothing, or there is no such layer.
    """
    names = [n for n, _ in model.named_modules()]
    # PEFT passes over what it does not find as long as it finds something; a mistyped name would train less than was
    # asked for.
    _check_layers(model, layers or ())
    if given == ALL_LINEAR:
        # PEFT restricts layers for lists alone, so the word is spelt out.
        return sorted({n.rpartition(".")[2] for n in linear_names(model)}) if layers else given
    if isinstance(given, str):
        if not any(_ends(n, given) for n in names):
            if not any(_matches(given, n) for n in names):
                raise _unknown(model, given, where)
            if layers:
                problem = "layers cannot be chosen where targets is a regular expression"
                raise ModelError(problem, where=where, remedy="list names in targets, or write the layers into it")
            return given
        given = [given]
    for target in given:
        if not any(_ends(n, target) for n in names):
            raise _unknown(model, target, where)
    return list(given)


def _check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    config: Any = getattr(model, "config", None)
    count = getattr(config and config.get_text_config(), "num_hidden_layers", None)
    if count is None:
        return
    if beyond := [n for n in layers if not 0 <= n < count]:
        problem, where = f"there is no layer {beyond[0]}; the model has {count}", "tune.llm.options.layers"
        raise ModelError(problem, where=where, remedy=f"count them from 0 to {count - 1}")


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _unknown(model: nn.Module, target: str, where: str) -> ModelError:
    known = sorted({n.rpartition(".")[2] for n in linear_names(model)})
    return ModelError(f"the model has no module '{target}'", where=where, remedy=nearest(target, known))


def bypassed(llm: Any) -> list[str]:
    """Names of linear layers that a forward of the model never calls, though it may read their weights.

    State-space layers hand the weights of some projections to a kernel; an adapter around such a layer is not heard.
    Found by a forward of two tokens, of a model without weights where these are divided among ranks. The output
    projection of a state space is among them everywhere: kernels on CUDA read it in training, and PEFT refuses it.
    """
    inner = base_model(llm)
    past = _read_past(inner)
    held = [m for m in base_model(llm).modules() if any(isinstance(c, nn.Conv1d) for c in m.children())]
    if not held:  # only layers of this kind are known to do so, and experts that get no token are not called either
        return past
    suspects = {n for n, m in inner.named_modules() if isinstance(m, nn.Linear)}
    inside = {id(m) for owner in held for m in owner.modules()}
    # Only inside of such owners: everywhere else a layer that is not called in two tokens may be an expert that got
    # none.
    suspects = {n for n in suspects if id(inner.get_submodule(n)) in inside}
    if any(is_part(p) for p in inner.parameters()):
        with torch.device("meta"):
            # Weights that ranks have divided would all have to be gathered for this forward.
            inner = type(inner)(copy.deepcopy(inner.config))
    called: set[str] = set()
    hooks = [
        inner.get_submodule(n).register_forward_hook(lambda *_, name=n: called.add(name)) for n in sorted(suspects)
    ]
    device = inner.get_input_embeddings().weight.device
    try:
        with evaluation_mode(inner), torch.no_grad():
            words = inner.get_input_embeddings()(torch.arange(2, device=device))[None]
            call(inner, inputs_embeds=words, use_cache=False, optional=("use_cache",))
    finally:
        for hook in hooks:
            hook.remove()
    whole = base_model(llm).named_modules()
    spaces = [n for n, m in whole if m in held and hasattr(m, "A_log") and hasattr(m, "D")]
    return sorted({*past, *(suspects - called), *({f"{n}.out_proj" for n in spaces} & suspects)})


def _read_past(inner: nn.Module) -> list[str]:
    """Names of linear layers whose owner's forward reads their weight and never calls them (LongCat's routers)."""
    return [
        f"{name}.{child}"
        for name, module in inner.named_modules()
        for child in _weights_read(module.__class__)
        if isinstance(getattr(module, child, None), nn.Linear)
    ]


@functools.cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    if not kind.__module__.startswith("transformers.models.") or "forward" not in vars(kind):
        return frozenset()
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b", source)) - set(re.findall(r"self\.(\w+)\(", source))


def not_matrices(llm: Any) -> list[str]:
    """Names of subclasses of the linear layer that return more or something else than its product.

    The router of Llama 4 is one: it returns scores beside logits, and what an adapter adds has no place there. Each
    class of transformers' that has a forward of its own is asked once, without weights.
    """
    found = []
    for name, module in base_model(llm).named_modules():
        owner = next((c for c in type(module).__mro__ if "forward" in vars(c)), nn.Linear)
        if isinstance(module, nn.Linear) and owner.__module__.startswith("transformers.models."):
            given = torch.empty(1, 2, module.in_features, dtype=module.weight.dtype, device="meta")
            weights = {n: torch.empty(shape(p), dtype=p.dtype, device="meta") for n, p in module.named_parameters()}
            try:
                out = torch.func.functional_call(module, weights, (given,))
            except (RuntimeError, TypeError):
                out = None
            if not isinstance(out, torch.Tensor) or out.shape != (1, 2, module.out_features):
                found.append(name)
    return found


def refuse_routers(targets: Any, names: Sequence[str]) -> None:
    """Refuse targets that name layers of `not_matrices`. Raises ModelError."""
    for target in () if isinstance(targets, str) else targets:
        if found := [n for n in names if _ends(n, target)]:
            raise ModelError(
                f"'{found[0]}' returns more than a matrix product, so that an adapter cannot be added to it",
                where=WHERE,
                remedy=f"leave '{target}' out",
            )


def refuse_bypassed(targets: Any, names: Sequence[str]) -> None:
    """Refuse targets that name only layers whose weights are read past them. Raises ModelError."""
    if targets == ALL_LINEAR or isinstance(targets, str):
        return
    for target in targets:
        if found := [n for n in names if _ends(n, target)]:
            raise ModelError(
                f"the model reads the weights of '{found[0]}' without calling it, so that an adapter there changes "
                "nothing",
                where=WHERE,
                remedy=f"leave '{target}' out",
            )


def expert_parameters(llm: Any) -> list[str]:
    """Names of the weights that experts keep as one tensor for all of them."""
    inner = base_model(llm)
    return [
        f"{n}.{p}"
        for n, m in inner.named_modules()
        if not isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for p, weight in m.named_parameters(recurse=False)
        if len(shape(weight)) == 3 and "lora" not in p
    ]


def left_out(vlm: VLM, *, mode: str) -> Iterator[str]:
    """Lines about large parts of the LLM that a mode neither trains nor adapts."""
    if mode not in ("lora", "qlora"):
        return
    inner = base_model(vlm.llm)
    trained = [n for n, p in inner.named_parameters() if p.requires_grad]
    total = numel(p for n, p in inner.named_parameters() if "lora_" not in n)
    # As the model names them: PEFT may have wrapped experts by now.
    owners = [name.rpartition(".")[0].replace(".base_layer", "") for name in expert_parameters(vlm.llm)]
    missed = {o for o in owners if not any(t.startswith(f"{o}.") for t in trained)}
    if missed:
        count = numel(p for o in missed for n, p in inner.named_parameters() if n.startswith(f"{o}."))
        yield (
            f"{mode} does not reach the experts, {100 * count / total:.0f} % of the LLM's parameters: they stay as "
            "they are (tune.llm.options.experts=true adapts them)"
        )
