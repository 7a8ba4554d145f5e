"""Bottleneck adapters: nothing at the start, two for each layer, and what cannot be wrapped is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.tuning.bottleneck import ACTIVATIONS, Bottleneck, WithAdapter, insert_adapters
from tests.models.small_llms import family


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_starts_as_the_identity_and_follows_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    adapter, x = Bottleneck(6, 2, activation, like=torch.zeros(1, dtype=torch.float64)), torch.randn(3, 4, 6).double()
    assert torch.equal(adapter(x), x) and adapter.down.weight.dtype == torch.float64
    nn.init.normal_(adapter.up.weight)
    inner = ACTIVATIONS[activation]()(x @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(adapter(x), x + inner @ adapter.up.weight.T)


def test_only_the_first_of_several_outputs_passes_through() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x, "cache"

    adapter = Bottleneck(2, 1, "relu", like=torch.zeros(1))
    nn.init.ones_(adapter.up.bias)
    x = torch.zeros(1, 2)
    out, rest = WithAdapter(Two(), adapter)(x)
    assert torch.equal(out, x + 1) and rest == "cache"
    assert torch.equal(WithAdapter(nn.Identity(), adapter)(x), x + 1)


def test_a_model_gets_two_for_each_layer_under_the_names_it_lists() -> None:
    llm = load_llm("tiny", random_init=family("llama"), dtype=torch.float32).eval()
    ids = torch.arange(6)[None]
    before, layers = llm(input_ids=ids).logits, llm.config.num_hidden_layers
    names = insert_adapters(llm, size=3, activation="gelu", after=None)
    assert torch.equal(llm(input_ids=ids).logits, before)
    assert len(names) == layers * 2 * 4 and all(llm.get_parameter(name).numel() for name in names)
    assert {p for p, _ in llm.named_parameters() if ".adapter." in p} == set(names)


def test_children_may_be_named_and_a_wrong_name_gets_the_nearest() -> None:
    llm = load_llm("tiny", random_init=family("llama"), dtype=torch.float32)
    assert all(".mlp.adapter." in name for name in insert_adapters(llm, size=3, activation="gelu", after=["mlp"]))
    with pytest.raises(ModelError, match="has no child 'self_atn'") as caught:
        insert_adapters(llm, size=3, activation="gelu", after=["self_atn"])
    assert "self_attn" in (caught.value.remedy or "") and caught.value.where == "tune.llm.options.after"
    with pytest.raises(ModelError, match="unknown activation 'gellu'") as activation:
        Bottleneck(2, 1, "gellu", like=torch.zeros(1))
    assert "gelu" in (activation.value.remedy or "")
