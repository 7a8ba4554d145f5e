"""Building a language model from plain data: a misspelt key is refused, published ones are taken."""

from __future__ import annotations

import warnings

import pytest
import torch

from mmit.errors import ConfigError, ModelError
from mmit.models.llm import load_llm, recompute_activations, usable_device
from tests.models.test_attention import LLAMA


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_hiden_layers": 1}, "did you mean 'num_hidden_layers'"),
        ({"model_type": "lama"}, "llama"),
    ],
)
def test_an_unknown_key_of_random_init_names_the_nearest(options, told):
    with pytest.raises(ModelError, match=told) as error:
        load_llm("tiny", random_init=LLAMA | options, dtype=torch.float32)
    assert "model.llm.random_init" in error.value.where


def test_keys_of_older_published_configs_are_taken():
    llm = load_llm("tiny", random_init=LLAMA | {"rope_theta": 5000.0}, dtype=torch.float32)
    assert llm.config.rope_parameters["rope_theta"] == 5000.0
    gpt2 = {"model_type": "gpt2", "n_layer": 1, "hidden_size": 8, "n_head": 2, "vocab_size": 20}
    assert load_llm("tiny", random_init=gpt2, dtype=torch.float32).config.n_embd == 8


def test_recomputed_activations_give_the_same_gradients():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        llm = load_llm("tiny", random_init=LLAMA, dtype=torch.float32).train()
        if recompute:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                recompute_activations(llm)
            assert any(getattr(m, "gradient_checkpointing", False) for m in llm.modules())
        llm(input_ids=torch.arange(6)[None]).logits.square().mean().backward()
        results.append([p.grad for p in llm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("name", "cuda", "rank", "found"),
    [
        ("auto", 0, None, "cpu"),
        ("auto", 0, "1", "cpu"),
        ("cpu", 4, "1", "cpu"),
        ("auto", 4, "1", "cuda:1"),
        ("cuda", 4, "6", "cuda:2"),
    ],
)
def test_one_rule_says_which_device_a_process_takes(monkeypatch, name, cuda, rank, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert str(usable_device(name)) == found
    # Libraries that place tensors themselves take the current device: of four ranks each its own.
    assert [str(device) for device in current] == ([found] if found != "cpu" else [])


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="torch cannot compute on 'cuda:77'"):
        usable_device("cuda:77")
