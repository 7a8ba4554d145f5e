"""Names without wrappers, tensors that a method added, and what merging leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.tuning import apply_tuning
from mmit.models.tuning.merge import base_name, is_added, merge, why_not_merged
from mmit.models.vlm import VLM
from mmit.train.checks.probes import answers
from tests.models.small_llms import family
from tests.models.tuned_models import composite, config_for, disturb, logits, tune_plan

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "ia3": {},
    "houlsby": {"size": 2},
    "soft_prompt": {"tokens": 2},
    "prefix": {"tokens": 2},
    "bitfit": {"insert_biases": True},
    "layernorm": {},
}


def tuned(folder: Path, mode: str) -> tuple[Any, dict[str, torch.Size]]:
    config = config_for(folder, tune_plan("llm", mode, METHODS[mode]))
    vlm, _ = composite(config)
    plain = {name: tensor.shape for name, tensor in vlm.llm.state_dict().items()}
    apply_tuning(vlm, config.tune.model_dump())
    return vlm, plain


def test_names_lose_every_wrapper() -> None:
    """PEFT wraps experts once for each of their tensors: two wrappers follow each other."""
    assert base_name("layers.0.mlp.experts.base_layer.base_layer.gate_up_proj") == "layers.0.mlp.experts.gate_up_proj"
    assert base_name("layers.0.mlp.unadapted.up_proj.base_layer.weight") == "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("mode", METHODS)
def test_every_tensor_is_the_architecture_s_by_its_name_or_was_added(tmp_path: Path, mode: str) -> None:
    vlm, plain = tuned(tmp_path, mode)
    llm = vlm.llm.get_base_model() if hasattr(vlm.llm, "get_base_model") else vlm.llm
    own = {base_name(name): t.shape for name, t in llm.state_dict().items() if not is_added(llm, name)}
    assert own == plain


@pytest.mark.parametrize("mode", ["lora", "ia3", "layernorm"])
def test_a_merged_model_is_the_same_function_without_wrappers(tmp_path: Path, mode: str) -> None:
    vlm, plain = tuned(tmp_path, mode)
    disturb(vlm)
    before = logits(vlm.eval())
    merge(vlm)
    assert {name: tensor.shape for name, tensor in vlm.llm.state_dict().items()} == plain and not vlm.tuned_names
    torch.testing.assert_close(logits(vlm.eval()), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["houlsby", "soft_prompt", "prefix", "bitfit"])
def test_what_no_plain_weight_can_hold_is_refused_and_left_whole(tmp_path: Path, mode: str) -> None:
    vlm, _ = tuned(tmp_path, mode)
    names = list(vlm.llm.state_dict())
    with pytest.raises(ModelError, match="cannot be merged"):
        merge(vlm)
    assert list(vlm.llm.state_dict()) == names


SHARED = {
    "layers with one weight": ("zamba2", {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4}, None),
    "a tied head": ("llama", {"tie_word_embeddings": True}, ["lm_head", "q_proj"]),
    "tied words": ("llama", {"tie_word_embeddings": True}, ["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("case", SHARED)
def test_modules_that_share_a_weight_and_no_adapter_are_not_folded(case: str) -> None:
    """A fold would change every module that has the weight by what one of them has learnt."""
    name, more, targets = SHARED[case]
    vlm = VLM(load_llm("tiny", random_init=family(name) | more, dtype=torch.float32), vision=None, projector=None)
    apply_tuning(vlm, tune_plan("llm", "lora", {"r": 2} | ({"targets": targets} if targets else {})))
    disturb(vlm)
    before = answers(vlm)
    with pytest.raises(ModelError, match="shares its weight with '[^']*(self_attn.q_proj|embed_tokens|lm_head)'"):
        merge(vlm)
    assert torch.equal(answers(vlm), before)
    assert why_not_merged(vlm.llm.unload()) == []
