"""Compiled layers compute the same, for rows of any length with few graphs; nothing in bf16 falls back to float32."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from mmit.errors import ConfigError
from mmit.models import llm_layers
from mmit.models.llm import load_llm
from mmit.models.tuning.fused_lora import fuse_lora
from mmit.models.tuning.fused_norm import fuse_norms
from mmit.models.vlm import VLM

LLAMA = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=LLAMA, dtype=dtype)
    options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(llm, LoraConfig(**options), autocast_adapter_dtype=False)
    assert (fuse_lora(adapted), fuse_norms(adapted)) == (4 * 7, 4 * 2 + 1)
    return VLM(adapted, vision=None, projector=None)


def losses(vlm, lengths):
    """Loss of one row of records of these lengths, and the adapter's gradients."""
    total, starts = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)[:-1]
    generator = torch.Generator().manual_seed(total)
    vlm.zero_grad()
    out = vlm(
        input_ids=torch.randint(0, 30, (total,), generator=generator),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        nodes=torch.tensor([[int(s), n, -1] for s, n in zip(starts, lengths, strict=True)]),
        predict_at=torch.arange(total),
        targets=torch.randint(0, 30, (total,), generator=generator),
        image_positions=torch.zeros(0, dtype=torch.int64),
        image_index=torch.zeros(0, dtype=torch.int64),
        image_tokens=0,
    )
    out.sum().backward()
    return out.detach(), [p.grad.clone() for p in vlm.parameters() if p.grad is not None]


def same(plain, other, rows):
    for lengths in rows:
        (a, grads_a), (b, grads_b) = losses(plain, lengths), losses(other, lengths)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for x, y in zip(grads_a, grads_b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_one_graph_each_serves_all_layers_and_row_lengths():
    torch._dynamo.reset()
    plain = model()
    other, counter = copy.deepcopy(plain), CompileCounterWithBackend("eager")
    other.split()
    names = list(other.state_dict())
    assert llm_layers.compile_layers(other.llm, device="cpu", backend=counter) == 4 * 3
    same(plain, other, [(5, 7), (3, 9, 4), (20,)])
    assert list(other.state_dict()) == names
    assert 0 < counter.frame_count <= 4


@pytest.mark.slow
@pytest.mark.skipif(llm_layers.why_not_compile("cpu") is not None, reason="no compiler")
def test_inductor_computes_the_same():
    torch._dynamo.reset()
    plain = model()
    other = copy.deepcopy(plain)
    llm_layers.compile_layers(other.llm, device="cpu")
    same(plain, other, [(5, 7), (3, 9, 4)])


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(llm_layers.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        llm_layers.compile_layers(model().llm, device="cpu")


class Products(TorchDispatchMode):
    """Operand types of all matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm") or "scaled_dot_product" in name:
            self.seen.append(args[-1].dtype if name in ("mm", "bmm") else args[1].dtype)
        return function(*args, **(kwargs or {}))


def test_a_bf16_step_has_no_float32_product_but_the_angles_of_the_positions():
    vlm = model(torch.bfloat16)
    vlm.split()
    with Products() as products:
        losses(vlm, (5, 7))
    float32 = [dtype for dtype in products.seen if dtype != torch.bfloat16]
    # Rotary embeddings multiply positions by frequencies once a row, in float32 on purpose.
    assert len(float32) <= 1 < len(products.seen)
