"""A context of one mode reaches every module and leaves each as it was; probes of a model run in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmit.errors import ModelError
from mmit.models.llm import load_llm
from mmit.models.modes import evaluation_mode, training_mode
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM, same_logits
from tests.models.small_llms import described
from tests.models.test_attention import LLAMA
from tests.models.tuned_models import disturb, tune_plan


def mixed() -> nn.Module:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model.train()
    model[1].eval()
    model[1][0].training = True  # a child in another mode than its parent, as PEFT leaves them
    return model


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


@pytest.mark.parametrize(("context", "inside"), [(evaluation_mode, False), (training_mode, True)])
def test_every_module_is_in_the_mode_and_comes_back_to_its_own(context, inside):
    model = mixed()
    before = modes(model)
    assert len(set(before)) == 2
    with context(model):
        assert set(modes(model)) == {inside}
    assert modes(model) == before
    with pytest.raises(ZeroDivisionError), context(model):
        raise ZeroDivisionError
    assert modes(model) == before


def build(options, plan=None, *, dtype=torch.float32) -> VLM:
    torch.manual_seed(0)
    llm = load_llm(
        "tiny", random_init=described(LLAMA | {"head_dim": 4, "initializer_range": 0.3}, options), dtype=dtype
    )
    vlm = VLM(llm, vision=None, projector=None)
    if plan is not None:
        apply_tuning(vlm, plan)
        disturb(vlm)
    return vlm


@pytest.mark.parametrize("mode", ["train", "eval", "as built"])
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"r": 4, "dropout": 0.5}), ("lora", {"r": 4, "dropout": 0.5, "init": "pissa"})]
)
def test_dropout_of_an_adapter_is_no_leak(method, options, mode):
    """Trained adapters, whose B is not zero any more: with dropout on, two forwards of one row differ."""
    vlm = build({}, tune_plan("llm", method, options))
    if mode != "as built":
        vlm.train(mode == "train")
    before, state = modes(vlm), torch.get_rng_state()
    vlm.check_isolation()
    vlm.split()
    assert modes(vlm) == before
    assert torch.equal(torch.get_rng_state(), state)


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_a_mixture_of_experts_may_be_packed(kind, dtype):
    common = {**LLAMA, "head_dim": 4, **EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
    torch.manual_seed(0)
    options = described(common, {"model_type": kind, "pad_token_id": 0})
    VLM(load_llm("tiny", random_init=options, dtype=dtype), vision=None, projector=None).train().check_isolation()


class Leak(nn.Module):
    """Around an MLP: adds a share of something of the whole row to every token."""

    def __init__(self, inner: nn.Module, leak) -> None:
        super().__init__()
        self.inner, self.leak = inner, leak

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.leak(x)


LEAKS = {
    # Too small to be seen in logits beside rounding, both ways and one way; and one that gradients do not show.
    "a trace of the mean": lambda x: 1e-6 * x.mean(1, keepdim=True),
    "the token before": lambda x: 1e-6 * x.roll(1, dims=1),
    "a decision without a gradient": lambda x: (x[:, :6].sum(1, keepdim=True) > 0).to(x),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_found(leak):
    vlm = build({})
    vlm.check_isolation()
    layer = vlm.llm.model.layers[0]
    layer.mlp = Leak(layer.mlp, LEAKS[leak])
    with pytest.raises(ModelError, match="see each other") as error:
        vlm.check_isolation()
    assert "data.packing=false" in error.value.remedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_run_on_are_found(dtype, monkeypatch):
    """A model that counts from the start of the row instead of using what it is given."""
    vlm = build({}, dtype=dtype)
    rotary = vlm.llm.model.rotary_emb
    real = rotary.forward

    def counting(x, position_ids):
        return real(x, torch.arange(x.shape[1])[None] ** 2 % 11)

    monkeypatch.setattr(rotary, "forward", counting)
    with pytest.raises(ModelError, match="differently in a packed row than alone"):
        vlm.check_isolation()


def test_one_token_that_rounds_in_16_bits_is_no_other_position():
    wanted = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    one, all_but_first = wanted.clone(), wanted.clone()
    one[1] = 0.0
    all_but_first[1:] = 0.0
    half = torch.bfloat16
    assert not same_logits(one.to(half), wanted.to(half)) and same_logits(one.to(half), wanted.to(half), typical=True)
    assert not same_logits(all_but_first.to(half), wanted.to(half), typical=True)
    assert not same_logits(one, wanted, typical=True)
