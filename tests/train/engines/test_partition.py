"""Under ZeRO-3 no rank ever holds the whole language model: not while loading, not while training, not while saving."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("deepspeed")
from transformers import AutoConfig, AutoModelForCausalLM

from mmit.train.checkpoint import model as checkpoint
from mmit.train.run import run
from tests.tiny_run import two_layers as tiny_config
from tests.train.launch import start_ranks

# Small enough that little is live at once; DeepSpeed's defaults keep up to a billion parameters.
ZERO3 = {
    "stage": 3,
    "stage3_max_live_parameters": 1000000,
    "stage3_max_reuse_distance": 1000000,
    "stage3_prefetch_bucket_size": 1000000,
    "stage3_param_persistence_threshold": 10000,
    "sub_group_size": 1000000,
    "reduce_bucket_size": 1000000,
}


def saved_llm(folder, *, width: int, layers: int) -> float:
    """Save a random Llama in shards of 50 MB beside the tokenizer; return its size in MiB of float32."""
    tiny = tiny_config(folder)
    options = {**tiny.model.llm.random_init, "hidden_size": width, "intermediate_size": 2 * width}
    config = AutoConfig.for_model(**{**options, "num_hidden_layers": layers})
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    llm.save_pretrained(folder / "tokenizer", max_shard_size="50MB")
    return sum(p.numel() for p in llm.parameters()) * 4 / 2**20


def config_of(folder, name: str, stage: dict, *, checkpointing: str = "none", **tune):
    (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": stage}))
    config = tiny_config(
        folder,
        run={"dir": str(folder / name)},
        train={"steps": 2, "rows_per_step": 2, "precision": "fp32", "schedule": "constant", "warmup": 0},
        engine={"deepspeed": str(folder / f"{name}.json")},
    )
    raw = config.model_dump()
    raw["model"]["llm"]["random_init"] = None
    raw["train"]["checkpointing"] = checkpointing
    if tune:
        raw["tune"]["llm"] = tune
    config = type(config).from_dict(raw)
    (folder / f"{name}.yaml").write_text(config.to_yaml())
    return config


def measured(folder, name: str) -> list[dict[str, float]]:
    # Else the C library keeps freed blocks for later, and they look as if they were held.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = ["-m", "tests.train.engines.memory_case", str(folder / f"{name}.yaml")]
    said = start_ranks(arguments, ranks=2, timeout=500, env=exact)
    return [json.loads(next(x for x in reversed(s.splitlines()) if x.startswith('{"loaded"'))) for s in said]


@pytest.mark.long
def test_no_rank_holds_the_whole_model(tmp_path):
    """Memory beyond that of the same run with a tiny model: half of the weights, and little else."""
    (tmp_path / "tiny").mkdir()
    saved_llm(tmp_path / "tiny", width=16, layers=2)
    size = saved_llm(tmp_path, width=1024, layers=20)
    assert size > 700
    for folder, name, stage in (
        (tmp_path / "tiny", "parts", ZERO3),
        (tmp_path, "parts", ZERO3),
        (tmp_path, "copies", {"stage": 2}),
    ):
        config_of(folder, name, stage, checkpointing="full")  # activations are not what is measured
    tiny, parts = measured(tmp_path / "tiny", "parts"), measured(tmp_path, "parts")
    copies = measured(tmp_path, "copies")
    assert copies[1]["whole run"] > 0.95 * size  # the measure sees a copy where there is one
    for base, rank in zip(tiny, parts, strict=True):
        held = {k: (rank[k] - base[k]) / size for k in rank}
        assert held["loaded"] < 0.6 and held["whole run"] < 0.85, (size, held)


TUNED = {
    "lora": {"mode": "lora", "lr": 1e-2, "options": {"r": 4}},
    "rslora": {"mode": "lora", "lr": 1e-2, "options": {"r": 4, "rslora": True, "lr_ratio": 4}},
    "pissa": {"mode": "lora", "lr": 1e-2, "options": {"r": 4, "init": "pissa"}},
    "houlsby": {"mode": "houlsby", "lr": 1e-2, "options": {"size": 3}},
    "soft_prompt": {"mode": "soft_prompt", "lr": 1e-2},
    "bitfit": {"mode": "bitfit", "lr": 1e-2, "options": {"insert_biases": True}},
    "layernorm": {"mode": "layernorm", "lr": 1e-2},
    "full": {"mode": "full", "lr": 1e-3},
}


@pytest.mark.parametrize(
    "methods",
    [pytest.param(("lora", "layernorm", "full"), marks=pytest.mark.slow), pytest.param(TUNED, marks=pytest.mark.long)],
    ids=["few", "all"],
)
def test_divided_while_loading_equals_one_process(tmp_path, methods):
    """Also across a checkpoint: each run stops at step 1 of 2 and is resumed, with its tensors whole in between."""
    saved_llm(tmp_path, width=16, layers=2)
    paths = []
    for method in methods:
        assert run(config_of(tmp_path, f"{method}-one", ZERO3, **TUNED[method])) == 0
        config = config_of(tmp_path, f"{method}-two", ZERO3, **TUNED[method])
        raw = config.model_dump()
        raw["run"]["resume"] = "auto"
        for steps in (1, 2):
            raw["train"].update(steps=steps, schedule="constant", warmup=0)
            paths.append(tmp_path / f"{method}-{steps}.yaml")
            paths[-1].write_text(type(config).from_dict(raw).to_yaml())
    start_ranks(["-m", "tests.train.run_many", *map(str, paths)], ranks=2, timeout=900)
    for method in methods:
        one, two = ((tmp_path / f"{method}-{x}") for x in ("one", "two"))
        lines = ((x / "metrics.jsonl").read_text().splitlines() for x in (one, two))
        a, b = ([json.loads(line)["loss"] for line in found] for found in lines)
        assert b == pytest.approx(a, abs=1e-5), method
        alone, together = (checkpoint.load_model(x, device="cpu").vlm.state_dict() for x in (one, two))
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=2e-4, rtol=0, msg=f"{method}: {name}")
