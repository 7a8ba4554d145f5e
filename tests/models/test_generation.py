"""What a generation_config.json says: ends, draws, and settings that mmit does not apply, which are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from mmit.models.generation import NOT_DONE, TOP_K, GenerationFacts, end_ids, generation_facts, read_generation
from mmit.models.sampling import Sampling


def llm(**given: Any) -> Any:
    return SimpleNamespace(generation_config=GenerationConfig(**given))


@pytest.mark.parametrize(
    ("given", "ends"),
    [({}, ()), ({"eos_token_id": 2}, (2,)), ({"eos_token_id": [5, 2]}, (5, 2))],
)
def test_ids_that_end_an_answer_are_a_list(given: dict[str, Any], ends: tuple[int, ...]) -> None:
    assert generation_facts(llm(**given)).end_ids == ends
    assert generation_facts(SimpleNamespace()) == GenerationFacts()


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({"temperature": 0.3, "top_p": 0.5}, Sampling()),  # without do_sample they say nothing
        ({"do_sample": True}, Sampling(1.0, 1.0, TOP_K)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, Sampling(0.6, 0.9, 20)),
        ({"do_sample": True, "top_k": 0}, Sampling(1.0, 1.0, 0)),
    ],
)
def test_tokens_are_drawn_only_where_the_file_asks_for_it(given: dict[str, Any], sampling: Sampling) -> None:
    found = generation_facts(llm(**given))
    assert found.sampling == sampling and bool(found.told()) == bool(given.get("do_sample"))


def test_what_is_not_applied_is_named_and_what_is_off_is_not() -> None:
    found = generation_facts(llm(repetition_penalty=1.05, num_beams=4))
    assert found.notes == ("repetition_penalty 1.05", "num_beams 4")
    assert "not applied of generation_config.json: repetition_penalty 1.05, num_beams 4" in found.told()
    off = {name: value for name, value in NOT_DONE.items() if name not in ("guidance_scale", "penalty_alpha")}
    assert generation_facts(llm(**off)).notes == () and generation_facts(llm()).told() == ""


def test_the_file_of_a_folder_replaces_what_a_model_carries(tmp_path: Path) -> None:
    model = llm(eos_token_id=1)
    read_generation(model, tmp_path)  # none there
    assert generation_facts(model).end_ids == (1,)
    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
    read_generation(model, tmp_path)
    assert generation_facts(model).end_ids == (7, 8)


def test_an_answer_ends_with_the_format_s_last_id_the_tokenizer_s_and_the_model_s() -> None:
    tokenizer = SimpleNamespace(eos_token_id=2)
    assert end_ids([9, 3], tokenizer, llm(eos_token_id=[2, 5])) == (3, 2, 5)
    assert end_ids([], SimpleNamespace(eos_token_id=None), llm()) == ()
