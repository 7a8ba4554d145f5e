"""The names a config takes where it chooses a kind, one line each: help, docs and `mmit config` are made from these.

Imports nothing, so that help needs no torch. The classes and functions stand in dicts with the same keys beside them
(`PROJECTORS` in models/projectors.py, ...): `tests/test_kinds.py` fails where the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping

OWN = "my_pkg.my_mod:name of your own"
PROJECTORS = {
    "linear": "one matrix",
    "mlp": "matrices with GELU between (depth)",
    "fused_mlp": "of Prismatic's fused encoders (widen)",
    "pixel_shuffle_mlp": "joins factor x factor neighbours (factor)",
    "avg_pool_mlp": "pools the grid to side x side (side)",
    "resampler": "learned queries with cross-attention (queries, depth, heads)",
    "deepstack_mlp": "features of several layers, added inside the LLM",
}
ENCODERS = {
    "open_clip": "a model of open_clip",
    "timm": "a model of timm",
    "hf": "a model of transformers",
    "fused": "several of these side by side, listed under towers",
}
TUNING = {
    "vision": {
        "frozen": "not trained",
        "full": "all weights",
        "layernorm": "the norms",
        "bitfit": "the biases",
        "lora": "low-rank updates",
    },
    "projector": {"frozen": "not trained", "full": "all weights"},
    "llm": {
        "frozen": "not trained",
        "full": "all weights",
        "lora": "low-rank updates; also DoRA, rsLoRA, LoRA+, PiSSA, OLoRA by its options",
        "qlora": "LoRA over 4-bit weights",
        "ia3": "factors on keys, values and feed-forward",
        "houlsby": "bottleneck adapters",
        "soft_prompt": "trained embeddings before the input",
        "intrinsic": "a point of a space that trained soft prompts lie in",
        "prefix": "trained keys and values in every layer",
        "bitfit": "the biases",
        "layernorm": "the norms",
    },
}
CHAT_FORMATS = {
    "hf": "the tokenizer's own template",
    "plain": "caption after the image, new line at the end",
    "vicuna_v1": "USER: and ASSISTANT: as LLaVA-1.5",
    "chatml": "<|im_start|> and <|im_end|>",
    "qa": "Question: and Answer:, for models without a template",
}
ZERO = {
    "zero0": "plain data parallelism",
    "zero1": "optimizer state divided among ranks",
    "zero2": "gradients too",
    "zero3": "weights too",
    "zero2_offload": "zero2, optimizer in CPU memory",
    "zero3_offload": "zero3, weights and optimizer in CPU memory",
    "zero3_nvme": "zero3, optimizer on NVMe",
}


def listed(kinds: Mapping[str, str], *more: str) -> str:
    """Return "a: what it is; b: ...; or MORE" for help."""
    names = [f"{name}: {line}" for name, line in kinds.items()]
    return "; ".join([*names, *more[:-1]]) + (f"; or {more[-1]}" if more else "")
