"""What two ranks under one ZeRO stage must do, case after case in one process group; run by test_zero.py.

python -m tests.train.zero_cases FOLDER STAGE, with the launcher's environment. Each rank prints one JSON line a case.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import mmit.train.engine as engine_module
from mmit.data.chat import chat_format
from mmit.data.loader import MicroBatch, micro_batches
from mmit.models.assemble import assemble
from mmit.models.tuning import apply_tuning
from mmit.records import Image, Record, Text, Turn, read_jsonl, write_jsonl
from mmit.train.checkpoint import image_preparation
from mmit.train.data_setup import image_loader, open_data
from mmit.train.engine import DeepSpeedEngine, Engine, TorchEngine
from mmit.train.world import World, join_ranks
from tests.tiny_run import tiny_config

# units: 0..3 one picture, 4..5 text, 6..7 two pictures; [] is an idle batch. Case -> rank -> micro-batch -> units.
CASES: dict[str, list[list[list[int]]]] = {
    "all images": [[[0], [1]], [[2], [3]]],
    "text only on one rank": [[[0], [1]], [[4], [5]]],
    "text only on the other": [[[4], [5]], [[0, 1], [2]]],
    "all text": [[[4], [5]], [[5], [4]]],
    "several images": [[[6], [0]], [[4], [7]]],
    "mixed rows": [[[0, 4, 6], [5]], [[7, 5], [1, 2]]],
    "nothing supervised in a micro-batch": [[[0], [1]], [[], [6]]],
    "uneven last batch": [[[0], [4]], [[], []]],
    "idle rank 0": [[[], []], [[2], [4]]],
}


def write_data(folder: Path) -> None:
    """Four pictures, two texts, two records of two pictures."""
    tiny_config(folder)
    records = list(read_jsonl(folder / "data" / "train.jsonl"))
    chosen = [*records[:4], *records[12:14]]
    for i in (4, 5):
        pictures = (*records[i].images, *records[i + 2].images)
        turns = (Turn("user", (*pictures, Text("Which?"))), Turn("assistant", (Text("both"),)))
        chosen.append(Record(tuple(turns), id=f"two-{i}"))
    write_jsonl(chosen, folder / "cases.jsonl")
    assert all(isinstance(p, Image) for r in chosen for p in r.images)


class Bench:
    """A tiny model twice: under DeepSpeed, and as the reference on this rank alone."""

    def __init__(self, folder: Path, world: World, *, tune_vision: bool = False, precision: str = "fp32") -> None:
        self.folder, self.world, self.precision = folder, world, precision
        config = tiny_config(folder)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.vlm, tokenizer = assemble(config.model.model_dump(), dtype=dtype, seed=0, packed=True)
        chat = chat_format("hf", tokenizer)
        source = config.data.train[0].model_dump()
        self.data = open_data(
            [{**source, "path": str(folder / "cases.jsonl")}],
            chat,
            tokenizer,
            cache=folder,
            world=world,
            on_bad=None,
            image_tokens=self.vlm.image_tokens,
            max_length=128,
            capacity=400,
        )
        self.scan = self.data.scan()
        self.load_image = image_loader(image_preparation(self.vlm, "resize"))
        tune = config.tune.model_dump()
        if tune_vision:
            tune["vision"] = {"mode": "full", "lr": 1e-3, "options": {}}
        self.tune = tune
        torch.manual_seed(0)
        apply_tuning(self.vlm, tune)
        with torch.no_grad():
            for name, p in self.vlm.named_parameters():
                if "lora_B" in name:  # an adapter at its start hides half of the gradients
                    p.normal_(std=0.05)
        self.frozen_tower = not tune_vision

    def deepspeed(self, stage: int, vlm: Any = None, **config: Any) -> DeepSpeedEngine:
        vlm = copy.deepcopy(self.vlm) if vlm is None else vlm
        groups = apply_tuning(vlm, self.tune)
        vlm.train()
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}), **config}
        return DeepSpeedEngine(
            vlm,
            groups,
            device=self.world.device,
            precision=self.precision,
            config={"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}},
            replicated=["vision"] if self.frozen_tower else [],
        )

    def reference(self) -> TorchEngine:
        vlm = copy.deepcopy(self.vlm)
        groups = apply_tuning(vlm, self.tune)
        vlm.train()
        return TorchEngine(vlm, groups, device=self.world.device, precision=self.precision)

    def batches(self, units: list[list[int]]) -> list[MicroBatch]:
        return list(micro_batches(self.data, self.scan, units, load_image=self.load_image))


def accumulate(engine: Engine, batches: list[MicroBatch], targets: float) -> float:
    """Forward and backward of a step; returns this rank's share of the loss."""
    total = 0.0
    for i, batch in enumerate(batches):
        scale = batch.weight / max(targets, 1.0)
        losses = engine.forward_backward(batch.to(engine.device), scale=scale, last=i == len(batches) - 1)
        total += float(losses.sum()) * batch.weight / max(targets, 1.0)
    return total


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    if isinstance(engine, TorchEngine):
        pairs = zip(engine.names, engine.masters, strict=True)
        return {n: torch.zeros_like(m) if m.grad is None else m.grad for n, m in pairs}
    from deepspeed.utils import safe_get_full_grad

    return {n: safe_get_full_grad(p) for n, p in zip(engine.names, engine.parameters, strict=True)}


