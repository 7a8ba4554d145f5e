"""From a folder or a hub id to a model that is ready to answer.

In: a checkpoint, a run, or a folder of another project. Out: a `Model`, in the number format that the device computes
fast unless another is asked for. Refuses a folder that is not whole, and code that it was not allowed to run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from mmit import precision
from mmit.errors import ConfigError, nearest
from mmit.generate.model import Model
from mmit.interop.foreign import OPTIONS, Foreign, check_options, is_foreign, read_foreign, settle
from mmit.models.hub import model_folder
from mmit.models.llm import DTYPES, fewer_bits, usable_device

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

NAMES = {dtype: name for name, dtype in precision.HALVES.items()}


class Loading(TypedDict, total=False):
    """How the weights of a model are loaded.

    device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
    dtype: number format of the weights ("bf16", "fp16", "fp32"); None takes the one of training, and fp32 where the
        device computes that faster, unless fewer bits or a device map were asked for because of its memory.
    device_map: placement of a large LLM as in transformers: "auto", or modules to devices, "cpu" or "disk".
    offload_folder: where a device map keeps what goes to disk.
    load_in_8bit, load_in_4bit: linear layers of the LLM in fewer bits, by bitsandbytes.
    """

    device: str
    dtype: str | torch.dtype | None
    device_map: str | dict[str, Any] | None
    offload_folder: str | None
    load_in_8bit: bool
    load_in_4bit: bool


def load(
    folder: str | os.PathLike[str],
    *,
    untuned: bool = False,
    template_args: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    chat: str | None = None,
    base: str | None = None,
    tower: str | None = None,
    **loading: Unpack[Loading],
) -> Model:
    """Load a model for use.

    Args:
        folder: a checkpoint; a run, whose newest checkpoint is then taken; a llava-hf folder or one of LLaVA's own;
            or the hub id of one of these (`owner/name`, `owner/name@revision`).
        untuned: the model as it was before training (base weights, a freshly drawn projector), for comparison.
        template_args: variables for the chat template besides those of training, such as enable_thinking.
        allow_code: import modules that the checkpoint names for parts of the user's own, from the working directory and
            the Python path; without it such a checkpoint is refused. Code of other projects' folders is never run.
        chat: for folders of other projects, a chat format in place of the folder's template.
        base, tower: for LLaVA's own folders; see `interop.foreign.read_foreign`.
        loading: device, dtype, device_map, offload_folder, load_in_8bit and load_in_4bit, see `Loading`.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, or names code without `allow_code`.
        ModelError: a part of the model cannot be built, or the hub does not give it.
        ConfigError: no such dtype, or an option that this kind of folder does not take.
    """
    from mmit.train.checkpoint.model import LargeLLM, load_model  # here, so that a live model is used without it

    for name in loading:
        if name not in Loading.__annotations__:
            known = [*Loading.__annotations__, *OPTIONS, "untuned", "template_args", "allow_code"]
            raise ConfigError(f"unknown option '{name}'", where="load", remedy=nearest(name, known))
    foreign = check_options({"chat": chat, "base": base, "tower": tower})
    device, dtype = loading.get("device", "auto"), _number_format(loading)
    device_map, offload = loading.get("device_map"), loading.get("offload_folder")
    path = model_folder(folder)
    bits = fewer_bits(load_in_8bit=loading.get("load_in_8bit", False), load_in_4bit=loading.get("load_in_4bit", False))
    if is_foreign(path):
        if bits and device_map is None and device != "auto":
            device_map = {"": device}
        placed: dict[str, Any] = {"device_map": device_map, "offload": offload, "quantization": bits}
        return _load_foreign(path, device, dtype, placed, template_args or {}, foreign)
    if given := [name for name, value in foreign.items() if value]:
        problem = f"{given[0]} is for folders of other projects; a checkpoint says it itself"
        raise ConfigError(problem, where=str(folder), remedy=f"leave {given[0]} out")
    large, options = LargeLLM(device_map, offload, bits), {"untuned": untuned, "allow_code": allow_code}
    found = load_model(path, device=device, dtype=dtype or "fast", large=large, **options)
    facts: dict[str, Any] = {"image": found.image, "folder": found.folder, "meta": found.meta, "notes": found.notes}
    return Model(found.vlm, found.tokenizer, found.chat.with_template_args(template_args or {}), **facts)


def _number_format(loading: Loading) -> torch.dtype | None:
    """The number format that was asked for; warns where the device computes another one faster."""
    dtype = loading.get("dtype")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype '{dtype}'", remedy=nearest(dtype, DTYPES))
        dtype = DTYPES[dtype]
    if dtype in NAMES:
        slow = precision.warning(usable_device(loading.get("device", "auto")), NAMES[dtype])
        if slow is not None:
            warnings.warn(slow, stacklevel=3)
    return dtype


def _load_foreign(
    path: Path,
    device: str,
    dtype: torch.dtype | None,
    placed: dict[str, Any],
    template_args: Mapping[str, Any],
    options: Mapping[str, str | None],
) -> Model:
    """A model of another project. `placed` are fields of `llm.Placement`, `options` those of `read_foreign`."""
    other = read_foreign(path, dtype=dtype, **placed, **options)
    fixed = dtype or placed["device_map"] or placed["quantization"]
    notes = [] if fixed else _adapt(other, usable_device(device))
    settle(other, device=device, device_map=placed["device_map"] or placed["quantization"])
    meta = {"chat": other.chat.to_json(), "image": other.image, "image_tokens": other.vlm.image_tokens}
    form = other.chat.with_template_args(template_args)
    return Model(other.vlm, other.tokenizer, form, image=other.image, folder=path, meta=meta, notes=notes)


def _adapt(found: Foreign, place: torch.device) -> list[str]:
    """Bring weights of 16 bits to float32 where the device computes that faster; returns what to say about it."""
    name = NAMES.get(found.dtype)
    if name is None:
        return []
    fast, reason = precision.fast_half(place, name)
    if fast:
        return []
    found.vlm.float()
    return [f"stored in {name}, loaded in fp32: {reason}"]
