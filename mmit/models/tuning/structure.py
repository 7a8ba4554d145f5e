"""Where things are in a language model: its decoder layers, their attention and feed-forward part, its norms.

Finds them by what they are (number, parameters, what transformers' attention modules carry), never by the name of a
model. Refuses a model that is not laid out so, and says what it found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import nn

from mmit.errors import ModelError
from mmit.models.partition import shape


def base_model(llm: Any) -> Any:
    """The model under PEFT's wrapper, or the model itself."""
    return llm.get_base_model() if isinstance(llm, PeftModel) else llm


def decoder_layers(llm: Any) -> nn.ModuleList:
    """The one list of decoder layers: as many as the config says, each with an attention module.

    Raises:
        ModelError: there is no such list, or more than one.
    """
    llm = base_model(llm)
    # Several lists of modules may be as long (experts, say): attention in each entry is what tells the layers.
    count = llm.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in llm.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(attentions, module))
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(llm).__name__} has {len(found)} lists of {count} layers with attention in each; expected one",
            where="tune.llm.mode",
            remedy="use lora, bitfit without insert_biases, layernorm or soft_prompt, which need no layer list",
        )
    return found[0]


def attentions(layer: nn.Module) -> list[str]:
    """Children that carry a layer number, as transformers' attention modules do for their cache."""
    return [name for name, child in layer.named_children() if _matrices(child) >= 2 and hasattr(child, "layer_idx")]


def _matrices(module: nn.Module) -> int:
    return sum(len(shape(p)) >= 2 for p in module.parameters())


def attention_and_mlp(layer: nn.Module) -> tuple[str, str]:
    """Names of a decoder layer's attention and of its feed-forward child.

    Raises:
        ModelError: the layer does not have exactly one of each.
    """
    found = attentions(layer)
    others = [n for n, child in layer.named_children() if n not in found and _matrices(child) >= 2]
    if len(found) != 1 or len(others) != 1:
        raise ModelError(
            f"{type(layer).__name__} has attention {found or 'nowhere'} and feed-forward {others or 'nowhere'}; "
            f"its children are {[n for n, _ in layer.named_children()]}",
            where="tune.llm.options.after",
            remedy="name the children to put adapters after, e.g. after: [self_attn, mlp]",
        )
    return found[0], others[0]


def norms(module: nn.Module) -> Iterator[str]:
    """Names of modules that only scale (and shift) each channel: LayerNorm, RMSNorm, batch norm, of any class."""
    for name, child in module.named_modules():
        own = list(child.parameters(recurse=False))
        leaf = next(child.children(), None) is None
        if leaf and own and all(len(shape(p)) == 1 for p in own) and hasattr(child, "weight"):
            yield name