def compare_case(bench: Bench, engine: DeepSpeedEngine, case: list[list[list[int]]]) -> dict[str, float]:
    """Largest difference of a gradient, and of the loss, from one process that does the work of both ranks."""
    ranks = [bench.batches(units) for units in case]
    targets = float(sum(b.targets for batches in ranks for b in batches))
    loss = engine.all_sum([accumulate(engine, ranks[engine.rank], targets)])[0]
    mine = gradients(engine)
    reference = bench.reference()
    expected = accumulate(reference, [b for batches in ranks for b in batches], targets)
    theirs = gradients(reference)
    worst = max(float((mine[n].reshape(g.shape) - g).abs().max()) for n, g in theirs.items())
    scale = max(float(g.abs().max()) for g in theirs.values())
    norm = engine.step(0.0)
    return {"gradient": worst, "scale": scale, "loss": abs(loss - expected), "finite": float(math.isfinite(norm))}


def snapshot(engine: Engine, vlm: Any) -> dict[str, torch.Tensor]:
    with engine.whole([p for p in vlm.parameters() if hasattr(p, "ds_id")]):
        out = {n: p.detach().clone() for n, p in vlm.named_parameters()}
    for name, state in engine.states():
        out |= {f"{name}|{k}": v.detach().clone() for k, v in state.items()}
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def bad_number_cases(bench: Bench, stage: int) -> dict[str, bool]:
    """A loss or gradient that is not finite, on one rank: nothing may change on any; then a good step works."""
    vlm = copy.deepcopy(bench.vlm)
    engine = bench.deepspeed(stage, vlm)
    batches = bench.batches(CASES["mixed rows"][engine.rank])
    accumulate(engine, batches, 20.0)
    good = math.isfinite(engine.step(1.0))
    real = engine_module.poisoned
    faults = {
        "NaN loss": lambda losses, scale: real(losses * math.nan, scale),
        "infinite loss, finite gradient": lambda losses, scale: real(losses + math.inf, scale),
        "infinite gradient": lambda losses, scale: losses.sum() * math.inf,
    }
    out = {"first step": good}
    for name, fault in faults.items():
        for rank in range(engine.world):
            before = snapshot(engine, vlm)
            if engine.rank == rank:
                engine_module.poisoned = fault
            accumulate(engine, batches, 20.0)
            engine_module.poisoned = real
            norm = engine.step(1.0)
            out[f"{name} on rank {rank}"] = not math.isfinite(norm) and same(before, snapshot(engine, vlm))
    accumulate(engine, batches, 20.0)
    norm = engine.step(1.0)
    out["a good step after them"] = math.isfinite(norm) and not same(before, snapshot(engine, vlm))
    return out


def state_cases(bench: Bench, stage: int, folder: Path) -> dict[str, bool]:
    """State written under this stage is read bit for bit by another stage, and by the torch engine; and back."""
    vlm = copy.deepcopy(bench.vlm)
    engine = bench.deepspeed(stage, vlm)
    for units in ("mixed rows", "all images"):
        accumulate(engine, bench.batches(CASES[units][engine.rank]), 20.0)
        engine.step(1.0)
    folder.mkdir(exist_ok=True)
    engine.save_state(folder)
    engine.barrier()
    before = dict(engine.states())
    out = {}
    other = bench.deepspeed((stage + 1) % 4)
    other.load_state(folder)
    out["read by another stage"] = equal_states(before, dict(other.states()))
    again = bench.deepspeed(stage)
    again.load_state(folder)
    out["read by the same stage"] = equal_states(before, dict(again.states()))
    torch_engine = bench.reference()
    torch_engine.load_state(folder)
    out["read by the torch engine"] = equal_states(before, dict(torch_engine.states()))
    trained = [p for p in vlm.parameters() if p.requires_grad]
    with engine.whole(trained):
        out["whole"] = all(p.shape == getattr(p, "ds_shape", p.shape) and p.numel() for p in trained)
    tower = vlm.vision.state_dict()
    out["the frozen tower is replicated"] = all(
        torch.equal(v, bench.vlm.vision.state_dict()[k]) for k, v in tower.items()
    )
    return out


def equal_states(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Equal in what both keep: a float32 model needs no masters."""
    keys = ("step", "exp_avg", "exp_avg_sq")
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in keys)


def report(name: str, result: dict[str, Any]) -> None:
    signal.alarm(60)  # the next case has as long
    sys.stdout.write(json.dumps({"case": name, **result}) + "\n")
    sys.stdout.flush()


def main(folder: Path, stage: int) -> None:
    torch.set_num_threads(1)
    world = join_ranks(kind="deepspeed", device="cpu")
    signal.alarm(60)
    for trained_tower in (False, True):
        bench = Bench(folder, world, tune_vision=trained_tower)
        engine = bench.deepspeed(stage)
        for name, case in CASES.items():
            tower = ", trained tower" if trained_tower else ""
            report(f"{name}{tower}", compare_case(bench, engine, case))
    bench = Bench(folder, world)
    report("bad numbers", bad_number_cases(bench, stage))
    report("states", state_cases(bench, stage, folder / f"state-{stage}"))
    if stage:
        report("bad numbers, bf16", bad_number_cases(Bench(folder, world, precision="bf16"), stage))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
