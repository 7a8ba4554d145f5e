"""Small models as GGUF files, and llama.cpp itself where llama-cpp-python is installed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import PIL.Image


def runtime() -> Any:
    """The package llama_cpp; skips the test without it."""
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def opened(path: Path, **options: Any) -> Any:
    """A model in llama.cpp."""
    given = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "logits_all": True, **options}
    return runtime().Llama(str(path), **given)


def logits(model: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """(T, V) of a prompt."""
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)], dtype=np.float32)


class Eye:
    """llama.cpp's multimodal part around a model."""

    def __init__(self, projector: Path, model: Any) -> None:
        runtime()
        from llama_cpp import mtmd_cpp

        self.lib, self.model = mtmd_cpp, model
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.print_timings, options.n_threads = False, False, 1
        self.context = mtmd_cpp.mtmd_init_from_file(str(projector).encode(), model.model, options)
        assert self.context, "llama.cpp does not read the file"

    def close(self) -> None:
        """Free it."""
        self.lib.mtmd_free(self.context)

    def chunks(self, text: str, picture: PIL.Image.Image) -> list[Any]:
        """The parts of a prompt in order: lists of ids, and arrays (M, D) of image tokens."""
        lib = self.lib
        raw = picture.convert("RGB").tobytes()
        pixels = (ctypes.c_ubyte * len(raw)).from_buffer_copy(raw)
        bitmap = lib.mtmd_bitmap_init(*picture.size, pixels)
        given, parts = lib.mtmd_input_text(), lib.mtmd_input_chunks_init()
        given.text, given.text_len = text.encode(), len(text.encode())
        given.add_special = given.parse_special = True
        pictures = (lib.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert lib.mtmd_tokenize(self.context, parts, ctypes.byref(given), pictures, 1) == 0
        found: list[Any] = []
        for number in range(lib.mtmd_input_chunks_size(parts)):
            part = lib.mtmd_input_chunks_get(parts, number)
            if lib.mtmd_input_chunk_get_type(part) == lib.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                ids = lib.mtmd_input_chunk_get_tokens_text(part, ctypes.byref(count))
                found.append([ids[i] for i in range(count.value)])
            else:
                assert lib.mtmd_encode_chunk(self.context, part) == 0
                rows = lib.mtmd_input_chunk_get_n_tokens(part)
                width = self.model.n_embd()
                numbers = np.ctypeslib.as_array(lib.mtmd_get_output_embd(self.context), (rows * width,))
                found.append(numbers.reshape(rows, width).copy())
        lib.mtmd_input_chunks_free(parts)
        lib.mtmd_bitmap_free(bitmap)
        return found
