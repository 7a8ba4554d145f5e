"""Names of an LLM's tensors in a llava-hf folder, on shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmit.models.interop.llava_names import named_tensors, text_config_of, why_not_found
from mmit.models.llm import load_llm
from tests.models.small_llms import family


def empty(name: str, **changes: Any) -> Any:
    return load_llm("", dtype=torch.float32, random_init={**family(name), **changes}, empty=True)


@pytest.mark.parametrize("tied", [False, True])
def test_names_that_are_published_as_they_are_in_memory_stay(tied: bool) -> None:
    llm = empty("llama", tie_word_embeddings=tied)
    assert named_tensors(llm).keys() == llm.state_dict().keys() and why_not_found(llm) is None


def test_experts_are_apart_as_in_published_files_with_their_shapes() -> None:
    llm = empty("mixtral")
    found, state = named_tensors(llm), llm.state_dict()
    assert why_not_found(llm) is None
    experts = {key for key in found if ".experts." in key}
    assert len(experts) == 2 * 4 * 3 and not any(".experts." in key and key in state for key in found)
    # Joined in memory: as many numbers, under other names.
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in state.values())
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in found


def test_the_config_is_a_copy_that_says_whether_embeddings_are_tied() -> None:
    config = empty("llama").config
    del config.tie_word_embeddings
    copied = text_config_of(config)
    assert copied.tie_word_embeddings is False and "tie_word_embeddings" not in vars(config)
