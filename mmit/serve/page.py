"""The page to chat on, with a policy under which a browser loads and runs nothing but what stands in it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Page:
    """Its bytes, and its Content-Security-Policy."""

    body: bytes
    policy: str

    @classmethod
    def load(cls) -> Page:
        """Read the file; what may run is named by its digest."""
        text = resources.files(__package__ or "").joinpath("page.html").read_text("utf-8")

        def digests(tag: str) -> str:
            found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
            return " ".join(
                f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in found
            )

        rules = {
            "default-src": "'none'",
            "script-src": digests("script"),
            "style-src": digests("style"),
            "img-src": "data: blob:",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        return cls(text.encode(), "; ".join(f"{name} {value}" for name, value in rules.items()))
