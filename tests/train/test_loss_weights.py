"""Loss weights: a weight on a source, a record, a turn or a span scales that part of the gradient, and nothing else."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmit.data.chat import chat_format
from mmit.data.loader import micro_batches
from mmit.models.assemble import assemble
from mmit.models.tuning import apply_tuning
from mmit.records import Record, Text, Turn, write_jsonl
from mmit.train.data.setup import Encoding, open_data
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.run import run
from tests.tiny_run import two_layers as tiny_config

SYSTEM = Turn("system", (Text("Be brief and kind, and look closely."),))


def talk(number: int, **changes: Any) -> Record:
    """Two questions; `second` changes the second answer, the rest the record."""
    second = changes.pop("second", Turn("assistant", (Text("right or "), Text("wrong"))))
    turns = (
        SYSTEM,
        Turn("user", (Text("What color is it?"),)),
        Turn("assistant", (Text(f"blue {number}"),)),
        Turn("user", (Text("Is it a circle?"),)),
        second,
    )
    return Record(turns, id=f"r{number}", **changes)


class Bench:
    """A tiny model with trained projector-free LLM, and the gradient of any set of records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = tiny_config(folder, model={"vision": None}, tune={"llm": {"mode": "full", "lr": 1e-2}})
        self.config = config
        self.vlm, self.tokenizer = assemble(config.model.model_dump(), dtype=torch.float32, seed=0, packed=True)
        self.chat = chat_format("hf", self.tokenizer)

    def gradient(
        self,
        sources: list[list[Record]],
        *,
        loss: dict[str, Any] | None = None,
        share: bool = True,
        split: bool = False,
    ) -> tuple[torch.Tensor, float, int]:
        """(gradient of the weighted sum of losses, sum of weights, logits computed)."""
        opened = []
        for number, records in enumerate(sources):
            path = self.folder / f"s{number}.jsonl"
            write_jsonl(records, path)
            source = self.config.data.train[0].model_dump() | {"path": str(path), "name": f"s{number}"}
            opened.append(source)
        data = open_data(
            opened,
            Encoding(self.chat, self.tokenizer, loss or {}),
            cache=self.folder / "cache",
            on_bad=None,
            preparation=None,
            max_length=256,
            capacity=4096,
            share_prefix=share,
        )
        scan = data.scan()
        assert not scan.bad, scan.bad
        vlm = copy.deepcopy(self.vlm)
        tune = self.config.tune.model_dump() | {"vision": {"mode": "frozen", "lr": None, "options": {}}}
        engine = TorchEngine(vlm, apply_tuning(vlm, tune), device=torch.device("cpu"), precision="fp32")
        units = list(range(len(scan.length)))
        rows = [[u] for u in units] if split else [units]
        batches = list(micro_batches(data, scan, rows, load_image=None))
        total = sum(batch.loss_weight for batch in batches)
        for number, batch in enumerate(batches):
            engine.forward_backward(
                batch.tensors, scale=1.0, last=number == len(batches) - 1, weights=batch.uneven_weights
            )
        flat = torch.cat([m.grad.double().flatten() for m in engine.masters if m.grad is not None])
        return flat, total, sum(batch.targets for batch in batches)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("loss"))


def on_record(w: float) -> dict[str, Any]:
    return {"sources": [[talk(1), talk(2, weight=w)], [talk(3)]]}


def on_turn(w: float) -> dict[str, Any]:
    second = Turn("assistant", (Text("right or wrong"),), weight=w)
    return {"sources": [[talk(1), talk(2, second=second)], [talk(3)]]}


def on_span(w: float) -> dict[str, Any]:
    second = Turn("assistant", (Text("right or "), Text("wrong", w)))
    return {"sources": [[talk(1), talk(2, second=second)], [talk(3)]]}


def on_source(w: float) -> dict[str, Any]:
    return {"sources": [[talk(1), talk(2)], [talk(3)]], "loss": {"sources": {"s1": w}}}


def on_prompt(w: float) -> dict[str, Any]:
    return {"sources": [[talk(1), talk(2)], [talk(3)]], "loss": {"prompt_weight": w}}


def on_role(w: float) -> dict[str, Any]:
    return {"sources": [[talk(1), talk(2)], [talk(3)]], "loss": {"roles": {"user": w}}}


