"""Families of language models in packed rows: each record is what it is alone in transformers, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mmit.data.packing import Sample, build_row
from mmit.errors import ModelError
from mmit.models.attention import layer_attention
from mmit.models.interop.holds import text_facts
from mmit.models.llm import _attention_of, load_llm, recompute_activations
from mmit.models.rules import read_rules
from mmit.models.tuning import apply_tuning
from mmit.models.tuning.lora import put_adapter
from mmit.models.vlm import VLM
from tests.models.small_llms import FAMILIES, VOCABULARY, WINDOW, family

# One of each kind of rule; scripts/matrix.py asks all families.
KINDS = [
    "llama",
    "llama4_text",  # chunks
    "mistral",  # a window in every layer
    "gemma2",  # soft caps and windows
    "gemma3_text",  # windows in some layers, scaled embeddings
    "gemma4_text",  # embeddings of the ids in every layer
    "gpt_oss",  # sinks, experts
    "mixtral",
    "qwen3_next",  # gated delta rule
    "lfm2",  # short convolutions
    "mamba2",  # no attention at all
    "jamba",
    "granite",  # scaled embeddings and logits
    "stablelm",
    "deepseek_v3",  # latent attention
    "falcon_h1",  # scales only the embeddings that it looks up itself
]
LENGTHS = (5, 9, 3 * WINDOW + 2, 2 * WINDOW + 4)


def records(lengths=LENGTHS, *, shared=3):
    draw = torch.Generator().manual_seed(1)
    first: tuple[int, ...] = ()
    out = []
    for number, length in enumerate(lengths):
        ids = tuple(torch.randint(1, VOCABULARY, (length,), generator=draw).tolist())
        first = first or ids
        ids = (*first[:shared], *ids[shared:]) if number % 2 else ids
        out.append(Sample(ids, (False,) + (True,) * (length - 1), (), number, ()))
    return out


def pair(name, *, packed=True, **more):
    """transformers' own model and mmit's, with the same weights."""
    options = family(name) | more
    config = AutoConfig.for_model(**options)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    ours = load_llm("tiny", random_init=options, dtype=torch.float32, packed=packed).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, VLM(ours, vision=None, projector=None, padded=not packed)


@torch.no_grad()
def alone(llm, samples):
    """Losses of each record by itself, every token but the first of them."""
    losses = []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        logits = llm(input_ids=ids, use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    return torch.cat(losses)


def in_a_row(vlm, samples, *, share=False):
    """Losses in one row in the order of `alone`, the embeddings, the records of the losses and the row's nodes."""
    row = build_row(samples, share=share)
    embeddings = vlm.llm.get_input_embeddings()(row.input_ids).detach().requires_grad_()
    losses = vlm.row_losses(
        embeddings, positions=row.positions, nodes=row.nodes, at=row.predict_at, targets=row.targets
    )
    order = torch.argsort(row.target_records, stable=True)
    return losses[order], embeddings, row.target_records[order], row.nodes


@pytest.mark.parametrize("name", KINDS)
def test_packed_padded_and_shared_are_the_record_alone(name):
    theirs, packed = pair(name)
    samples = records()
    wanted = alone(theirs, samples)
    losses, embeddings, owners, nodes = in_a_row(packed, samples)
    torch.testing.assert_close(losses, wanted, atol=1e-4, rtol=0)
    losses[owners == 2].sum().backward()
    start, length, _ = nodes[2].tolist()
    assert embeddings.grad[start : start + length].count_nonzero()
    embeddings.grad[start : start + length] = 0
    assert not embeddings.grad.count_nonzero()  # nothing of record 2 hangs on another
    torch.testing.assert_close(in_a_row(packed, samples, share=True)[0], wanted, atol=1e-4, rtol=0)
    packed.padded = True
    torch.testing.assert_close(in_a_row(packed, samples)[0], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text", "gpt_oss"])
def test_recomputed_layers_see_the_row_of_their_forward(name):
    gradients = []
    for recompute in (False, True):
        _, vlm = pair(name)
        if recompute:
            recompute_activations(vlm.llm)
            vlm.train()
        in_a_row(vlm, records(), share=True)[0].sum().backward()
        gradients.append({n: p.grad for n, p in vlm.llm.named_parameters() if p.grad is not None})
    for name_of, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name_of], gradient, atol=1e-4, rtol=1e-4)


LONG = [7, 2 * WINDOW + 9, 2 * WINDOW + 20]
NTK = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "name, more",
    [("phi3-longrope", {}), ("llama", {"max_position_embeddings": 2 * WINDOW, "rope_parameters": NTK})],
)
def test_a_long_record_does_not_turn_the_positions_of_its_neighbours(name, more, padded):
    samples = records(LONG)
    _, vlm = pair(name, packed=not padded, **more)
    # A new model for each record: transformers remembers the longest sequence it has seen.
    wanted = torch.cat([alone(pair(name, **more)[0], [s]) for s in samples])
    if more:  # dynamic NTK has other factors at every length, and the last token is not run in a row
        shorter = [Sample(s.ids[:-1], s.supervised[:-1], (), s.record, ()) for s in samples]
        wanted = torch.cat([alone(pair(name, **more)[0], [s]) for s in shorter])
        keep = torch.cat([torch.arange(len(s.ids) - 1) < len(s.ids) - 2 for s in samples])
        torch.testing.assert_close(in_a_row(vlm, samples)[0][keep], wanted, atol=1e-4, rtol=0)
        return
    torch.testing.assert_close(in_a_row(vlm, samples)[0], wanted, atol=1e-4, rtol=0)


def test_records_of_two_factors_do_not_share_a_beginning():
    _, vlm = pair("phi3-longrope")
    with pytest.raises(ModelError, match="data.share_prefix=false"):
        in_a_row(vlm, records([20, 7], shared=3), share=True)


