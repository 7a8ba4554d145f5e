"""Text from data, paths and models on its way to a person: shown as it stands, and unable to act on what shows it.

In: any text. Out: the same, with what would move a cursor, ring, clear a screen or turn the direction of reading
written as its code (`\\x1b`, `\\u202e`). Nothing is read as markup. Every message of mmit goes through here, by
`terminal`, `echo`, or `escape` for HTML; `tests/test_text.py` keeps other ways out.
"""

from __future__ import annotations

import html
import sys
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Joiners are how some scripts and emoji are written; all else of category Cf is invisible or turns the direction.
_JOINERS = "\u200c\u200d"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, halves of surrogate pairs, separators of lines


@lru_cache(maxsize=1 << 14)
def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t" or character in _JOINERS:
        return character
    if unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()


def plain(text: object) -> str:
    """Return `str(text)` in which nothing can act on a terminal or a page; line breaks and tabs stay."""
    given = str(text)
    return given if given.isprintable() else "".join(map(_shown, given))


def escape(text: object) -> str:
    """Return `plain` text for HTML, also between quotes."""
    return html.escape(plain(text))


def terminal(**options: Any) -> Console:
    """Return a console of rich, with rich's `options`, that shows text as `plain` does and knows no markup."""
    return _console_class()(**{"markup": False, "emoji": False, "highlight": False, **options})


@lru_cache(maxsize=1)
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            """Rich would leave out a few controls, such as the bell, without a word."""
            return super().render_str(plain(text), **options)

        def render(self, renderable: Any, options: Any = None) -> Any:
            """Every piece of text comes by here, whatever it is part of; rich's own controls are marked as such."""
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(plain(segment.text), segment.style)

    return PlainConsole


def echo(text: object = "", *, err: bool = False, end: str = "\n", exact: bool = False) -> None:
    """Print a line.

    Args:
        exact: print the very characters where the stream is no terminal, for what another program reads.
    """
    stream = sys.stderr if err else sys.stdout
    shown = str(text) if exact and not stream.isatty() else plain(text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write((shown + end).encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
