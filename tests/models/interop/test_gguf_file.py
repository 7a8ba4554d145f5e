"""GGUF files tensor by tensor: what a format makes of a number, and that nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmit.errors import ModelError
from mmit.models.interop.gguf_file import TYPES, check_written, kind_of, rounding, write_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("blk.0.attn_q.weight", (4, 64), "Q8_0"),
        ("blk.0.attn_q.weight", (4, 48), "F16"),  # a row is one block and a half
        ("v.patch_embd.weight", (4, 3, 8, 32), "F16"),  # a convolution
        ("blk.0.attn_norm.weight", (64,), "F32"),
        ("v.position_embd.weight", (4, 64), "F32"),  # added to activations
    ],
)
def test_each_tensor_gets_the_format_that_llama_cpp_can_compute_with(
    name: str, shape: tuple[int, ...], kind: str
) -> None:
    assert kind_of(name, torch.zeros(shape), "q8_0") == kind


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_rounding_is_never_more_than_its_bound_and_comes_near_it(kind: str) -> None:
    rng = np.random.default_rng(0)
    # Down to where fp16 has fewer digits, and up to where a block of q8_0 has one large number among small ones.
    given = (rng.normal(size=(64, 64)) * np.logspace(-7, 3, 64)[:, None]).astype(np.float32)
    kinds = gguf.GGMLQuantizationType[kind]
    read = gguf.dequantize(gguf.quantize(given, kinds), kinds)
    share = np.abs(read - given) / rounding(given, kind)
    assert 0.9 < share.max() <= 1
    assert (rounding(given, "F32") == 0).all()


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    large, odd = torch.full((2, 32), 7e4), torch.full((2, 32), float("nan"))
    with pytest.raises(ModelError, match=r"70,000, and fp16 ends at 65,504"):
        write_gguf(tmp_path / "a.gguf", "llama", lambda _: None, {"token_embd.weight": large}, dtype="fp16")
    with pytest.raises(ModelError, match="not finite"):
        write_gguf(tmp_path / "b.gguf", "llama", lambda _: None, {"token_embd.weight": odd}, dtype="bf16")


@pytest.mark.parametrize("dtype", list(TYPES))
def test_what_is_read_back_is_within_rounding_and_nothing_else_is(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(8, 64) * torch.logspace(-6, 2, 8)[:, None], "b.weight": torch.randn(5, 33)}
    path = tmp_path / "x.gguf"
    write_gguf(path, "llama", lambda _: None, tensors, dtype=dtype)
    assert check_written(path, tensors) <= 1
    with pytest.raises(ModelError, match="missing or left over, such as c"):
        check_written(path, {**tensors, "c": tensors["a.weight"]})
    with pytest.raises(ModelError, match=r"the shape \(8, 64\) instead of \(64, 8\)"):
        check_written(path, {**tensors, "a.weight": tensors["a.weight"].T})
    with pytest.raises(ModelError, match="further off"):
        check_written(path, {**tensors, "a.weight": tensors["a.weight"].flip(0)})
