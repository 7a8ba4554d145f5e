"""Layers, attention, feed-forward and norms are found in any family by what they are."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.tuning.lora import wrap
from mmit.models.tuning.structure import attention_and_mlp, attentions, base_model, decoder_layers, norms
from tests.models.small_llms import family


def model(name: str) -> nn.Module:
    return load_llm("tiny", random_init=family(name), dtype=torch.float32, empty=True)


# The names of the two children in these families; falcon runs them side by side, gpt2 and opt have other names.
CHILDREN = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "mixtral": ("self_attn", "mlp"),
    "gemma3_text": ("self_attn", "mlp"),
    "phi": ("self_attn", "mlp"),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_each_layer_has_one_attention_and_one_feed_forward(name: str) -> None:
    llm = model(name)
    layers = decoder_layers(llm)
    assert len(layers) == llm.config.get_text_config().num_hidden_layers
    assert {attention_and_mlp(layer) for layer in layers} == {CHILDREN[name]}


def test_the_layers_are_found_under_peft_s_wrapper() -> None:
    llm = load_llm("tiny", random_init=family("llama"), dtype=torch.float32)
    wrapped = wrap(llm, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), where="w")
    assert base_model(wrapped) is llm is base_model(llm)
    assert decoder_layers(wrapped) is llm.model.layers


def test_a_model_without_attention_has_no_such_list() -> None:
    llm = model("llama")
    for layer in llm.model.layers:
        del layer.self_attn
    with pytest.raises(ModelError, match=r"has 0 lists of 2 layers with attention in each") as caught:
        decoder_layers(llm)
    assert "lora" in (caught.value.remedy or "")


def test_a_layer_of_another_shape_says_what_it_found() -> None:
    layer = nn.Module()
    layer.mixer, layer.gate = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"has attention nowhere and feed-forward \['mixer'\]") as caught:
        attention_and_mlp(layer)
    assert "after: [self_attn, mlp]" in (caught.value.remedy or "")
    layer.mixer.layer_idx = 0
    assert attentions(layer) == ["mixer"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_norms_are_what_scales_channels_and_nothing_else(name: str) -> None:
    llm = model(name)
    found = {n: type(llm.get_submodule(n)).__name__ for n in norms(llm)}
    assert found and all("norm" in kind.lower() for kind in found.values())
    missed = [n for n, m in llm.named_modules() if "norm" in type(m).__name__.lower() and n not in found]
    assert not missed


def test_norms_of_vision_encoders_are_found_and_positions_are_not() -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    convolutions.weight = nn.Parameter(torch.zeros(4))  # one dimension, and a parent of others
    assert list(norms(convolutions)) == ["1", "3", "4"]
