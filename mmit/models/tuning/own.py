"""Tuning methods of a user's own: `module:name` of a function (vlm, **options) that changes the LLM in place.

In: a spec and the options of the config. Out: the LLM with what the function made trainable, and the names under which
a checkpoint keeps it. Refuses a function that trains nothing of the LLM, or tensors that no checkpoint would hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict

from mmit.errors import ModelError, nearest
from mmit.models.tuning.structure import base_model
from mmit.plugins import calling, own_function, own_options, takes_any_keyword

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

WHERE = "tune.llm.mode"
PLAIN = "mmit_plain_names"  # attribute of an LLM: {name of a tensor: its name before the method}


def own_method(spec: str) -> Any:
    """Import the function. Raises ConfigError."""
    return own_function(spec, positional=("vlm",), gives="None", where=WHERE)


def read_own_options(spec: str, given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The options of a method of the user's own, defaults filled in. Raises ModelError for unknown and missing ones."""
    function = own_method(spec)
    first = next(iter(own_options(function, ())), "")
    known = own_options(function, (first,))
    for key in given:
        if key not in known and not takes_any_keyword(function):
            remedy = nearest(key, known) if known else "it takes no options"
            raise ModelError(f"{spec} has no option '{key}'", where=where, remedy=remedy)
    found = {key: default for key, default in known.items() if default is not inspect.Parameter.empty} | dict(given)
    if missing := [key for key in known if key not in found]:
        raise ModelError(f"{spec} needs the option '{missing[0]}'", where=where, remedy=f"set {where}.{missing[0]}")
    return found


def apply_own(spec: str, vlm: VLM, options: Mapping[str, Any]) -> None:
    """Run a method of the user's own on a frozen composite. Raises ModelError."""
    # By identity: a method may wrap modules, and a tensor then has another name and is still the same.
    before = {id(tensor): name for name, tensor in base_model(vlm.llm).state_dict(keep_vars=True).items()}
    method, remedy = own_method(spec), "it is called with the composite, all of it frozen, and its options"
    with calling(spec, where=WHERE, remedy=remedy, kind=ModelError):
        method(vlm, **options)
    # All was frozen before the call, so whatever requires a gradient now is the method's.
    trained = [name for name, weight in vlm.llm.named_parameters() if weight.requires_grad]
    if not trained:
        remedy = "set requires_grad of what it trains; to train the projector alone use mode frozen"
        raise ModelError(f"{spec} trains nothing of the LLM", where=WHERE, remedy=remedy)
    if not isinstance(vlm.llm, PeftModel):
        vlm.tuned_names["llm"] = tuple(trained)
    elif len(trained) != len(get_peft_model_state_dict(vlm.llm, save_embedding_layers=False)):
        problem = f"{spec} trains {len(trained)} tensors, and PEFT would save another number of them"
        raise ModelError(problem, where=WHERE, remedy="train what PEFT's adapter holds, modules_to_save included")
    llm = base_model(vlm.llm)
    plain = {name: before[id(t)] for name, t in llm.state_dict(keep_vars=True).items() if id(t) in before}
    # A checkpoint holds what was trained and takes the rest from the base by its own names; a weight that is gone could
    # not be put back.
    if lost := sorted(set(before.values()) - set(plain.values())):
        problem = f"{spec} removes or replaces weights of the LLM, such as {lost[0]}"
        remedy = "keep the model's own parameters and put new ones beside them"
        raise ModelError(problem, where=WHERE, remedy=remedy)
    setattr(llm, PLAIN, plain)


def changes_layout(llm: Any) -> str | None:
    """The name of a tensor that a method of the user's own added or renamed; None without one."""
    plain = getattr(llm, PLAIN, None)
    if plain is None:
        return None
    return next((name for name in llm.state_dict() if plain.get(name) != name), None)
