"""LoRA's options in PEFT's words, what of an adapter is trained, and tensors that PEFT would leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict

from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.tuning.lora import LORA, lora_config, mark_adapter, put_adapter, trained_b, tune_ia3, tune_lora, wrap
from mmit.models.tuning.options import read_options
from tests.models.small_llms import family


def llm() -> Any:
    torch.manual_seed(0)
    return load_llm("tiny", random_init=family("llama"), dtype=torch.float32)


def options(**given: Any) -> dict[str, Any]:
    return read_options(given, LORA, mode="lora", where="w", others={})


@pytest.mark.parametrize(("given", "scale"), [({"r": 4, "alpha": 8}, 2.0), ({"r": 4, "alpha": 8, "rslora": True}, 4.0)])
def test_an_adapter_is_scaled_as_its_paper_has_it(given: dict[str, Any], scale: float) -> None:
    model = tune_lora(llm(), options(**given, targets=["q_proj"]))
    found = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert found == {scale}


def test_only_the_adapter_is_trained_and_the_start_is_the_base() -> None:
    base, ids = llm(), torch.arange(6)[None]
    base.requires_grad_(False)
    before = base(input_ids=ids).logits
    model = tune_lora(base, options(r=2))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(trained_b(trained)) * 2 == len(trained) and all(".lora_B." in name for name in trained_b(trained))


@pytest.mark.parametrize(("bias", "wanted"), [("none", 0), ("all", 7), ("lora_only", 1)])
def test_biases_are_trained_as_the_adapter_says(bias: str, wanted: int) -> None:
    biased = family("llama") | {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}
    base = load_llm("tiny", random_init=biased, dtype=torch.float32)
    model = wrap(base, lora_config(options(r=2, targets=["q_proj"], bias=bias)), where="w")
    mark_adapter(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(trained) == wanted and all(name.endswith("bias") for name in trained)


def test_values_are_put_back_exactly_and_a_run_that_goes_on_keeps_its_adapter() -> None:
    first = tune_lora(llm(), options(r=2))
    with torch.no_grad():
        for p in first.parameters():
            if p.requires_grad:
                p.normal_()
    kept = {k: v.clone() for k, v in get_peft_model_state_dict(first, save_embedding_layers=False).items()}
    second = tune_lora(llm(), options(r=2))
    put_adapter(second, kept)
    found = get_peft_model_state_dict(second, save_embedding_layers=False)
    assert found.keys() == kept.keys() and all(torch.equal(found[k], kept[k]) for k in kept)
    second.requires_grad_(False)
    assert tune_lora(second, options(r=2)) is second
    assert any(p.requires_grad for p in second.parameters())


def test_targets_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(ModelError) as caught:
        wrap(llm(), lora_config(options(targets=["nothing"])), where="tune.llm.options.targets")
    assert "q_proj" in (caught.value.remedy or "") and caught.value.where == "tune.llm.options.targets"
    with pytest.raises(ModelError, match="give targets and feedforward together"):
        tune_ia3(llm(), {"targets": ["k_proj"], "feedforward": None})