def test_pictures_reach_a_model_whose_layers_ask_for_token_ids():
    theirs, vlm = pair("gemma4_text")
    ids = torch.tensor([5, 9, 11, 7])
    embeddings = vlm.llm.get_input_embeddings()(ids).detach()
    embeddings[1] = torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    body = theirs.model
    padding = body.config.pad_token_id or 0
    given = body.get_per_layer_inputs(torch.tensor([[5, padding, 11, 7]]), None)
    wanted = theirs(inputs_embeds=embeddings[None], per_layer_inputs=given, use_cache=False).logits[0]
    row = {"positions": torch.arange(4), "nodes": torch.tensor([[0, 4, -1]]), "at": torch.arange(4)}
    torch.testing.assert_close(vlm.row_logits(embeddings, **row), wanted, atol=1e-5, rtol=0)
    known = torch.tensor([5, -1, 11, 7])
    torch.testing.assert_close(vlm.row_logits(embeddings, **row, ids=known), wanted, atol=1e-5, rtol=0)


def test_attention_dropout_is_computed_in_packed_rows():
    _, vlm = pair("llama", attention_dropout=0.5)
    wanted = in_a_row(vlm, records())[0]
    vlm.train()
    torch.manual_seed(0)
    dropped = in_a_row(vlm, records())[0]
    assert (dropped - wanted).abs().max() > 0.01
    torch.manual_seed(0)
    assert torch.equal(in_a_row(vlm, records())[0], dropped)


def test_layers_that_choose_their_keys_keep_their_own_attention():
    """Whether or not they would ask transformers' attention interface."""
    assert _attention_of(LlamaConfig(), True)
    assert _attention_of(LlamaConfig(index_topk=8), True) == {}


@pytest.mark.skipif("deepseek_v32" not in FAMILIES, reason="this transformers has no DeepSeek-V3.2")
def test_layers_that_choose_their_keys_are_run_by_their_own_attention():
    """More keys than the layers choose: mmit's attention would see them all, alone and in rows."""
    theirs, vlm = pair("deepseek_v32")
    rules = read_rules(vlm.llm)
    assert rules.choice == ("index_topk", WINDOW) and "index_topk 8" in str(rules.why_not_packed)
    with pytest.raises(ModelError, match="packed"):
        vlm.check_isolation()
    samples = records()
    vlm.run_padded()
    ours, _, _, _ = in_a_row(vlm, samples)
    torch.testing.assert_close(ours, alone(theirs, samples), atol=1e-4, rtol=0)
    ids = torch.randint(1, VOCABULARY, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(2))
    words = vlm.llm.get_input_embeddings()(ids[0])
    one = vlm.row_logits(words, positions=torch.arange(24), nodes=torch.tensor([[0, 24, -1]]), at=torch.arange(24))
    torch.testing.assert_close(one, theirs(ids).logits[0], atol=1e-4, rtol=0)


@pytest.mark.skipif("qwen4_exp_text" not in FAMILIES, reason="this transformers has no Qwen4-Exp")
def test_ngrams_of_the_ids_reach_a_model_that_is_given_embeddings():
    theirs, vlm = pair("qwen4_exp_text")
    rules, samples = read_rules(vlm.llm), records()
    assert rules.choice == ("indexer_budget", WINDOW) and rules.ngrams
    assert rules.why_not_packed and any("n-grams" in line for line in rules.lines())
    vlm.run_padded()
    torch.testing.assert_close(in_a_row(vlm, samples)[0], alone(theirs, samples), atol=1e-4, rtol=0)
    ids = torch.tensor([5, 9, 11, 7])
    embeddings = vlm.llm.get_input_embeddings()(ids).detach()
    embeddings[1] = torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[5, theirs.config.eos_token_id, 11, 7]])
    wanted = theirs(inputs_embeds=embeddings[None], ple_input_ids=seen, use_cache=False).logits[0]
    row = {"positions": torch.arange(4), "nodes": torch.tensor([[0, 4, -1]]), "at": torch.arange(4)}
    for known in (None, torch.tensor([5, -1, 11, 7])):
        torch.testing.assert_close(vlm.row_logits(embeddings, **row, ids=known), wanted, atol=1e-5, rtol=0)
    assert "n-grams" in str(text_facts({"name": "tiny", "random_init": family("qwen4_exp_text")}).extra)


def test_an_argument_that_attention_does_not_compute_is_refused():
    module, states = torch.nn.Linear(1, 1), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="Linear chooses the keys"):
        layer_attention(module, states, states, states, None, None, indices=torch.zeros(1))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", [n for n in ("mixtral", "qwen2_moe", "laguna") if n in FAMILIES])
def test_an_adapter_is_read_under_the_names_that_it_was_written_with(name, experts):
    """transformers renames published weights, and its rule for Laguna matches "shared_experts" too."""
    _, vlm = pair(name)
    frozen = {"mode": "frozen", "lr": None, "options": {}}
    plan = {"mode": "lora", "lr": 1e-3, "options": {"r": 2, "experts": experts}}
    apply_tuning(vlm, {"vision": frozen, "projector": frozen, "llm": plan})
    own = get_peft_model_state_dict(vlm.llm, save_embedding_layers=False)
    values = {key: torch.full_like(value, number) for number, (key, value) in enumerate(own.items())}
    put_adapter(vlm.llm, values)
    found = get_peft_model_state_dict(vlm.llm, save_embedding_layers=False)
    assert [key for key in values if not torch.equal(found[key], values[key])] == []
    reached = {float(p.detach().flatten()[0]) for p in vlm.llm.parameters() if p.requires_grad}
    assert reached == {float(n) for n in range(len(values))}
