"""A keyword reaches the forward of a language model by the name it has there, or is refused."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.cache_utils import DynamicCache

from mmit.errors import ModelError
from mmit.models import decoding
from mmit.models.calls import CACHE_NAMES, cache_name, cache_of, call
from mmit.models.tuning.lora import wrap
from tests.models.test_decoding import FAMILIES, batch, model, samples
from tests.models.test_families import pair


class Swallows(nn.Module):
    """Its forward takes any keyword and reads few."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=torch.arange(5.0).view(1, 5, 1), seen=kwargs)


class NewName(nn.Module):
    def forward(self, input_ids: Any = None, cache: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        return SimpleNamespace(cache=cache, seen=kwargs)


class OldName(nn.Module):
    def forward(self, input_ids: Any = None, cache_params: Any = None, **kwargs: Any) -> Any:
        return SimpleNamespace(cache=cache_params, seen=kwargs)


class Body(nn.Module):
    def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any: ...


class HandsOn(Swallows):
    base_model = Body()


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "inputs_embeds", "use_cache"])
def test_a_keyword_that_the_forward_would_swallow_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"Swallows does not take {name}"):
        call(Swallows(), input_ids=torch.zeros(1, 1), **{name: True})


@torch.no_grad()
def test_an_adapter_on_mpt_takes_embeddings_as_the_model_does() -> None:
    llm = pair("mpt")[1].llm
    words = llm.get_input_embeddings()(torch.tensor([[3, 9, 4]]))
    wanted = llm(inputs_embeds=words).logits
    adapted = wrap(llm, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), where="here").eval()
    torch.testing.assert_close(call(adapted, inputs_embeds=words).logits, wanted)


def test_what_may_be_left_out_is_left_out() -> None:
    out = call(Swallows(), input_ids=torch.zeros(1, 1), position_ids=torch.zeros(1), optional=("position_ids",))
    assert out.seen == {}


def test_none_is_not_handed_over() -> None:
    assert call(Swallows(), input_ids=torch.zeros(1, 1), attention_mask=None).seen == {}


def test_what_the_body_names_is_handed_on() -> None:
    assert call(HandsOn(), input_ids=torch.zeros(1, 1), use_cache=True).seen == {"use_cache": True}
    with pytest.raises(ModelError, match="HandsOn does not take position_ids"):
        call(HandsOn(), input_ids=torch.zeros(1, 1), position_ids=torch.zeros(1))


@pytest.mark.parametrize("keep, expected", [(1, [4.0]), (torch.tensor([0, 3]), [0.0, 3.0])])
def test_logits_are_taken_out_where_the_forward_computes_them_all(keep: Any, expected: list[float]) -> None:
    assert call(Swallows(), input_ids=torch.zeros(1, 1), logits_to_keep=keep).logits.flatten().tolist() == expected


@pytest.mark.parametrize("kind", [NewName, OldName])
def test_a_cache_is_handed_over_by_the_name_it_has_there(kind: type[nn.Module]) -> None:
    cache = DynamicCache()
    out = call(kind(), input_ids=torch.zeros(1, 1), cache=cache)
    assert out.cache is cache and out.seen == {}


def test_a_forward_without_a_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="Swallows takes no cache"):
        call(Swallows(), input_ids=torch.zeros(1, 1), cache=DynamicCache())


@pytest.mark.parametrize("family", ["llama", "state space", "convolutions"])
@pytest.mark.parametrize("adapted", [False, True])
def test_no_warning_comes_of_decoding(family: str, adapted: bool, capfd: pytest.CaptureFixture[str]) -> None:
    llm: Any = model(family)
    if adapted:
        llm = wrap(llm, LoraConfig(target_modules=["in_proj", "q_proj"], task_type="CAUSAL_LM"), where="test")
    able = decoding.support(llm)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        (state, *_) = batch(llm, samples()[:1], able)
        assert len(decoding.decode(llm, state, limits=[4], end_ids=())[0]) == 4
    assert "deprecat" not in capfd.readouterr().err  # transformers logs some of its warnings instead


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_an_output_is_found(family: str) -> None:
    llm = model(family)
    assert cache_name(llm) in CACHE_NAMES
    assert cache_of(llm(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=True)) is not None
    assert cache_of(llm(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=False)) is None
