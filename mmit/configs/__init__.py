"""The configs that ship inside the package and are read by name: DeepSpeed's JSON files, evaluation tasks and
banks of templates.

In: a kind (`deepspeed`, `eval`) and a name or a path. Out: the path of a file. It reads no file.
The recipes of `mmit train` are not here: they are files to copy, under configs/train in the repository.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

SUFFIXES = {"deepspeed": ".json", "eval": ".yaml"}


def shipped(kind: str) -> dict[str, Path]:
    """Return {name: file} of all shipped configs of `kind`."""
    folder = Path(str(resources.files(__name__))) / kind
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIXES[kind]}"))}


def shipped_banks() -> dict[str, list[Path]]:
    """Return {name: files} of the shipped banks of templates; each is a folder with one file a task."""
    folder = Path(str(resources.files(__name__))) / "templates"
    return {path.name: sorted(path.glob("*.yaml")) for path in sorted(folder.iterdir()) if path.is_dir()}


def moved(kind: str, path: str | os.PathLike[str]) -> Path:
    """Return `path`, or the shipped file if it is configs/KIND/NAME, where that file was before it moved in here."""
    given = Path(path)
    if not given.exists() and given.parent.parts[-2:] == ("configs", kind) and given.suffix == SUFFIXES[kind]:
        return shipped(kind).get(given.stem, given)
    return given
