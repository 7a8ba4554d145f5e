"""Batched decoding from shared rows equals one prompt at a time with transformers' own generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mmit.data.packing import Sample, build_row
from mmit.errors import ModelError
from mmit.models import decoding
from mmit.models.decoding import Prompts, Support
from mmit.models.llm import load_llm
from mmit.models.sampling import Sampling, choose
from mmit.models.vlm import VLM
from tests.models.small_llms import DIMENSIONS, described, family
from tests.models.small_llms import FAMILIES as ALL_FAMILIES

VOCABULARY = 50
COMMON: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.6,  # far from uniform, so that rounding does not decide
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# All, and what they allow: batched, shared.
FAMILIES: dict[str, tuple[dict[str, Any], Support]] = {
    "llama": ({"model_type": "llama"}, Support(True, True)),
    "qwen2": ({"model_type": "qwen2", "tie_word_embeddings": True}, Support(True, True)),
    "sliding": ({"model_type": "mistral", "sliding_window": 6}, Support(True, True)),
    "wide window": ({"model_type": "mistral", "sliding_window": 24}, Support(True, True)),
    "some sliding": (
        {
            "model_type": "gemma3_text",
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 4,
        },
        Support(True, True),
    ),
    "learnt positions": (
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 256},
        Support(True, True),
    ),
    "state space": ({"model_type": "mamba", "state_size": 4}, Support(False, False)),
    "state space of heads": (
        {"model_type": "mamba2", "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        Support(False, False),
    ),
    "convolutions": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        Support(False, False),
    ),
}


def model(family: str = "llama", **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = described(COMMON, FAMILIES[family][0])
    return load_llm("tiny", random_init=config, dtype=torch.float32, **options).eval()


# A system prompt, a picture of three tokens, questions; one prompt begins another, two are equal.
SYSTEM, IMAGE = (3, 4, 5), -200
PROMPTS: list[tuple[tuple[int, ...], tuple[str, ...]]] = [
    ((*SYSTEM, IMAGE, 11, 12, 13), ("cat",)),
    ((*SYSTEM, IMAGE, 11, 14), ("cat",)),
    ((*SYSTEM, IMAGE, 11), ("cat",)),
    ((*SYSTEM, IMAGE, 11, 14), ("cat",)),
    ((*SYSTEM, IMAGE, 11, 12, 13), ("dog",)),
    ((*SYSTEM, *range(20, 40)), ()),
    ((9,), ()),
    ((8, IMAGE, 7, IMAGE, 6), ("dog", "cat")),
]
IMAGE_TOKENS = 3


def samples() -> list[Sample]:
    return [
        Sample((*ids, 0), (False,) * len(ids) + (True,), images, n, (IMAGE_TOKENS,) * len(images))
        for n, (ids, images) in enumerate(PROMPTS)
    ]


def lay(llm: PreTrainedModel, some: list[Sample], *, share: bool = True) -> Prompts:
    row = build_row(some, share=share)
    embeddings = llm.get_input_embeddings()(row.input_ids)
    if row.images:
        pictures = [picture(llm, str(key)) for key in row.images]
        embeddings = embeddings.index_copy(0, row.image_positions, torch.cat(pictures))
    return Prompts(embeddings, row.positions, row.nodes, row.predict_at)


def picture(llm: PreTrainedModel, name: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(name) + ord(name[0]))
    return torch.randn(IMAGE_TOKENS, llm.get_input_embeddings().weight.shape[1], generator=draw)


def batch(llm: PreTrainedModel, some: list[Sample], able: Support) -> list[decoding.State]:
    """Prefill as the model allows."""
    if able.shared:
        return [decoding.prefill(llm, [lay(llm, some)], support=able)]
    if able.batched:
        return [decoding.prefill(llm, [lay(llm, [s]) for s in some], support=able)]
    return [decoding.prefill(llm, [lay(llm, [s])], support=able) for s in some]


@torch.inference_mode()
def answer(llm: PreTrainedModel, some: list[Sample], limit: int, **options: Any) -> list[list[int]]:
    out: list[list[int]] = []
    numbers = options.pop("numbers", [s.record for s in some])
    for state in batch(llm, some, decoding.support(llm)):
        n = len(state.lengths)
        mine = numbers[len(out) : len(out) + n]
        out += decoding.decode(llm, state, limits=[limit] * n, numbers=mine, **{"end_ids": ()} | options)
    return out


@torch.inference_mode()
def reference(llm: PreTrainedModel, limit: int, end_ids: tuple[int, ...] = ()) -> list[list[int]]:
    """Transformers' generate, one prompt at a time."""
    out = []
    for sample in samples():
        embeddings = lay(llm, [sample]).embeddings[None]
        ids = llm.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(end_ids) or None,
            pad_token_id=0,
        )[0].tolist()
        out.append(ids[:-1] if ids[-1] in end_ids else ids)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_one_at_a_time(family: str) -> None:
    llm = model(family)
    assert decoding.support(llm) == FAMILIES[family][1]
    limit = 36 if family == "wide window" else 16  # past the window
    expected = reference(llm, limit)
    assert len({tuple(ids) for ids in expected}) > 4  # the prompts matter
    assert answer(llm, samples(), limit) == expected


