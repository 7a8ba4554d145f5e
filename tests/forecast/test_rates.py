"""FLOPs of a row from coefficients: pairs as they are seen, and parts that grow as they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmit.forecast.rates import Rate, Rates, RowFacts, _count_llm, count_pairs, measure_rates
from mmit.models.llm import load_llm
from mmit.models.shapes import free_attention
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from tests.models.small_llms import family

FROZEN: dict[str, Any] = {"mode": "frozen", "lr": None, "options": {}}
RATES = Rates(
    tower=Rate(10.0),
    projector=Rate(2.0, 4.0),
    backbone=Rate(3.0, 6.0, 100.0, 200.0),
    head=Rate(5.0, 10.0),
    attention=Rate(1.0, 2.0),
    prefix_pairs=0.5,
)
ROW = RowFacts(tokens=20, supervised=4, crops=2, pairs=50)


@pytest.mark.parametrize(
    "nodes",
    [
        [[0, 5, -1]],
        [[0, 3, -1], [3, 4, -1]],
        [[0, 3, -1], [3, 2, 0], [5, 4, 0], [9, 1, 2], [10, 2, -1]],
    ],
)
def test_pairs_are_those_of_every_token_with_what_it_sees(nodes: list[list[int]]) -> None:
    seen = 0
    for node, (_, length, _) in enumerate(nodes):
        at, before = nodes[node][2], 0
        while at >= 0:
            before, at = before + nodes[at][1], nodes[at][2]
        seen += sum(before + place + 1 for place in range(length))
    assert count_pairs(torch.tensor(nodes)) == seen


def test_each_part_grows_with_what_it_works_on() -> None:
    found = RATES.flops(ROW)
    assert [found[part]["forward"] for part in found] == [20.0, 4.0, 160.0, 60.0, 20.0]
    assert found["backbone"]["backward"] == 6 * 20 + 200  # and what a micro-batch costs whatever it holds
    assert found["attention"]["forward"] == 50 + 0.5 * 20  # tokens see the prefix too
    assert RATES.flops(ROW, cached=True)["tower"]["forward"] == 0
    assert RATES.flops(RowFacts(0, 0, 0, 0))["backbone"]["forward"] == 0


def test_recomputing_costs_its_share_of_the_layers_alone() -> None:
    found = RATES.flops(ROW, recompute=0.5)
    again = {part: kinds["recompute"] for part, kinds in found.items()}
    assert again == {"tower": 0, "projector": 0, "backbone": 80.0, "attention": 30.0, "head": 0}


def test_what_two_lengths_tell_holds_for_a_third() -> None:
    llama = {**family("llama"), "num_hidden_layers": 1}
    vlm = VLM(load_llm("", dtype=torch.float32, random_init=llama, empty=True), vision=None, projector=None)
    apply_tuning(vlm, {"vision": FROZEN, "projector": FROZEN, "llm": {"mode": "lora", "lr": 1e-3, "options": {}}})
    rates = measure_rates(vlm)
    with free_attention(vlm):
        counted = _count_llm(vlm, 48, 5, grad=vlm.word_embeddings.requires_grad)
    told = rates.flops(RowFacts(48, 5, 0, 0))
    assert told["backbone"]["forward"] + told["head"]["forward"] == pytest.approx(counted.forward)
    assert told["backbone"]["backward"] + told["head"]["backward"] == pytest.approx(counted.backward)
    # Products of queries and keys, and of their weights with values: 2 * 2 FLOPs a channel of every head.
    assert rates.attention == Rate(4 * 4 * 8, 8 * 4 * 8)
    assert rates.tower == rates.projector == Rate()
