"""Language models as GGUF: which are refused, and that what is written turns positions as the model does."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmit.models.interop.gguf_llm import FAMILIES, _llama_3_factors, llm_tensors, paired, read_by_transformers, why_not
from mmit.models.llm import load_llm
from tests.interop.test_gguf import WIDE

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


def turned(x: torch.Tensor, place: int, *, neighbours: bool) -> torch.Tensor:
    """(d,) at a position: channels turned in neighbouring pairs, or the first half with the second."""
    angles = place * 10_000.0 ** (-torch.arange(len(x) // 2, dtype=torch.float64) / (len(x) // 2))
    a, b = (x[0::2], x[1::2]) if neighbours else x.chunk(2)
    pairs = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.stack(pairs, -1).flatten() if neighbours else torch.cat(pairs)


def test_weights_laid_in_pairs_give_the_same_attention_where_neighbours_are_turned() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2 * 8, 5, generator=generator, dtype=torch.float64) for _ in range(2))  # two heads of 8
    x, y = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        ours = [turned((w @ v)[rows], at, neighbours=False) for w, v, at in ((query, x, 7), (key, y, 3))]
        theirs = [turned((paired(w, 2) @ v)[rows], at, neighbours=True) for w, v, at in ((query, x, 7), (key, y, 3))]
        torch.testing.assert_close(ours[0] @ ours[1], theirs[0] @ theirs[1])
        wrong = [turned((w @ v)[rows], at, neighbours=True) for w, v, at in ((query, x, 7), (key, y, 3))]
        assert not torch.isclose(ours[0] @ ours[1], wrong[0] @ wrong[1])


def test_frequencies_of_llama_3_are_slowed_as_transformers_slows_them() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=512)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** (-torch.arange(0, 32, 2) / 32)
    factors = _llama_3_factors(config)
    torch.testing.assert_close(plain / factors, slowed, atol=1e-9, rtol=1e-5)
    assert factors.min() == 1 and factors.max() == 8  # the fastest is left alone, the slowest has the whole factor


@pytest.mark.parametrize(
    ("kind", "changes", "keys", "readable"),
    [
        ("llama", {}, [], True),
        ("llama", {}, ["model.layers.0.mlp.up_proj.bias"], False),
        ("qwen2", {}, ["model.layers.0.self_attn.q_proj.bias"], True),
        ("qwen3", {"head_dim": 128}, [], True),
        ("qwen3", {"head_dim": 16}, [], False),
        ("granite", {}, [], False),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, [], False),
    ],
)
def test_only_what_transformers_reads_back_is_compared(kind: str, changes: Any, keys: Any, readable: bool) -> None:
    config = SimpleNamespace(**{"model_type": kind, "rope_parameters": {}, **changes})
    llm = SimpleNamespace(config=config, state_dict=lambda: dict.fromkeys(keys))
    assert read_by_transformers(llm) is readable


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}, "writes no gpt2 LLM"),
        ({"hidden_act": "gelu"}, "with silu, and this one has gelu"),
        ({"model_type": "mistral", "sliding_window": 8}, "a window of tokens"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, "a window of"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "turned in a way .*dynamic"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "every fourth layer"),
        ({"model_type": "qwen3", "attention_bias": True}, "no place for model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_other_llms_are_refused_by_what_sets_them_apart(changes: dict[str, Any], told: str) -> None:
    given = (
        changes
        if changes.get("model_type") == "gpt2"
        else {"model_type": "llama", **WIDE, "vocab_size": 50, "pad_token_id": None, **changes}
    )
    reason = why_not(load_llm("", dtype=torch.float32, random_init=given, empty=True))
    assert reason is not None
    assert re.search(told, reason), reason


def test_rows_of_a_head_change_places() -> None:
    rows = torch.arange(8)[:, None].expand(8, 3)
    assert paired(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_every_family_has_a_name_for_every_tensor(kind: str) -> None:
    given = {"model_type": kind, **WIDE, "vocab_size": 50, "num_hidden_layers": 4}
    given |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    given |= {"sliding_window": None} if kind == "mistral" else {}
    model = load_llm("", dtype=torch.float32, random_init=given, empty=True)
    if FAMILIES[kind].arch not in gguf.MODEL_ARCH.__members__:
        assert "too old" in str(why_not(model))
        return
    assert why_not(model) is None
    assert len(llm_tensors(model)) == len({id(p) for p in model.parameters()})
