"""The chat format that the section `model.chat` of a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmit.data.chat import ChatFormat, chat_format
from mmit.errors import located


def chat_of(section: Mapping[str, Any], tokenizer: Any, *, date: str | None = None) -> ChatFormat:
    """Build the chat format; `date` (ISO) is the day of a template that asks for it, None for today.

    Raises ConfigError, placed at model.chat.format.
    """
    given = dict(section)
    with located("model.chat.format"):
        return chat_format(given.pop("format"), tokenizer, date=date, **given)
