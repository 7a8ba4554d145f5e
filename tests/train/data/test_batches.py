"""Uploaded arguments are the batch's own, whatever moved them; plans made with them change nothing."""

from __future__ import annotations

import pytest
import torch

from mmit.data.prefetch import Ahead
from mmit.models import attention_plan
from mmit.models.planning import row_planner
from mmit.train.data.batches import Upload
from mmit.train.objective import Method
from tests.train.preference_bench import Bench

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("kind", ["cpu", CUDA])
def test_values_arrive_while_earlier_work_is_queued(kind):
    upload = Upload(torch.device(kind))
    busy = torch.ones(512, 512, device=kind)
    for i in range(20):
        nodes = torch.tensor([[0, 3, -1]])
        given = {"pixels": torch.full((64, 1024), i), "image_index": torch.zeros(0), "nodes": nodes, "image_tokens": 4}
        busy = busy @ busy / 512
        moved = upload(given)
        assert moved.keys() == given.keys() and moved["nodes"] is nodes and moved["image_tokens"] == 4
        assert moved["pixels"].device.type == kind
        total = moved["pixels"].sum()
        del given["pixels"], moved["pixels"]  # their memory is free for the next round
        assert int(total) == 64 * 1024 * i


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["full", "soft_prompt"])
@pytest.mark.parametrize("kind, share", [("dpo", True), ("dpo", False), ("kto", True)])
def test_a_plan_from_where_rows_are_made_gives_the_same_bits(tmp_path, monkeypatch, kind, share, mode, workers):
    """Pairs share their prompt and image, or lie one after the other; KTO runs a second row for each."""
    bench = Bench(tmp_path, kind)
    bench.data.share_prefix = share
    bench.tune["llm"] = {"mode": mode, "lr": 1e-2, "options": {}}
    made = []
    for name in ("make_buckets", "make_segments"):
        real = getattr(attention_plan, name)
        monkeypatch.setattr(attention_plan, name, lambda *given, real=real: made.append(1) or real(*given))
    steps, rows = [], [[0, 1, 2], [3]]
    for planned in (False, True):
        torch.manual_seed(0)  # a soft prompt begins at random
        steps.append(bench.step(Method(kind), rows, planned=planned, ahead=Ahead(workers)))
        steps.append(len(made))
        made.clear()
    (loss, grads, metrics), in_forward, (loss_, grads_, metrics_), again = steps
    assert (loss, metrics) == (loss_, metrics_) and grads.keys() == grads_.keys()
    assert all(torch.equal(grads[name], grads_[name]) for name in grads)
    assert sum(float(grad.abs().sum()) for grad in grads.values()) > 0
    # Here each plan was made once, before the forward pass; with workers none was made in this process.
    assert in_forward > 0 and again == (in_forward if workers == 0 else 0)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_forecast_of_a_planned_batch_holds_what_it_takes(tmp_path, kind):
    from mmit.data.loader import _Maker
    from mmit.data.preference import mates

    bench = Bench(tmp_path, kind, count=8)
    planner, paired = row_planner(bench.vlm), mates(8) if kind == "kto" else None
    expected = _Maker(bench.data, bench.scan, bench.load_image, False, planner, paired).most_bytes
    for units in ([0], [1, 2], [*range(8)]):
        (plain,), (batch,) = (bench.batches([units], plan_row=given) for given in (None, planner))
        parts = [batch, batch.compared.mismatched] if kind == "kto" else [batch]
        plans = [part.tensors["plan"].nbytes for part in parts if "plan" in part.tensors]
        assert plain.bytes + sum(plans) == batch.bytes <= expected(units)
        assert plans or len(units) == 1
