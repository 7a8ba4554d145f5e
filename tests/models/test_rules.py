"""A model's own rules are read from its config and modules: each where it is, and none where it is not."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.rules import Rules, changed_logits, check_vocabulary, chosen_keys, read_rules
from tests.models.small_llms import WINDOW, family


def rules(name: str, **more: Any) -> Rules:
    return read_rules(load_llm("tiny", random_init=family(name) | more, dtype=torch.float32, empty=True))


def test_a_plain_model_has_no_rules_of_its_own() -> None:
    found = rules("llama")
    assert list(found.lines()) == [] and found.attention and found.why_not_packed is None
    assert found.windows == (None,) * len(found.windows) and found.experts == 0 and found.embeddings == 1
    assert found.rows == family("llama")["vocab_size"] and found.context == family("llama")["max_position_embeddings"]


@pytest.mark.parametrize(
    ("name", "field", "line"),
    [
        ("mistral", "windows", f"sliding window of {WINDOW} tokens in"),
        ("llama4_text", "chunk", "attention in chunks of"),
        ("gpt_oss", "sinks", "attention sinks"),
        ("gemma2", "softcap", "attention scores capped at"),
        ("granite", "logits", "logits changed after the head (logits_scaling"),
        ("granite", "embeddings", "embeddings times"),
        ("mamba2", "mixers", "2 layers with a running state"),
        ("gemma4_text", "per_layer_inputs", "embeddings of the token ids in every layer"),
        ("mixtral", "router_loss", "a router loss (factor"),
    ],
)
def test_each_rule_is_read_and_told(name: str, field: str, line: str) -> None:
    found, plain = rules(name), rules("llama")
    assert getattr(found, field) != getattr(plain, field)
    assert any(told.startswith(line) for told in found.lines()), list(found.lines())


def test_windows_are_those_of_their_layers() -> None:
    found = rules("gemma3_text")
    assert len(found.windows) == family("gemma3_text")["num_hidden_layers"] and set(found.windows) == {None, WINDOW}


def test_a_state_without_attention_can_be_packed_and_code_of_its_own_cannot() -> None:
    found = rules("mamba2")
    assert found.mixers and found.why_not_packed is None
    alone = dataclasses.replace(found, attention=False, mixers=())
    assert "takes no boundaries" in (alone.why_not_packed or "")
    choosing = dataclasses.replace(found, choice=("index_topk", 4))
    assert "index_topk 4" in (choosing.why_not_packed or "")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, None),
        ({"logits_scaling": 1.0, "final_logit_softcapping": None}, None),
        ({"logits_scaling": 8.0}, ("logits_scaling", 8.0)),
        ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping", 30.0)),
    ],
)
def test_keys_that_change_logits_count_unless_they_change_nothing(given: dict[str, Any], found: Any) -> None:
    assert changed_logits(SimpleNamespace(**given)) == found


def test_layers_that_choose_their_keys_say_by_which_key() -> None:
    assert chosen_keys(SimpleNamespace(index_topk=None)) is None
    assert chosen_keys(SimpleNamespace(index_topk_blocks=3)) == ("index_topk_blocks", 3)


def test_experts_of_one_tensor_are_counted_as_a_share() -> None:
    share = rules("mixtral").experts
    assert 0.1 < share < 1 and rules("llama").experts == 0


def test_a_tokenizer_beyond_the_table_is_refused_with_the_tokens() -> None:
    found = rules("llama")
    vocabulary = {f"t{n}": n for n in range(found.rows)}
    check_vocabulary(found, vocabulary)
    with pytest.raises(ModelError, match=f"ids up to {found.rows + 1}, .* has {found.rows} rows") as caught:
        check_vocabulary(found, vocabulary | {"<image>": found.rows, "<pad>": found.rows + 1})
    assert "2 tokens have none: '<image>', '<pad>'" in caught.value.problem
