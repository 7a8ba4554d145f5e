"""What transformers reads of a `.gguf` file, read once.

It opens the file anew for the config, the tokenizer and the weights, walks through the entries of the tokenizer one by
one each time, and makes the table of tensor names again for every module of the model: 17 of the 21 processor seconds
that SmolLM2-135M takes. The functions it calls for that are replaced while `read_once` is entered, and give the
same answers. Nothing here knows what the keys of a file mean.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_lock = threading.RLock()  # what is replaced belongs to the process


@functools.lru_cache(maxsize=1)
def _described(path: str, changed: tuple[int, int], load: Any) -> dict[str, Any]:
    return load(path)


@contextmanager
def read_once() -> Iterator[None]:
    """Read a file's entries once in the process, and its tensors once while this is entered."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:  # transformers names it where it is needed
        yield
        return
    legacy: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with _lock:
        if not isinstance(gguf.GGUFReader, type):  # replaced already, further up in this thread
            yield
            return
        load = legacy.load_gguf_checkpoint

        class Reader(gguf.GGUFReader):  # type: ignore[misc]
            data: Any

            def _get(self, *args: Any, **kwargs: Any) -> Any:
                # Slices of numpy's memmap cost five times those of a plain array over the same bytes.
                self.data = self.data.view(np.ndarray)
                return super()._get(*args, **kwargs)

        def described(path: Any, return_tensors: bool = False, **kwargs: Any) -> Any:
            if return_tensors:
                return load(path, return_tensors=True, **kwargs)
            stat = os.stat(path)
            return copy.deepcopy(_described(str(path), (stat.st_size, stat.st_mtime_ns), load))

        found = (gguf.GGUFReader, gguf.get_tensor_name_map, load)
        gguf.GGUFReader = functools.lru_cache(maxsize=1)(Reader)
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        legacy.load_gguf_checkpoint = described
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map, legacy.load_gguf_checkpoint = found
