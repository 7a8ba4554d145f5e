"""Small language models of many architectures from one set of dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmit.models.llm import config_keys


def described(common: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Join the dimensions that a model type has to what makes it special."""
    names = config_keys(options.get("model_type", "llama"))
    return {key: value for key, value in common.items() if key in names} | dict(options)
