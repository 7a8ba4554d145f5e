"""Messages in OpenAI's chat format: texts as they are, images as data URLs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from mmit.data.images import load_rgb
from mmit.records import Image, Turn


def openai_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return turns as OpenAI messages. Raises ImageError."""
    result: list[dict[str, Any]] = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, Image):
                parts.append({"type": "image_url", "image_url": {"url": _data_url(part)}})
            else:
                parts.append({"type": "text", "text": part.text})
        plain = all(part["type"] == "text" for part in parts)
        result.append({"role": turn.role, "content": turn.text if plain else parts})
    return result


def _data_url(image: Image) -> str:
    out = BytesIO()
    load_rgb(image).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
