"""Benchmarks as their makers distribute them: a folder of downloaded files becomes questions.

LAYOUTS has one entry per file layout; `read` reads one. A folder that is not as expected raises one ConfigError
that lists the files, their places and where to get them. Never downloads, never scores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mmit.errors import ConfigError, RecordError, nearest
from mmit.eval.layouts import captions, choice, judged, medical, text, vqa, yesno
from mmit.eval.layouts.common import LETTER, SHORT, Folder, Layout, Questions
from mmit.plugins import FORM, is_spec, own_object

if TYPE_CHECKING:
    from mmit.records import Record

__all__ = ["LAYOUTS", "LETTER", "SHORT", "Folder", "Layout", "Questions", "check_options", "find_layout", "read"]

LAYOUTS: dict[str, Layout] = {
    **vqa.LAYOUTS,
    **yesno.LAYOUTS,
    **choice.LAYOUTS,
    **captions.LAYOUTS,
    **text.LAYOUTS,
    **judged.LAYOUTS,
    **medical.LAYOUTS,
}


def find_layout(name: str) -> Layout:
    """Return `LAYOUTS[name]`, or the Layout that `module:NAME` of the user's own names. Raises ConfigError."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    if not is_spec(name):
        remedy = f"{nearest(name, LAYOUTS)}, or {FORM} of your own"
        raise ConfigError(f"unknown layout '{name}'", where="layout", remedy=remedy)
    expects = "a mmit.eval.layouts.Layout"
    found = own_object(name, where="layout", expects=expects)
    if not isinstance(found, Layout):
        problem = f"{name} is a {type(found).__name__}"
        raise ConfigError(problem, where="layout", remedy=f"needed here is {expects}")
    return found


def check_options(layout: str, split: str | None, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown layout, split or option; it lists the valid ones."""
    entry = find_layout(layout)
    if split is not None and split not in entry.splits:
        problem = f"layout '{layout}' has no split '{split}'"
        raise ConfigError(problem, where="split", remedy=nearest(split, entry.splits))
    for option in options:
        if option not in entry.options:
            remedy = nearest(option, entry.options) if entry.options else "It has none: leave options out."
            raise ConfigError(f"layout '{layout}' has no option '{option}'", where="options", remedy=remedy)


def read(
    layout: str, folder: str | os.PathLike[str], *, task: str, split: str | None = None, **options: Any
) -> Iterator[Record]:
    """Yield the questions of a benchmark's folder.

    Each record ends with the user's turn; its meta has `reference`, and where there are any `group` and `choices`
    (see `mmit.eval.layouts.common`). Every picture file is looked for, none opened.

    Args:
        layout: a name, or `module:name`. folder: the files that the user downloaded.
        task: for errors. split: None takes the layout's first. options: the layout's.

    Raises:
        ConfigError: missing files, naming all that are expected and where to get them.
        RecordError: a row that is not as expected.
    """
    check_options(layout, split, options)
    entry = find_layout(layout)
    place = Folder(folder, entry, task=task, split=split or entry.splits[0])
    seen: set[str] = set()
    if not place.path.is_dir():
        raise place.lacks("its files")
    try:
        for record in entry.read(place, place.split, **options):
            for image in record.images:
                if isinstance(image.source, str) and image.source not in seen:
                    if not os.path.isfile(image.source):
                        raise place.lacks(f"the picture {image.source}")
                    seen.add(image.source)
            yield record
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        problem = f"not as layout '{layout}' has it: {type(error).__name__} {error}"
        remedy = f"Check that the file is the one described, or fetch it again: {entry.get}"
        raise RecordError(problem, where=place.at, remedy=remedy) from error
