"""mmit: multimodal instruction tuning.

`mmit.load(folder)` gives a model that chats, `mmit.train(model, data, ...)` trains one, `mmit.Record` is the one record
type. Attributes are resolved lazily so that `import mmit` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Image", "MmitError", "Record", "Text", "Turn", "__version__", "load", "lora", "train"]

_HOME = {
    "load": "mmit.generate",
    "lora": "mmit.api",
    "Record": "mmit.records",
    "Turn": "mmit.records",
    "Text": "mmit.records",
    "Image": "mmit.records",
    "MmitError": "mmit.errors",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the package, which can be called
        return import_module("mmit.train")
    if name not in _HOME:
        raise AttributeError(f"module 'mmit' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
