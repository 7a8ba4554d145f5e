"""The HTML pages mmit writes: one document, one style sheet, and the parts that several pages have.

In: text and cells, escaped here; or HTML that a part of this module made. Out: one file that needs nothing beside it,
with a policy that lets a browser load nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from importlib import resources
from io import BytesIO
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from mmit.text import escape, plain

if TYPE_CHECKING:
    import PIL.Image

KINDS = ("run", "evaluation", "records", "record")


def page(title: str, *sections: str, kind: str) -> str:
    """Return a whole page.

    Args:
        title: text.
        sections: HTML.
        kind: of KINDS; the style sheet has a part for each.
    """
    body = Markup("\n".join(filter(None, sections)))
    return _templates().get_template("page.html").render(title=plain(title), style=_style(), kind=kind, body=body)


def table(rows: Sequence[Sequence[str]], *, kind: str = "", head: bool = True) -> str:
    """Return a table of texts; `head`: the first row is the header, else the first column is."""
    cells = [[plain(cell) for cell in row] for row in rows]
    return _templates().get_template("table.html").render(rows=cells, kind=kind, head=head)


def pre(text: str) -> str:
    """Return preformatted text."""
    return f"<pre>{escape(text)}</pre>"


def inline_image(picture: PIL.Image.Image, *, alt: str = "", quality: int = 85) -> str:
    """Return an image as an <img> that holds its JPEG."""
    out = BytesIO()
    picture.save(out, "JPEG", quality=quality)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img alt="{escape(alt)}" {size} src="data:image/jpeg;base64,{data}">'


@cache
def _templates() -> Environment:
    return Environment(loader=PackageLoader("mmit.pages", ""), autoescape=True, trim_blocks=True)


@cache
def _style() -> Markup:
    return Markup(resources.files(__name__).joinpath("style.css").read_text("utf-8"))
