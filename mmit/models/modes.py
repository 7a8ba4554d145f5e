"""Train and evaluation mode of a whole model, set for a while.

Owns the one context that every probe runs in: whatever asks a model about itself (do packed records meet, where does
its head begin, what is the held-out loss) must not depend on dropout. PEFT adds modules in train mode to a model in
evaluation mode, so the mode of the root says nothing about its children.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into evaluation mode inside, and each back into its own mode afterwards."""
    with _mode(model, False):
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into train mode as its own `train()` does (a frozen tower stays as it is), and back afterwards."""
    with _mode(model, True):
        yield


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            if module.training != before:  # setting an attribute of a module is slow
                module.training = before
