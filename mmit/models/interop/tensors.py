"""Tensors of other projects' checkpoint folders: which files hold them, and which part each belongs to.

Goes in: a folder, or tensors under foreign names. Comes out: flat dicts of tensors per part, under the names of the
part's own class. Strict both ways: a key that no part claims, and a key that a part lacks, are errors with the list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmit.errors import ModelError
from mmit.models.files import load_tensors

if TYPE_CHECKING:
    import torch

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a Hugging Face folder: one file or shards with an index, safetensors before `.bin`.

    Raises ModelError when there are none, when a shard is missing, or when index and shards disagree.
    """
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    single = next((folder / name for name in SINGLE if (folder / name).is_file()), None)
    if single is not None and (index is None or single.suffix == ".safetensors"):
        return load_tensors(single)
    if index is None:
        raise ModelError(
            "holds no weights", where=str(folder), remedy=f"expected one of: {', '.join((*SINGLE, *INDEXES))}"
        )
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(index), remedy="fetch the folder again") from error
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(set(places.values())):
        # Contract: an index names files of its own folder. It may come from anyone, and must not name others.
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ModelError(f"names the shard '{shard}', which is not there", where=str(index), remedy="fetch it")
        found.update(load_tensors(folder / shard))
    complain("the shards do not hold what their index lists", missing=set(places) - set(found), where=str(index))
    return found


def split_by_prefix(
    tensors: Mapping[str, torch.Tensor], prefixes: Sequence[tuple[str, str, str]], *, where: str
) -> dict[str, dict[str, torch.Tensor]]:
    """Sort tensors into parts.

    Args:
        tensors: by their name in the file.
        prefixes: (prefix in the file, part, prefix in the part); the first that fits is taken.
        where: for messages.

    Returns:
        part -> tensors by their name in the part.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for _, part, _ in prefixes}
    unclaimed = []
    for key, tensor in tensors.items():
        # In the given order: a prefix must be tried before a shorter one that it begins with.
        for prefix, part, own in prefixes:
            if key.startswith(prefix):
                parts[part][own + key.removeprefix(prefix)] = tensor
                break
        else:
            unclaimed.append(key)
    complain("the weights do not fit this layout", left_over=unclaimed, where=where)
    return parts


def complain(
    problem: str,
    *,
    missing: Iterable[str] = (),
    left_over: Iterable[str] = (),
    shapes: Iterable[str] = (),
    where: str,
    remedy: str = "the folder is incomplete, or of another layout than its config.json says",
) -> None:
    """Raise a ModelError that lists what is missing, left over or of another shape; return if nothing is.

    Args:
        problem: what the lists show, in a few words.
        missing, left_over: names of tensors. shapes: name, shape and the shape that is expected, as text.
        where, remedy: of the error.
    """
    told = [
        f"{len(keys)} {what}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
        for what, keys in (
            ("missing", sorted(missing)),
            ("left over", sorted(left_over)),
            ("of another shape", sorted(shapes)),
        )
        if keys
    ]
    if told:
        raise ModelError(f"{problem} ({'; '.join(told)})", where=where, remedy=remedy)


def fill_module(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Load tensors whose names and shapes are exactly those of a module. Raises ModelError with the differences."""
    own = module.state_dict()
    complain(
        f"the weights do not fit {type(module).__name__}",
        missing=own.keys() - tensors.keys(),
        left_over=tensors.keys() - own.keys(),
        shapes=[
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & tensors.keys()
            if own[key].shape != tensors[key].shape
        ],
        where=where,
    )
    # Strict once more; the lists above say all at once, where torch's own error would be a page.
    module.load_state_dict(dict(tensors))
