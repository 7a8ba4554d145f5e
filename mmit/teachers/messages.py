"""Messages in OpenAI's chat format: texts as they are, images as data URLs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import PIL.Image

from mmit.data.images import load_rgb
from mmit.records import Image, Turn


def openai_messages(turns: Sequence[Turn], *, where: str = "", blank: bool = False) -> list[dict[str, Any]]:
    """Return turns as OpenAI messages; `blank` makes every image grey. Raises ImageError, placed at `where`."""
    result: list[dict[str, Any]] = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, Image):
                url = _data_url(part, where=where, blank=blank)
                parts.append({"type": "image_url", "image_url": {"url": url}})
            else:
                parts.append({"type": "text", "text": part.text})
        plain = all(part["type"] == "text" for part in parts)
        result.append({"role": turn.role, "content": turn.text if plain else parts})
    return result


def _data_url(image: Image, *, where: str, blank: bool) -> str:
    picture = load_rgb(image, where=where)
    if blank:
        picture = PIL.Image.new("RGB", picture.size, (127, 127, 127))
    out = BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
