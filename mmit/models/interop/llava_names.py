"""Names of a language model's tensors in a llava-hf folder.

In: a causal LM, with weights or without. Out: its tensors under names that transformers finds again, those of published
files where it does, or the sentence that says that it does not. Found out by loading an empty model of LLaVA's class.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.core_model_loading import revert_weight_conversion

from mmit.models.vision_encoder import quiet_loading

PREFIX = "language_model."
# Some tower must be there; its weights are not asked for.
TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def named_tensors(llm: Any) -> dict[str, torch.Tensor]:
    """Tensors of an LLM as published files have them: experts apart, as every version of transformers and vLLM read.

    They keep the names that they have in memory where published ones lie outside `model`, under which LLaVA's layout
    looks for a body, or where transformers renames published ones only in files of the LLM alone.
    """
    state = dict(llm.state_dict())
    # transformers 5 renames and joins tensors while it loads. The reverse of its own rules gives the names of published
    # files, which other software reads.
    found = dict(revert_weight_conversion(llm, dict(state)))
    if found.keys() == state.keys():
        return state
    inside = all(key.startswith(("model.", "lm_head.")) for key in found)
    return found if inside and not _unfound(llm.config, found) else state


def why_not_found(llm: Any) -> str | None:
    """What keeps transformers from loading the LLM's tensors as a part of LLaVA, or None."""
    state = dict(llm.state_dict())
    if dict(revert_weight_conversion(llm, dict(state))).keys() == state.keys():
        return None
    lost = _unfound(llm.config, named_tensors(llm))
    return f"transformers does not find {len(lost)} of its tensors there, such as {min(lost)}" if lost else None


def text_config_of(config: Any) -> Any:
    """A copy of an LLM's config for LLaVA's, which asks whether embeddings are tied; some configs do not say."""
    copied = copy.deepcopy(config)
    copied.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    return copied


def _unfound(config: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are missing or left over when an empty LLaVA is loaded from these."""
    config = text_config_of(config)
    tied = config.tie_word_embeddings
    empty = {f"{PREFIX}{key}": torch.empty_like(value, device="meta") for key, value in tensors.items()}
    if tied:
        # A tied head is not in published files either, and would be reported as left over.
        empty.pop(f"{PREFIX}lm_head.weight", None)
    given: Any = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=16, patch_size=8),  # type: ignore[arg-type]
        text_config=config,
        image_token_index=1,
        tie_word_embeddings=tied,
    )
    loader: Any = LlavaForConditionalGeneration
    try:
        with quiet_loading():
            _, info = loader.from_pretrained(
                None,
                config=given,
                state_dict=empty,
                device_map="meta",
                output_loading_info=True,
                trust_remote_code=False,
            )
    except RuntimeError:  # rules that join the numbers of tensors (Qwen4-Exp's tables of n-grams) cannot be tried
        return sorted(tensors)
    found = {str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]}
    return sorted(key for key in found if "language_model" in key or key.startswith("lm_head"))
