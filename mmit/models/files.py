"""Weight files: where they are and what tensors they hold.

A file is named by a path, or by `package:name/inside/it` for a file that an installed Python package carries.
In goes such a name, out comes a Path, or a flat dict of named tensors. Nothing is downloaded here, and a file
that would have to run code to be read is refused.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmit.errors import ModelError, nearest

PACKAGE = "package:"
PICKLED = (".pth", ".pt", ".bin", ".ckpt")


def resolve_file(spec: str | Path) -> Path:
    """Return the existing file that `spec` names: a path, or `package:some_package/folder/file`.

    Raises ModelError when the package is not installed (with the `pip install` line) or the file is not there
    (with the nearest name in that folder).
    """
    text = str(spec)
    if not text.startswith(PACKAGE):
        return _existing(Path(text).expanduser(), where=text)
    package, *inside = PurePosixPath(text.removeprefix(PACKAGE)).parts or ("",)
    # A config may come from elsewhere: it must not name a file outside of the package.
    if not inside or ".." in inside or not package.isidentifier():
        raise ModelError(
            "not the name of a file in a package",
            where=text,
            remedy="write it as package:some_package/folder/file",
        )
    # A top-level name is looked up without importing it, so no code of the package runs.
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the Python package '{package}' is not installed",
            where=text,
            remedy=f"run: pip install {package.replace('_', '-')}",
        )
    candidates = [Path(folder, *inside) for folder in found.submodule_search_locations]
    return next((path for path in candidates if path.is_file()), None) or _existing(candidates[0], where=text)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a .safetensors, .pth, .pt, .bin or .ckpt file, on the CPU, in file order.

    A checkpoint that wraps its tensors in a `state_dict` or `model` entry is unwrapped. Raises ModelError for
    another suffix, a damaged file, or a pickle that holds more than tensors.
    """
    path = Path(path)
    where = str(path)
    if path.suffix != ".safetensors":
        if path.suffix not in PICKLED:
            raise ModelError(
                f"unknown weight format '{path.suffix}'",
                where=where,
                remedy=f"valid: .safetensors, {', '.join(PICKLED)}",
            )
        loaded = load_pickle(path)
    else:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _unreadable(error, where) from error
    # timm, MAE and Lightning wrap their tensors so. Optimizer states and counters beside them are left in the file.
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ModelError(
            "not a flat dict of named tensors", where=where, remedy="save model.state_dict() as .safetensors"
        )
    return dict(loaded)


def load_pickle(path: Path) -> Any:
    """Read what torch.save wrote, on the CPU, if it holds tensors and plain containers alone. Raises ModelError."""
    where = str(path)
    try:
        # weights_only: a pickle is a program, and this reader knows tensors and containers alone.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            "the file holds more than tensors, and reading it could run code",
            where=where,
            remedy="save its state_dict as .safetensors",
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise _unreadable(error, where) from error


def _unreadable(error: Exception, where: str) -> ModelError:
    return ModelError(f"cannot be read: {error}", where=where, remedy="is the download complete?")


def _existing(path: Path, *, where: str) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError("is a folder, and a file is needed", where=where, remedy=_listing(path, ""))
    if not path.parent.is_dir():
        raise ModelError(f"there is no folder '{path.parent}'", where=where, remedy="check the path")
    raise ModelError("there is no such file", where=where, remedy=_listing(path.parent, path.name))


def _listing(folder: Path, name: str) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())[:20]
    return nearest(name, names) if names else f"'{folder}' holds no files"
