"""The router loss of a record in a row is transformers' own for the record alone."""

from __future__ import annotations

import pytest
import torch

from mmit.data.packing import Sample, build_row
from mmit.errors import ModelError
from mmit.models.llm import recompute_activations
from mmit.models.modes import training_mode
from mmit.models.routers import read_routers
from mmit.models.rules import read_rules
from mmit.models.tuning import apply_tuning
from tests.models.test_families import pair, records
from tests.models.tuning.test_reach import FROZEN

FACTOR = 0.7
NO_IMAGES = {"image_positions": torch.zeros(0, dtype=torch.int64), "image_index": torch.zeros(0, dtype=torch.int64)}


def theirs_alone(llm, samples) -> torch.Tensor:
    """The auxiliary loss of each record alone, of the tokens that a row runs: all but the last."""
    found = []
    for sample in samples:
        ids = torch.tensor([sample.ids[:-1]])
        found.append(llm(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss)
    return torch.stack(found)


def losses(vlm, samples, *, share=False) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) losses as a training step has them, and the record of each."""
    row = build_row(samples, share=share)
    tensors = {n: getattr(row, n) for n in ("input_ids", "positions", "nodes", "predict_at", "targets")}
    with training_mode(vlm):
        found = vlm(**tensors, **NO_IMAGES, image_tokens=0, records=row.target_records)
    return found, row.target_records


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "jamba", "phimoe", "qwen3_next"])
def test_packed_shared_and_padded_are_transformers_record_by_record(name):
    noise = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} if name == "phimoe" else {}
    theirs, vlm = pair(name, **noise)
    samples = records()
    wanted = theirs_alone(theirs, samples).detach()
    vlm.split()
    plain = {}
    for key, options in {"packed": {}, "shared": {"share": True}, "padded": {}}.items():
        if key == "padded":
            vlm.run_padded()
        vlm.routers = None
        plain[key], owners = losses(vlm, samples, **options)
        vlm.routers = read_routers(vlm.llm, FACTOR)
        added = losses(vlm, samples, **options)[0] - plain[key]
        torch.testing.assert_close(added, FACTOR * wanted[owners], atol=1e-5, rtol=1e-5, msg=key)


def test_the_gradient_is_that_of_transformers_and_reaches_no_other_record():
    theirs, vlm = pair("qwen3_moe")
    samples = records()
    vlm.split()
    bare, _ = losses(vlm, samples)
    vlm.routers = read_routers(vlm.llm, FACTOR)
    found, owners = losses(vlm, samples)
    gate = next(p for n, p in vlm.llm.named_parameters() if n.endswith("layers.0.mlp.gate.weight"))
    mine = (found - bare)[owners == 2].mean()
    (got,) = torch.autograd.grad(mine, gate)
    other = next(p for n, p in theirs.named_parameters() if n.endswith("layers.0.mlp.gate.weight"))
    (wanted,) = torch.autograd.grad(FACTOR * theirs_alone(theirs, samples[2:3])[0], other)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_recomputed_layers_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        _, vlm = pair("mixtral")
        vlm.split()
        vlm.routers = read_routers(vlm.llm, FACTOR)
        if recompute:
            recompute_activations(vlm.llm)
        vlm.train()
        losses(vlm, records(), share=True)[0].sum().backward()
        gradients.append({n: p.grad for n, p in vlm.llm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_evaluation_and_a_soft_prompt():
    theirs, vlm = pair("mixtral")
    plan = {"mode": "soft_prompt", "lr": 1e-3, "options": {"tokens": 3}}
    apply_tuning(vlm, {"vision": FROZEN, "projector": FROZEN, "llm": plan})
    vlm.split()
    samples = records([9, 6], shared=0)
    bare, _ = losses(vlm, samples)
    vlm.routers = read_routers(vlm.llm, FACTOR)
    found, owners = losses(vlm, samples)
    prompt = vlm.llm.mmit_prompt.embeddings
    for number, sample in enumerate(samples):
        words = theirs.get_input_embeddings()(torch.tensor(sample.ids[:-1]))
        given = torch.cat([prompt, words])[None]
        wanted = theirs(inputs_embeds=given, output_router_logits=True, use_cache=False).aux_loss
        torch.testing.assert_close((found - bare)[owners == number], FACTOR * wanted.expand(sample.length - 1))
    row = build_row(samples)
    tensors = {n: getattr(row, n) for n in ("input_ids", "positions", "nodes", "predict_at", "targets")}
    vlm.eval()
    torch.testing.assert_close(vlm(**tensors, **NO_IMAGES, image_tokens=0, records=row.target_records), bare)


def test_records_that_end_inside_another_have_their_own_loss():
    theirs, vlm = pair("mixtral")
    vlm.split()
    long = records([20])[0]
    short = Sample(long.ids[:8], long.weights[:8], (), 1, ())
    samples = [long, short]
    wanted = theirs_alone(theirs, samples).detach()
    bare, _ = losses(vlm, samples, share=True)
    vlm.routers = read_routers(vlm.llm, FACTOR)
    found, owners = losses(vlm, samples, share=True)
    torch.testing.assert_close(found - bare, FACTOR * wanted[owners], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_model_without_such_a_loss_is_refused(name):
    _, vlm = pair(name)
    with pytest.raises(ModelError, match="no auxiliary loss for routers of"):
        read_routers(vlm.llm, FACTOR)
    assert read_rules(vlm.llm).router_loss is None


def test_the_rules_name_a_loss_that_is_left_out():
    rules = read_rules(pair("qwen3_moe")[1].llm)
    assert rules.router_loss and any("train.router_loss" in line for line in rules.lines())
