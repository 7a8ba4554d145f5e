"""The same bits from the same run on CUDA: `train.deterministic`.

Some CUDA kernels add in the order in which their threads finish (the backward passes of flash attention and of index
lookups), so two runs of one config differ in their last bits. Owns the switches that make torch choose other kernels,
and the error where it has none. On a CPU a run is deterministic anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmit.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
SIZES = (":4096:8", ":16:8")  # with which cuBLAS is deterministic, as its documentation has it; the first is the faster


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch computes deterministically; to be entered before the process computes on CUDA.

    `wanted` off changes nothing. Raises ConfigError where the environment has another workspace of cuBLAS, and for a
    computation of which torch has no deterministic kernel.
    """
    if not wanted:
        yield
        return
    given = os.environ.setdefault(WORKSPACE, SIZES[0])  # read when cuBLAS starts; torch checks it at each product
    if given not in SIZES:
        raise ConfigError(
            f"{WORKSPACE} is '{given}' in the environment, with which cuBLAS is not deterministic",
            where="train.deterministic",
            remedy=f"unset it, or set it to {SIZES[0]}",
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its one setting is a property that its stubs do not have
    fill = memory.fill_uninitialized_memory
    # Not warn_only, which leaves flash attention as it was. Memory is not filled: a kernel that reads what nothing
    # wrote is a bug that filling would hide, at the price of a pass over every new tensor.
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(
            f"torch cannot compute this model deterministically: {str(error).splitlines()[0]}",
            where="train.deterministic",
            remedy="set train.deterministic=false; a resumed run is then exact in the order of its data",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
