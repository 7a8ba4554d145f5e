"""What a run measures of a model before its first step, on a model of sixteen channels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmit.data.packing import Sample
from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from mmit.train.checks.probes import (
    _some,
    answers,
    check_causal,
    check_embeddings,
    check_records,
    check_start_of_adapter,
    without_gradient,
)
from tests.models.small_llms import DIMENSIONS, described, family

FROZEN = {"mode": "frozen", "lr": None, "options": {}}


def model() -> VLM:
    torch.manual_seed(0)
    return VLM(load_llm("", dtype=torch.float32, random_init=family("llama")), vision=None, projector=None)


def tuned(mode: str, **options: Any) -> VLM:
    vlm = model()
    apply_tuning(vlm, {"vision": FROZEN, "projector": FROZEN, "llm": {"mode": mode, "lr": 1e-3, "options": options}})
    return vlm


def records(*lengths: int) -> tuple[Any, Any]:
    """Records of so many tokens, one unit each."""

    def samples(scan: Any, unit: int) -> Any:
        ids = torch.arange(lengths[unit]) * 5 % 60 + unit
        return [Sample(ids.tolist(), [False] + [True] * (lengths[unit] - 1), (), unit, ())], (), ""

    return SimpleNamespace(unit_samples=samples, share_prefix=True), SimpleNamespace(length=np.array(lengths))


def test_a_model_that_keeps_records_apart_passes_and_is_left_in_its_mode() -> None:
    vlm = model().train()
    check_records(vlm, *records(5, 9, 4, 7))
    assert vlm.training
    check_records(vlm, *records(5))  # one alone has nothing to be compared with


def test_a_model_in_which_records_meet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model()
    real = VLM.row_logits

    def leaking(self: VLM, embeddings: torch.Tensor, **given: Any) -> torch.Tensor:
        return real(self, embeddings + 0.1 * embeddings.mean(0), **given)  # each token sees the whole row

    monkeypatch.setattr(VLM, "row_logits", leaking)
    with pytest.raises(ModelError, match="a record of . tokens is answered differently beside other records") as error:
        check_records(vlm, *records(5, 9, 4))
    assert error.value.remedy == "set data.packing=false"


def test_the_longest_is_among_those_that_are_compared() -> None:
    data, scan = records(5, 4, 30, 6, 3)
    assert [sample.length for sample in _some(data, scan)] == [30, 3, 4]
    assert [sample.record for sample in _some(data, scan)] == [0, 1, 2]


def test_an_adapter_that_starts_elsewhere_is_refused() -> None:
    before = answers(model())
    check_start_of_adapter(tuned("lora", r=2), before)
    moved = tuned("lora", r=2)
    with torch.no_grad():
        for name, weight in moved.llm.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    with pytest.raises(ModelError, match="the adapter changes what the model answers before anything is trained"):
        check_start_of_adapter(moved, before)


def test_tensors_that_the_loss_does_not_reach_are_named() -> None:
    vlm = tuned("lora", r=2)
    assert without_gradient(vlm) == []  # LoRA's A has a gradient of zeros, which is one
    vlm.llm.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
    assert without_gradient(vlm) == ["idle"]


def test_a_model_that_looks_at_ids_themselves_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model()
    assert torch.equal(check_embeddings(vlm), answers(vlm))
    real = vlm.llm.model.forward

    def by_ids(*given: Any, input_ids: Any = None, **more: Any) -> Any:
        out = real(*given, input_ids=input_ids, **more)
        if input_ids is not None:
            out.last_hidden_state = out.last_hidden_state * 1.1
        return out

    monkeypatch.setattr(vlm.llm.model, "forward", by_ids)
    with pytest.raises(ModelError, match="LlamaForCausalLM answers token ids differently than their embeddings"):
        check_embeddings(vlm)


def loaded(kind: str, **more: Any) -> VLM:
    options = described(DIMENSIONS, {"model_type": kind, "pad_token_id": 0, **more})
    return VLM(load_llm("", dtype=torch.float32, random_init=options), vision=None, projector=None)


def test_a_model_whose_tokens_see_what_follows_is_refused() -> None:
    decoder, encoder = loaded("bert", is_decoder=True), loaded("bert")
    check_causal(decoder, answers(decoder))
    before = answers(encoder)
    with pytest.raises(ModelError, match="tokens of BertLMHeadModel see those that follow, so that"):
        check_causal(encoder, before)


def test_a_model_that_counts_from_elsewhere_is_refused() -> None:
    with pytest.raises(ModelError, match="RobertaForCausalLM counts the positions of tokens otherwise than from 0"):
        check_embeddings(loaded("roberta", is_decoder=True))


def test_what_breaks_in_a_model_s_own_code_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model()

    def breaks(*given: Any, **more: Any) -> Any:
        raise IndexError("index 1 is out of bounds")

    monkeypatch.setattr(vlm.llm.model.layers[0], "forward", breaks)
    with pytest.raises(ModelError, match="cannot run packed rows: IndexError: index 1"):
        vlm.check_isolation()
