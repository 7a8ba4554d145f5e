"""LoRA targets are looked up in the model; what an adapter cannot change is left out or refused."""

from __future__ import annotations

import pytest
import torch

from mmit.errors import ModelError
from mmit.models.tuning import apply_tuning
from mmit.models.tuning.merge import merge
from mmit.models.tuning.reach import not_matrices
from mmit.models.vlm import VLM
from mmit.train.checks.probes import answers, check_start_of_adapter, without_gradient
from tests.models.test_families import pair

FROZEN = {"mode": "frozen", "lr": None, "options": {}}


def tuned(name, say=lambda _: None, *, mode="lora", **options) -> tuple[VLM, torch.Tensor]:
    """A small model with an adapter, and what it answered before."""
    _, vlm = pair(name)
    before = answers(vlm)
    plan = {"mode": mode, "lr": 1e-3, "options": options}
    apply_tuning(vlm, {"vision": FROZEN, "projector": FROZEN, "llm": plan}, say=say)
    return vlm, before


def adapted(vlm) -> set[str]:
    return {n.split(".lora_")[0].rpartition(".")[2] for n, _ in vlm.llm.named_parameters() if ".lora_A" in n}


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"], r".*\.q_proj"])
def test_a_name_a_list_and_an_expression(targets):
    assert adapted(tuned("llama", targets=targets)[0]) == {"q_proj"}


def test_layers_of_all_linear():
    vlm, _ = tuned("llama", layers=[1])
    names = [n for n, _ in vlm.llm.named_parameters() if ".lora_A" in n]
    assert names and all(".layers.1." in n for n in names) and len(adapted(vlm)) == 7
    with pytest.raises(ModelError, match="no layer 5; the model has 2") as refused:
        tuned("llama", layers=[0, 5])
    assert refused.value.where.endswith("options.layers")


@pytest.mark.parametrize("targets", [["q_proj", "v_prj"], "v_prj"])
def test_a_target_that_is_not_there_is_refused(targets):
    with pytest.raises(ModelError, match="no module 'v_prj'") as caught:
        tuned("llama", targets=targets)
    assert "v_proj" in caught.value.remedy


@pytest.mark.parametrize("name", ["jamba", "mamba2", "falcon_mamba", "falcon_h1"])
def test_an_adapter_of_a_state_space_starts_where_the_base_is(name):
    for init in (True, "pissa"):
        vlm, before = tuned(name, r=4, alpha=4, init=init)
        check_start_of_adapter(vlm, before)
        assert not without_gradient(vlm)


def test_an_adapter_on_weights_that_are_read_past_it_is_refused():
    with pytest.raises(ModelError, match="without calling it"):
        tuned("jamba", targets=["q_proj", "dt_proj"])


@pytest.mark.parametrize("name, routers", [("llama4_text", 1), ("phimoe", 2)])
def test_a_router_that_is_a_linear_layer_by_class_alone_is_left_out(name, routers):
    vlm, before = tuned(name, r=4)
    with torch.no_grad():
        for key, parameter in vlm.llm.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert "router" not in adapted(vlm) and not without_gradient(vlm)
    assert len(not_matrices(vlm.llm)) == routers
    after = answers(vlm)
    assert (after - before).abs().max() > 1e-3
    merge(vlm)
    torch.testing.assert_close(answers(vlm), after, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="more than a matrix product"):
        tuned(name, targets=["q_proj", "router"])


def test_a_router_whose_weight_is_read_past_it_is_left_out():
    vlm, _ = tuned("longcat_flash", r=4)
    assert "classifier" not in adapted(vlm) and "q_a_proj" in adapted(vlm) and not without_gradient(vlm)
    with pytest.raises(ModelError, match="without calling it"):
        tuned("longcat_flash", targets=["classifier"])


def test_a_start_that_changes_the_model_is_found():
    vlm, before = tuned("llama", init=False)
    with pytest.raises(ModelError, match="before anything is trained"):
        check_start_of_adapter(vlm, before + 1)
    with pytest.raises(ModelError, match="before anything is trained"):
        check_start_of_adapter(vlm, before)  # B is not zero


def test_experts_that_lora_does_not_reach_are_told_and_can_be_adapted():
    said: list[str] = []
    tuned("gpt_oss", said.append)
    assert len(said) == 1 and "does not reach the experts" in said[0] and "%" in said[0]
    said.clear()
    vlm, before = tuned("gpt_oss", said.append, experts=True)
    assert not said and any("experts" in n for n, p in vlm.llm.named_parameters() if p.requires_grad)
    check_start_of_adapter(vlm, before)
    with pytest.raises(ModelError, match="no experts"):
        tuned("llama", experts=True)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_soft_prompt_is_as_large_as_what_the_model_gets_for_words(name):
    vlm, _ = tuned(name, mode="soft_prompt", tokens=16)
    words = vlm.llm.get_input_embeddings()(torch.arange(64)).float()
    prompt = vlm.llm.mmit_prompt.embeddings.float()
    assert 0.7 < prompt.square().mean().sqrt() / words.square().mean().sqrt() < 1.4
