"""Plans made ahead are those of the row as the model runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmit.models.llm import load_llm
from mmit.models.planning import RowPlanner, row_planner
from mmit.models.tuning import apply_tuning
from mmit.models.virtual import PREFIX, with_prompt
from mmit.models.vlm import VLM

LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FLAT, SHARED = [[0, 4, -1], [4, 3, -1], [7, 5, -1]], [[0, 4, -1], [4, 3, 0], [7, 5, 0]]
ONE = [[0, 12, -1]]
LENGTH_DEPENDENT = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def composite(mode: str, options: dict[str, Any] | None = None, **config: Any) -> VLM:
    torch.manual_seed(0)
    llm = load_llm("tiny", random_init=LLAMA | config, dtype=torch.float32)
    vlm = VLM(llm, vision=None, projector=None)
    apply_tuning(vlm, {"llm": {"mode": mode, "lr": 1e-3, "options": options or {}}})
    return vlm


# A model whose factors depend on a record's length takes no rows that share beginnings.
@pytest.mark.parametrize(
    "nodes, rope", [(FLAT, None), (SHARED, None), (ONE, None), (FLAT, LENGTH_DEPENDENT), (ONE, LENGTH_DEPENDENT)]
)
@pytest.mark.parametrize("mode", ["lora", "soft_prompt", "prefix"])
def test_a_plan_is_that_of_the_row_as_it_runs(nodes, mode, rope):
    vlm = composite(mode, **({"rope_parameters": rope} if rope else {}))
    row = torch.zeros(12, 16), torch.arange(12), torch.tensor(nodes), torch.tensor([11])
    given, _ = vlm._row(*row, None)
    plan = row_planner(vlm)(row[2])
    assert (None if plan is None else plan.nodes) == (None if len(given.nodes) == 1 else given.nodes.tolist())
    if plan is not None:
        assert "buckets" in vars(plan) and "segments" not in vars(plan)  # on a CPU nothing reads them


def test_padded_records_need_no_plan_and_rows_that_share_do():
    vlm = composite("lora")
    vlm.run_padded()
    planner = row_planner(vlm)
    assert planner(torch.tensor(FLAT)) is None and planner(torch.tensor(SHARED)) is not None
    assert RowPlanner(prompt=3, repeated=True, padded=True)(torch.tensor(FLAT)) is None


def test_a_kernel_for_segments_gets_segments(monkeypatch):
    monkeypatch.setattr("mmit.models.planning.runs_on", lambda device, dtype: True)
    plan = row_planner(composite("lora"))(torch.tensor(SHARED))
    assert "segments" in vars(plan) and "buckets" not in vars(plan)
    gated = composite("prefix")
    assert {m.gate is None for m in gated.modules() if hasattr(m, "gate") and hasattr(m, "keys")} == {False}
    assert row_planner(gated).segments
    for module in gated.llm.modules():
        if isinstance(getattr(module, PREFIX, None), nn.Module):
            getattr(module, PREFIX).gate = None
    joined = row_planner(gated)
    assert joined.buckets and not joined.segments


def test_the_plan_of_another_row_is_not_used():
    vlm = composite("soft_prompt")
    given = {"positions": torch.arange(12) % 4, "nodes": torch.tensor(FLAT), "at": torch.tensor([3, 6, 11])}
    embeddings = torch.randn(12, vlm.word_embeddings.shape[1])
    wanted = vlm.row_logits(embeddings, **given)
    bare = RowPlanner()(given["nodes"])  # without the prompt that the model puts in front
    assert bare is not None and bare.nodes == FLAT
    assert torch.equal(vlm.row_logits(embeddings, **given, plan=bare), wanted)
    nodes = with_prompt(vlm.llm, embeddings, **given)[2]
    other = RowPlanner()(nodes[:, :].clone().index_fill(1, torch.tensor([2]), -1))
    assert torch.equal(vlm.row_logits(embeddings, **given, plan=other), wanted)
