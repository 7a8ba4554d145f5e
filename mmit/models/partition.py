"""Weights that ranks divide among themselves while they are loaded (DeepSpeed ZeRO-3), so that none holds all.

Owns the switch that makes transformers and peft build partitioned models, and the few questions a builder has about
a parameter whose tensor is elsewhere. DeepSpeed leaves an empty tensor in place and the shape beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.utils.integrations import gather_params_ctx
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def partitioned(options: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, models are loaded in parts and `gathered` works.

    Args:
        options: a complete DeepSpeed config of stage 3; None changes nothing.
    """
    if options is None:
        yield
        return
    alive = HfDeepSpeedConfig(dict(options))  # transformers keeps a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def gathered(*parameters: nn.Parameter, changed: bool = False) -> Iterator[None]:
    """Gather parameters on every rank, inside `partitioned`; all ranks must come here. Nothing to do elsewhere.

    Args:
        changed: the block writes to them; what rank 0 wrote is kept.
    """
    # Gathering is a collective call: where nothing is divided it must not happen at all.
    if not is_deepspeed_zero3_enabled() or not any(is_part(p) for p in parameters):
        yield
        return
    with gather_params_ctx(list(parameters), modifier_rank=0 if changed else None):
        yield


def is_part(parameter: torch.Tensor) -> bool:
    """This rank holds a part of the tensor only."""
    return hasattr(parameter, "ds_shape")


def shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the whole tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def numel(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in whole tensors."""
    return sum(shape(p).numel() for p in parameters)
