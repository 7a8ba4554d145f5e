"""Several adapters on one base: models that share an LLM and a tower, each with its own adapter and projector.

Takes a loaded model and checkpoints of the same base, gives a model for each. One adapter works at a time: an engine
decodes each model's answers as a batch of their own, and puts the adapter to work before each step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from peft import PeftModel

from mmit.errors import ConfigError
from mmit.generate import Model
from mmit.train.checkpoint.adapters import read_further


def with_adapters(model: Model, folders: Mapping[str, str | os.PathLike[str]]) -> dict[str, Model]:
    """Load adapters onto the base of a model, which goes on answering as before.

    Args:
        model: loaded from a checkpoint of mmit.
        folders: name -> checkpoint or run.

    Returns:
        name -> a model that shares its LLM and tower with `model`.

    Raises:
        CheckpointError: a checkpoint of another base, or one that holds more than an adapter and a projector.
        ConfigError: `model` has no checkpoint of mmit.
    """
    if model.folder is None or not (model.folder / "config.yaml").exists():
        remedy = "Serve a run or a checkpoint of mmit, or leave the adapters out."
        raise ConfigError("adapters need a base that is a checkpoint of mmit", where=str(model.folder), remedy=remedy)
    own = model.vlm.llm.active_adapter if isinstance(model.vlm.llm, PeftModel) else None
    switch, vlm, found = _Switch(own), model.vlm, dict[str, Model]()
    for number, (name, folder) in enumerate(folders.items()):
        inner = f"further{number}"  # PEFT's name; a dot would be a module's
        read = read_further(vlm, model.folder, os.fspath(folder), name=inner, tokenizer=model.tokenizer)
        switch.llm = read.vlm.llm
        # A wrapped LLM takes the next adapter; what it is wrapped around stays the base's own.
        vlm = read.vlm
        made = Model(read.vlm, read.tokenizer, read.chat, image=read.image, folder=read.folder, meta=read.meta)
        made.activate = partial(switch.turn, inner)
        found[name] = made
    if found:
        switch.now = "?"  # loading may have put another to work
        model.activate = partial(switch.turn, own)
    return found


class _Switch:
    """Which adapter of an LLM is at work."""

    def __init__(self, own: str | None) -> None:
        self.llm: Any = None
        self.now: str | None = own

    def turn(self, name: str | None) -> None:
        """Put an adapter to work; None for none."""
        if name == self.now or self.llm is None:
            return
        if name is None:
            self.llm.base_model.disable_adapter_layers()
        else:
            self.llm.base_model.enable_adapter_layers()
            self.llm.set_adapter(name)
            self.llm.requires_grad_(False)
        self.now = name
