"""GGUF files: written tensor by tensor, read back and held against what was to be written.

Goes in: an architecture's name, a function that writes its keys, tensors, a number format. Comes out: one file. Refuses
numbers that the format has no room for. Vectors stay float32, as llama.cpp has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.errors import ModelError

if TYPE_CHECKING:
    import torch

# mmit's names of number formats -> gguf's. q8_0: blocks of 32 whole numbers of 8 bits with a scale each.
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
BLOCK = 32
LARGEST_HALF = 65504.0
PLAIN = ("position_embd", "class_embd")  # in float32 whatever the format: llama.cpp adds them to activations
CONVOLUTION = "patch_embd.weight"  # llama.cpp's has no blocks


def library() -> Any:
    """Return the package gguf. Raises ModelError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError("needs the package gguf", where="--format gguf", remedy="pip install 'mmit[gguf]'") from None
    return gguf


def kind_of(name: str, tensor: torch.Tensor, dtype: str) -> str:
    """Number format of one tensor, as gguf calls it: rows that are no whole blocks take 16 bits instead of 8."""
    if tensor.dim() < 2 or any(part in name for part in PLAIN):
        return "F32"
    if dtype == "q8_0" and (tensor.shape[-1] % BLOCK or name.endswith(CONVOLUTION)):
        return "F16"
    return TYPES[dtype]


def write_gguf(
    path: Path, arch: str, keys: Callable[[Any], None], tensors: Mapping[str, torch.Tensor], *, dtype: str
) -> None:
    """Write a file.

    Args:
        arch: `general.architecture`. keys: called with the GGUFWriter.
        tensors: name -> tensor, slowest dimension first; any number format, converted one at a time.
        dtype: a key of TYPES.

    Raises:
        ModelError: a number is too large for 16 bits, or is none.
    """
    gguf = library()
    writer = gguf.GGUFWriter(path, arch=arch)
    keys(writer)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(TYPES[dtype], f"MOSTLY_{TYPES[dtype]}")])
    kinds = {name: gguf.GGMLQuantizationType[kind_of(name, tensor, dtype)] for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[name])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        numbers = _numbers(name, tensor)
        if kinds[name].name == "F16" and np.abs(numbers).max(initial=0.0) > LARGEST_HALF:
            problem = f"a weight of {name} is {np.abs(numbers).max():,.0f}, and fp16 ends at {LARGEST_HALF:,.0f}"
            raise ModelError(problem, where=path.name, remedy="export with --dtype bf16 or --dtype fp32")
        writer.write_tensor_data(gguf.quantize(numbers, kinds[name]).view(np.uint8))
    writer.close()


def _numbers(name: str, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    numbers = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    if not np.isfinite(numbers).all():
        raise ModelError(f"{name} holds numbers that are not finite", remedy="export an earlier checkpoint of the run")
    return numbers


def check_written(path: Path, tensors: Mapping[str, torch.Tensor]) -> float:
    """Read a file back and return the largest error of a number, as a share of what rounding allows.

    Raises:
        ModelError: a tensor is missing, left over, of another shape, or further off than its format rounds.
    """
    gguf = library()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != tensors.keys():
        apart = sorted(found.keys() ^ tensors.keys())
        _defect(path, f"{len(apart)} tensors are missing or left over, such as {apart[0]}")
    worst = 0.0
    for name, tensor in tensors.items():
        kind, given = found[name].tensor_type, tensor.detach().float().cpu().numpy()
        read = gguf.dequantize(found[name].data, kind)
        if read.shape != given.shape:
            _defect(path, f"{name} has the shape {read.shape} instead of {given.shape}")
        limit = rounding(given, kind.name)
        share = float(np.max(np.abs(read - given) / np.maximum(limit, 1e-30), initial=0.0))
        if not share <= 1:
            _defect(path, f"{name} is further off than {kind.name} rounds")
        worst = max(worst, share)
    return worst


def rounding(numbers: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Most that a number may be off in a format: half a step of its own size, or of the largest of its block."""
    if kind == "F32":
        return np.full_like(numbers, 0.0)
    if kind == "Q8_0":
        blocks = np.abs(numbers).reshape(-1, BLOCK).max(axis=1, keepdims=True)
        # Half a step of 1/127; the scale itself is rounded to 16 bits, which 127 steps multiply.
        steps = blocks / 127 * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25
        return np.broadcast_to(steps, (len(blocks), BLOCK)).reshape(numbers.shape)
    share, floor = {"F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}[kind]
    return np.abs(numbers) * share + floor


def _defect(path: Path, problem: str) -> None:
    raise ModelError(f"does not hold what was written: {problem}", where=path.name, remedy="check the disk, try again")
