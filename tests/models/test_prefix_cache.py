"""Beginnings that were run before: a row that goes on from them computes what it would compute whole."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from mmit.data.packing import token_keys
from mmit.data.prompts import Prompt
from mmit.generate import Model
from mmit.models import decoding
from mmit.models.prefix_cache import BLOCK, PrefixCache, divide
from mmit.pictures import Pictures
from tests.models.small_llms import described
from tests.test_generate import LLAMA, PICTURES, build, question

WINDOW = {"model_type": "mistral", "sliding_window": 20}
MIXED = {
    "model_type": "gemma3_text",
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 4,
    "head_dim": 4,
}
LEARNT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 400}
MEBIBYTE = 1 << 20


def prompts(model: Model, draw: random.Random, count: int) -> list[Prompt]:
    """Some begin alike, some are equal, some begin another."""
    maker, shown = model.prompt_maker(), PICTURES if model.vlm.vision else []
    texts = ["The quick brown fox " * 3, "The quick brown dog " * 3, "The quick brown fox " * 3 + "jumps over", "Why?"]
    asked = [
        question(draw.choice(texts), *draw.sample(shown, min(len(shown), draw.randrange(3)))) for _ in range(count)
    ]
    return [maker.question(record, n) for n, record in enumerate(asked)]


@torch.inference_mode()
@pytest.mark.parametrize("config", [LLAMA, WINDOW, MIXED, LEARNT], ids=["llama", "window", "mixed", "learnt"])
def test_going_on_from_what_is_known_equals_running_all_of_it(config: dict[str, Any]) -> None:
    model = build(vision=config is LLAMA, config=described(LLAMA, config))
    store, draw = PrefixCache(MEBIBYTE), random.Random(1)
    total = 0
    for _ in range(6):
        batch = prompts(model, draw, draw.choice([1, 1, 2, 4]))
        features = Pictures(model.vlm, model.preparation, [batch, batch]).take(batch)
        expected, _ = model.prefill(batch, features)
        before = model.usage.prefill_tokens
        state, known = model.prefill(batch, features, store=store)
        torch.testing.assert_close(state.logits, expected.logits, atol=2e-4, rtol=1e-4)
        assert state.lengths.tolist() == expected.lengths.tolist() == [prompt.length for prompt in batch]
        for mine, theirs in zip(state.cache.layers, expected.cache.layers, strict=True):
            for place, length in enumerate(state.lengths.tolist()):
                for name in ("keys", "values"):
                    got, want = (getattr(layer, name)[place, :, -length:] for layer in (mine, theirs))
                    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        assert all(n < prompt.length for n, prompt in zip(known, batch, strict=True))
        assert model.usage.prefill_tokens - before <= sum(p.length - n for n, p in zip(known, batch, strict=True))
        total += sum(known)
    assert total >= 4 * BLOCK


@torch.inference_mode()
@pytest.mark.parametrize("config", [LLAMA, WINDOW, MIXED, LEARNT], ids=["llama", "window", "mixed", "learnt"])
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_a_prompt_in_parts_is_the_prompt_at_once(config: dict[str, Any], most: int) -> None:
    model = build(vision=config is LLAMA, config=described(LLAMA, config))
    store = PrefixCache(MEBIBYTE)
    batch = prompts(model, random.Random(2), 4)
    features = Pictures(model.vlm, model.preparation, [batch] * 2).take(batch)
    for prompt in batch:  # the later ones begin with what is known
        expected, _ = model.prefill([prompt], features)
        unknown, before = model.unknown(prompt, store), model.usage.prefill_tokens
        *between, done = model.prefill_in_parts(prompt, features, store=store, most=most)
        assert done is not None and between == [None] * ((unknown - 1) // most)
        state, known = done
        assert known == prompt.length - unknown and model.usage.prefill_tokens - before == unknown
        torch.testing.assert_close(state.logits, expected.logits, atol=2e-4, rtol=1e-4)
        assert state.lengths.tolist() == [prompt.length]
        for mine, theirs in zip(state.cache.layers, expected.cache.layers, strict=True):
            for name in ("keys", "values"):
                got, want = (getattr(layer, name)[0, :, -prompt.length :] for layer in (mine, theirs))
                torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        assert len(store.find(token_keys(prompt.samples[0]))) == (prompt.length - 1) // BLOCK  # for the next one


def test_the_same_prompt_again_runs_its_last_tokens_alone() -> None:
    model, store = build(), PrefixCache(MEBIBYTE)
    (prompt,) = prompts(model, random.Random(3), 1)
    with torch.inference_mode():
        features = Pictures(model.vlm, model.preparation, [[prompt]] * 2).take([prompt])
        model.prefill([prompt], features, store=store)
        before = model.usage.prefill_tokens
        _, (known,) = model.prefill([prompt], features, store=store)
    assert known == (prompt.length - 1) // BLOCK * BLOCK
    assert model.usage.prefill_tokens - before == prompt.length - known <= BLOCK


@torch.inference_mode()
def test_a_prompt_that_goes_on_from_an_answer_runs_what_is_new() -> None:
    model, store = build(), PrefixCache(MEBIBYTE)
    maker, batch = model.prompt_maker(), prompts(build(), random.Random(5), 3)
    features = Pictures(model.vlm, model.preparation, [batch] * 3).take(batch)
    state, _ = model.prefill(batch, features)
    answers: list[list[int]] = [[] for _ in batch]
    for new in decoding.steps(model.vlm.llm, state, limits=[30] * 3, end_ids=()):
        for place, token in new:
            answers[place].append(token)
    for place, prompt in enumerate(batch):
        assert int(state.lengths[place]) == prompt.length + 29  # the last token was not fed
        model.remember(store, prompt, answers[place], state, place)
    for prompt, answer in zip(batch, answers, strict=True):
        ids, shown = prompt.samples[0].ids[:-1], [image.image for image in prompt.pictures.values()]
        longer = maker.tokens([*ids, *answer, *range(3, 9)], shown)
        expected, _ = model.prefill([longer], features)
        got, (known,) = model.prefill([longer], features, store=store)
        assert prompt.length + 29 - BLOCK <= known <= prompt.length + 29
        torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=1e-4)


def test_what_is_found_leaves_a_token_to_run() -> None:
    """Also where a longer prompt made whole blocks of all tokens of a shorter one."""
    store, tokens = PrefixCache(MEBIBYTE), list(range(100, 100 + 3 * BLOCK + 1))
    cache, drawn = DynamicCache(), torch.randn(1, 1, len(tokens), 2)
    cache.update(drawn, drawn, 0)
    store.add([tokens], cache, [range(len(tokens))])
    for length in range(1, len(tokens) + 1):
        assert len(store.find(tokens[:length])) == (length - 1) // BLOCK


def test_what_was_used_last_stays_and_bytes_have_a_bound() -> None:
    model = build(vision=False)
    maker = model.prompt_maker()
    often, *others = (maker.question(question(f"{n} {n} {n} " * 8), 0) for n in range(12))
    with torch.inference_mode():
        whole = PrefixCache(MEBIBYTE)
        model.prefill([often], {}, store=whole)
        store = PrefixCache(3 * whole.nbytes)
        model.prefill([often], {}, store=store)
        for other in others:
            model.prefill([other], {}, store=store)
            assert 0 < store.nbytes <= 3 * whole.nbytes
            assert model.prefill([often], {}, store=store)[1][0] > 0
        assert model.prefill([others[0]], {}, store=store)[1][0] < others[0].length // 2


def test_a_model_whose_rows_are_not_shared_runs_all_of_it() -> None:
    from tests.test_generate import MAMBA

    model, store = build(vision=False, config=MAMBA), PrefixCache(MEBIBYTE)
    (prompt,) = prompts(model, random.Random(3), 1)
    with torch.inference_mode():
        assert [model.prefill([prompt], {}, store=store)[1] for _ in range(2)] == [[0], [0]]
    assert store.nbytes == 0


def test_known_tokens_come_first_and_every_node_keeps_its_path() -> None:
    draw = random.Random(0)
    for _ in range(200):
        nodes: list[list[int]] = []
        start = 0
        for n in range(draw.randint(1, 6)):
            length = draw.randint(1, 4)
            nodes.append([start, length, draw.randrange(-1, n)])
            start += length
        above: list[list[int]] = []
        for begin, length, parent in nodes:
            above.append((above[parent] if parent >= 0 else []) + list(range(begin, begin + length)))
        paths = draw.choices(above, k=draw.randint(1, 4))
        counts = [draw.randrange(len(path)) for path in paths]
        division = divide(nodes, paths, counts)
        assert sorted(division.order) == list(range(start))
        ends, last = {path[-1] for path in paths}, dict[int, list[int]]()
        assert not ends & set(division.order[: division.length])
        for n, (begin, length, parent) in enumerate(division.nodes):
            assert parent < n and (begin < division.length) == (begin + length <= division.length)
            last[n] = (last[parent] if parent >= 0 else []) + division.order[begin : begin + length]
        found = {tuple(path) for path in last.values()}
        for path in paths:
            assert any(tuple(path) == whole[: len(path)] for whole in found)
