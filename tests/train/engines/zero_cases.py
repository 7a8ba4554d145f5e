"""What ranks under every ZeRO stage must do, case after case in one process group; run by test_matrix.py.

python -m tests.train.engines.zero_cases FOLDER all|diagonal, with the launcher's environment. Each rank prints one JSON
line a case. One start serves all of them: on a small box importing torch takes longer than the cases.
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

import mmit.train.engines.deepspeed_engine as engine_module
from mmit.data.chat import chat_format
from mmit.data.loader import MicroBatch, micro_batches
from mmit.data.preparation import prepare_images
from mmit.models.assemble import assemble
from mmit.models.tuning import apply_tuning
from mmit.records import Image, Record, Text, Turn, read_jsonl, write_jsonl
from mmit.train.checkpoint.model import image_preparation
from mmit.train.data.batches import Upload
from mmit.train.data.setup import Encoding, image_loader, open_data
from mmit.train.engines.base import Engine
from mmit.train.engines.deepspeed_engine import DeepSpeedEngine
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.engines.world import World, join_ranks
from tests.tiny_run import two_layers as tiny_config

CAP = 60  # seconds a case may take before it counts as hanging
# units: 0..3 one picture, 4..5 text, 6..7 two pictures; [] is an idle batch. Case -> rank -> micro-batch -> units.
# Two ranks take the first two lines.
CASES: dict[str, list[list[list[int]]]] = {
    "all images": [[[0], [1]], [[2], [3]], [[1], [2]], [[3], [0]]],
    "text only on one rank": [[[0], [1]], [[4], [5]], [[2], [3]], [[6], [7]]],
    "text only on the other": [[[4], [5]], [[0, 1], [2]], [[4], [4]], [[5], [5]]],
    "all text": [[[4], [5]], [[5], [4]], [[4], [4]], [[5], [5]]],
    "several images": [[[6], [0]], [[4], [7]], [[7], [6]], [[5], [5]]],
    "mixed rows": [[[0, 4, 6], [5]], [[7, 5], [1, 2]], [[4], [3, 6]], [[5, 0], [4]]],
    "nothing supervised in a micro-batch": [[[0], [1]], [[], [6]], [[4], []], [[], [2]]],
    "uneven last batch": [[[0], [4]], [[], []], [[1], []], [[], []]],
    "idle rank 0": [[[], []], [[2], [4]], [[], [0]], [[5], [6]]],
}
# The same eight units, split otherwise: each must equal one process that computes them as one row.
SPLITS: dict[int, list[list[list[list[int]]]]] = {
    2: [
        [[[0, 4, 6, 5]], [[1, 7, 2, 3]]],
        [[[0], [4], [6], [5]], [[1], [7], [2], [3]]],
        [[[0, 4, 6, 5, 1, 7], [2]], [[3], []]],
        [[[3, 7], [2], []], [[5], [0, 6], [1, 4]]],
    ],
    4: [
        [[[0, 4]], [[6, 5]], [[1, 7]], [[2, 3]]],
        [[[0], [4]], [[6], [5]], [[1], [7]], [[2], [3]]],
        [[[0, 4, 6], [5]], [[], [1]], [[7, 2], []], [[3], []]],
        [[[0, 1, 2, 3, 4]], [[5, 6, 7]], [[]], [[]]],
    ],
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
        image = image_preparation(self.vlm.vision, config.model.vision)
        preparation = prepare_images(image, tokens=self.vlm.image_tokens, grid=self.vlm.image_grid)
        source = config.data.train[0].model_dump()
        self.data = open_data(
            [{**source, "path": str(folder / "cases.jsonl")}],
            Encoding(chat, tokenizer),
            cache=folder,
            on_bad=None,
            preparation=preparation,
            max_length=128,
            capacity=400,
        )
        self.scan = self.data.scan()
        self.load_image = image_loader(preparation)
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
        losses = engine.forward_backward(Upload(engine.device)(batch.tensors), scale=scale, last=i == len(batches) - 1)
        total += float(losses.sum()) * batch.weight / max(targets, 1.0)
    return total


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    if isinstance(engine, TorchEngine):
        pairs = zip(engine.names, engine.masters, strict=True)
        return {n: torch.zeros_like(m) if m.grad is None else m.grad for n, m in pairs}
    from deepspeed.utils import safe_get_full_grad

    return {n: safe_get_full_grad(p) for n, p in zip(engine.names, engine.parameters, strict=True)}


def compare_case(
    bench: Bench, engine: DeepSpeedEngine, case: list[list[list[int]]], *, as_one: bool
) -> dict[str, float]:
    """Largest difference of a gradient, and of the loss, from one process that does the work of all ranks.

    It computes the same micro-batches, or with `as_one` a single row of all their records.
    """
    ranks = [bench.batches(units) for units in case[: engine.world]]
    every = [b for batches in ranks for b in batches]
    targets = float(sum(b.targets for b in every))
    loss = engine.all_sum([accumulate(engine, ranks[engine.rank], targets)])[0]
    mine = gradients(engine)
    reference = bench.reference()
    if as_one:
        every = bench.batches([[u for units in case for micro in units for u in micro]])
        assert float(every[0].targets) == targets
    expected = accumulate(reference, every, targets)
    theirs = gradients(reference)
    worst = max(float((mine[n].reshape(g.shape) - g).abs().max()) for n, g in theirs.items())
    scale = max(float(g.abs().max()) for g in theirs.values())
    norm = engine.step(0.0)
    off = abs(loss - expected) / max(abs(expected), 1.0)
    return {"gradient": worst, "scale": scale, "loss": off, "finite": float(math.isfinite(norm))}


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


def report(stage: int, name: str, result: dict[str, Any]) -> None:
    signal.alarm(CAP)  # the next case has as long
    sys.stdout.write(json.dumps({"stage": stage, "case": name, **result}) + "\n")
    sys.stdout.flush()


def chosen(stage: int, world: int, part: str) -> list[tuple[str, list[list[list[int]]], bool]]:
    """Cases (name, units, compare with one row) of a stage: all of them, or every fourth, other ones for each stage."""
    cases = [(name, case, False) for name, case in CASES.items()]
    cases += [(f"split {i}", case, True) for i, case in enumerate(SPLITS[world])]
    return cases if part == "all" else cases[stage::4]


def main(folder: Path, part: str) -> None:
    torch.set_num_threads(1)
    signal.alarm(10 * CAP)  # the start may have to compile
    world = join_ranks(kind="deepspeed", device="cpu")
    frozen, trained = Bench(folder, world), Bench(folder, world, tune_vision=True)
    for stage in range(4):
        for bench in (frozen, trained):
            if part == "diagonal" and stage < 3 and bench is (frozen, trained)[stage % 2]:
                continue
            tower = "" if bench is frozen else ", trained tower"
            engine = bench.deepspeed(stage)
            for name, case, as_one in chosen(stage, world.size, part):
                report(stage, name + tower, compare_case(bench, engine, case, as_one=as_one))
        if part == "all" or stage == 3:
            report(stage, "bad numbers", bad_number_cases(frozen, stage))
        if part == "all" or stage == 2:
            report(stage, "states", state_cases(frozen, stage, folder / f"state-{world.size}-{stage}"))
        if part == "all" and stage:
            report(stage, "bad numbers, bf16", bad_number_cases(Bench(folder, world, precision="bf16"), stage))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