@pytest.mark.skipif("dory" not in ALL_FAMILIES, reason="this transformers has no Dory")
def test_loops_that_read_the_cache_of_the_last_one_decode_with_the_cache_of_their_model() -> None:
    options = family("dory") | {"recurrent_kv_cache_mode": "last_loop"}
    llm = load_llm("tiny", random_init=options, dtype=torch.float32).eval()
    assert decoding.support(llm) == Support(batched=False, shared=False)
    assert answer(llm, samples(), 16) == reference(llm, 16)


@pytest.mark.parametrize("kind, batched", [("roformer", False), ("bloom", True)])
def test_a_model_that_is_given_no_positions_is_batched_where_it_counts_by_the_mask(kind: str, batched: bool) -> None:
    """RoFormer counts what its cache holds: a prompt with padding in front would go on at other positions."""
    options = described(DIMENSIONS, {"model_type": kind, "pad_token_id": 0})
    more = {"is_decoder": True} if kind == "roformer" else {}
    llm = load_llm("tiny", random_init=options | more, dtype=torch.float32).eval()
    assert decoding.support(llm) == Support(batched=batched, shared=False)
    assert answer(llm, samples(), 16) == reference(llm, 16)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_sequence_that_grows_past_the_switch_of_longrope_is_computed_anew(together: bool, packed: bool) -> None:
    config = family("phi3-longrope")
    switch = config["original_max_position_embeddings"]
    lengths = (switch - 7, switch - 4, switch, switch + 3, 3)  # grow past it at steps of their own, one never

    def built(packed: bool) -> PreTrainedModel:
        torch.manual_seed(0)
        return load_llm("tiny", random_init=dict(config), dtype=torch.float32, packed=packed).eval()

    llm = built(packed)
    theirs = AutoModelForCausalLM.from_config(type(llm.config)(**llm.config.to_dict()), trust_remote_code=False).eval()
    theirs.load_state_dict(llm.state_dict())
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, config["vocab_size"], (n,), generator=draw).tolist() for n in lengths]
    some = [Sample((*p, 0), (0.0,) * len(p) + (1.0,), (), n, ()) for n, p in enumerate(prompts)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        told["use_cache"] = False  # before 5.24 it keeps keys of the short factors past the switch
        out = theirs.generate(ids, eos_token_id=None, pad_token_id=0, **told)[0]
        expected.append(out[len(prompt) :].tolist())
    parts = [some] if together else [[one] for one in some]
    assert [ids for part in parts for ids in answer(llm, part, 12)] == expected


@pytest.mark.parametrize("config", [{}, {"model_type": "bloom", "n_layer": 2, "n_head": 4}])
def test_a_model_without_mmit_attention_is_batched_but_shares_no_rows(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = described(COMMON, {"model_type": "llama"} | config)
    llm = load_llm("tiny", random_init=options, dtype=torch.float32, packed=False).eval()
    assert decoding.support(llm) == Support(True, False)
    assert answer(llm, samples(), 16) == reference(llm, 16)


def test_a_row_of_many_needs_a_model_that_supports_it() -> None:
    llm = model(packed=False)
    with pytest.raises(ModelError, match="route"):
        decoding.prefill(llm, [lay(llm, samples())], support=Support(True, True))


def test_adapters_decode_too() -> None:
    peft = pytest.importorskip("peft")
    llm = model()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(llm, config, autocast_adapter_dtype=False).eval()
    assert decoding.support(tuned) == Support(True, True)
    with torch.inference_mode():
        state = decoding.prefill(tuned, [lay(tuned, samples())], support=Support(True, True))
        got = decoding.decode(tuned, state, limits=[30] * len(PROMPTS), end_ids=())
    assert got == reference(tuned.merge_and_unload(), 30)


def test_answers_end_at_end_ids_and_finished_prompts_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    free = reference(llm, 90)
    # Of the tokens that some answer never has, the one that ends the others at the most different lengths.
    ends = [[ids.index(t) if t in ids else 90 for ids in free] for t in range(VOCABULARY)]
    end = max((t for t in range(VOCABULARY) if 90 in ends[t]), key=lambda t: len(set(ends[t])))
    expected = [ids[:length] for ids, length in zip(free, ends[end], strict=True)]
    assert len(set(ends[end])) > 3 and expected == reference(llm, 90, (end,))

    places: list[int] = []
    step = decoding.step

    def watched(llm: Any, state: decoding.State, chosen: list[int]) -> torch.Tensor:
        places.append(len(chosen))
        return step(llm, state, chosen)

    monkeypatch.setattr(decoding, "step", watched)
    assert answer(llm, samples(), 90, end_ids=(end,)) == expected
    assert len(places) == 89
    assert places[0] == len(PROMPTS) and places[-1] <= ends[end].count(90) / decoding.CROWDED


def test_limits_are_per_prompt_and_stop_sees_all_new_ids() -> None:
    llm = model()
    free = reference(llm, 12)
    limits = [1, 12, 3, 4, 12, 6, 7, 8]
    with torch.inference_mode():
        (state,) = batch(llm, samples(), Support(True, True))
        seen: dict[int, list[list[int]]] = {}

        def stop(prompt: int, ids: Any) -> bool:
            seen.setdefault(prompt, []).append(list(ids))
            return prompt == 4 and len(ids) == 2

        got = decoding.decode(llm, state, limits=limits, end_ids=(), stop=stop)
    assert got == [ids[: 2 if n == 4 else limits[n]] for n, ids in enumerate(free)]
    assert seen[2] == [free[2][:1], free[2][:2]]  # not asked about what the limit has ended


def test_steps_yield_tokens_as_they_come() -> None:
    llm = model()
    with torch.inference_mode():
        (state,) = batch(llm, samples()[:1], Support(True, True))
        steps = list(decoding.steps(llm, state, limits=[9], end_ids=()))
    assert steps == [[(0, token)] for token in reference(llm, 9)[0]]


def test_logits_that_are_not_finite_are_an_error() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="finite"):
            choose(torch.tensor([[0.0, bad]]), Sampling(), [])


@torch.inference_mode()
def test_log_likelihoods_equal_a_full_forward() -> None:
    llm = model()
    prompt, answers = (3, 4, 5, 6), [(7, 8), (7,), (9, 10, 11), (7, 8)]
    some = [Sample((*prompt, *answer), (False,) * 4 + (True,) * len(answer), (), n) for n, answer in enumerate(answers)]
    row = build_row(some)
    embeddings = llm.get_input_embeddings()(row.input_ids)
    got = decoding.log_likelihoods(
        VLM(llm, vision=None, projector=None),
        Prompts(embeddings, row.positions, row.nodes, row.predict_at),
        targets=row.targets,
        owners=row.target_records,
        count=len(answers),
    )
    assert len(row.input_ids) == 4 + 1 + 2  # the prompt and its branches once
    for n, answer in enumerate(answers):
        log_probabilities = llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        expected = sum(log_probabilities[3 + i, token] for i, token in enumerate(answer))
        torch.testing.assert_close(got.sums[n], expected, atol=1e-5, rtol=1e-5)
        missed = sum(log_probabilities[3 + i].argmax() != token for i, token in enumerate(answer))
        assert got.misses[n] == missed


@torch.inference_mode()
def test_the_greedy_continuation_misses_nothing() -> None:
    llm, prompt = model(), [3, 4, 5, 6]
    answer: list[int] = []
    for _ in range(3):
        answer.append(int(llm(input_ids=torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    sample = Sample((*prompt, *answer), (False,) * 4 + (True,) * 3, (), 0)
    row = build_row([sample])
    prompts = Prompts(llm.get_input_embeddings()(row.input_ids), row.positions, row.nodes, row.predict_at)
    vlm = VLM(llm, vision=None, projector=None)
    got = decoding.log_likelihoods(vlm, prompts, targets=row.targets, owners=row.target_records, count=1)
    assert got.misses.tolist() == [0]