@pytest.mark.parametrize("place", [on_record, on_turn, on_span, on_prompt, on_role, on_source])
@pytest.mark.parametrize("share", [True, False])
def test_a_weight_scales_its_part_of_the_gradient(bench: Bench, place: Any, share: bool) -> None:
    if place in (on_record, on_source):  # where all weighs nothing there is nothing to learn, which is a bad record
        rest = [[talk(1)], [talk(3)]] if place is on_record else [[talk(1), talk(2)]]
        zero = bench.gradient(rest, share=share)
    else:
        zero = bench.gradient(**place(0.0), share=share)
    one, some = (bench.gradient(**place(w), share=share) for w in (1.0, 0.3))
    expected = zero[0] + 0.3 * (one[0] - zero[0])
    assert (some[0] - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (one[0] - zero[0]).abs().max() > 1e-3 * one[0].abs().max()  # the part matters
    assert some[1] == pytest.approx(zero[1] + 0.3 * (one[1] - zero[1]))
    assert zero[2] < one[2] == some[2]  # weight 0 computes no logits


def test_packing_and_sharing_change_nothing(bench: Bench) -> None:
    given = on_span(0.3)
    whole = bench.gradient(**given)
    for options in ({"share": False}, {"split": True}):
        other = bench.gradient(**given, **options)
        assert (other[0] - whole[0]).abs().max() <= 1e-6 * whole[0].abs().max()
        assert other[1] == whole[1] and other[2] == whole[2]


def test_records_that_share_tokens_keep_their_own_weights(bench: Bench) -> None:
    """The same conversation twice, weighed 0.25 and 0.75, is that conversation once."""
    both = bench.gradient([[talk(1, weight=0.25), talk(1, weight=0.75)]])
    once = bench.gradient([[talk(1)]])
    assert (both[0] - once[0]).abs().max() <= 1e-6 * once[0].abs().max()
    assert both[1] == pytest.approx(once[1])


def test_weight_one_is_no_weight_to_the_bit(bench: Bench) -> None:
    plain = bench.gradient([[talk(1), talk(2)], [talk(3)]])
    stated = [replace(talk(n), weight=1.0) for n in (1, 2)]
    loss = {"roles": {"assistant": 1.0}, "sources": {"s0": 1.0, "s1": 1.0}, "think": 1.0, "last_turn": False}
    ones = bench.gradient([stated, [talk(3)]], loss=loss)
    assert torch.equal(plain[0], ones[0]) and plain[1:] == ones[1:]


def test_only_the_last_turn(bench: Bench) -> None:
    last = bench.gradient([[talk(1)]], loss={"last_turn": True})
    system, ask, _, *rest = talk(1).turns
    silent = replace(talk(1), turns=(system, ask, Turn("assistant", (Text("blue 1"),), weight=0.0), *rest))
    by_hand = bench.gradient([[silent]])
    assert torch.equal(last[0], by_hand[0]) and last[2] == by_hand[2]


def config_of(folder: Path, name: str, **more: Any) -> Any:
    data = folder / "weighted.jsonl"
    if not data.exists():
        write_jsonl([talk(n, weight=0.25 + 0.25 * (n % 3)) for n in range(8)], data)
    section = {"train": [{"path": str(data), "name": "w"}], "loss": {"prompt_weight": 0.1, "sources": {"w": 0.01}}}
    section |= {"max_length": 128, "pack_tokens": 160, "workers": 0}
    train = {"steps": 3, "rows_per_step": 4, "precision": "fp32"}
    return tiny_config(folder, run={"dir": str(folder / name)}, data=section, train=train, **more)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def means_of(folder: Path) -> dict[str, torch.Tensor]:
    """Adam's first moments in the last checkpoint of a run, by parameter."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    state = load_file(last / "trainer" / "optimizer-00001.safetensors")
    return {name: value.double() for name, value in state.items() if name.endswith("exp_avg")}


def test_a_run_reports_the_weighted_mean(tmp_path: Path) -> None:
    assert run(config_of(tmp_path, "run")) == 0
    for row in rows_of(tmp_path / "run"):
        assert 0 < row["weight"] < row["supervised"]  # weights far below 1 in all, which must not be taken for 1
        assert row["loss_of"]["w"] == pytest.approx(row["loss"]) and 3 < row["loss"] < 9


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    from mmit.errors import ConfigError

    config = config_of(tmp_path, "run")
    data = {**config.data.model_dump(), "loss": {"sources": {"v": 2}}}
    wrong = type(config).from_dict({**config.model_dump(), "data": data})
    with pytest.raises(ConfigError, match="no source is named 'v'"):
        run(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_two_ranks_take_the_steps_of_one(tmp_path: Path, stage: str) -> None:
    pytest.importorskip("deepspeed")
    from tests.train.launch import ROOT, start_ranks

    assert run(config_of(tmp_path, "one")) == 0
    (tmp_path / "two.yaml").write_text(config_of(tmp_path, "two", engine={"deepspeed": stage}).to_yaml())
    start_ranks([str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "two.yaml")], ranks=2, timeout=240)
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["weight"] == pytest.approx(two["weight"]) and one["supervised"] == two["supervised"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-6)
    # The mean of the gradients so far. Above, a weight scales that of one rank within 1e-6; two ranks have the same,
    # but for the order in which float32 adds (3e-7 of the largest number of a tensor is seen).
    one, two = (means_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 10
    for name, mean in one.items():
        assert (mean - two[name]).abs().max() <= 1e-6 * mean.abs().max(), name
