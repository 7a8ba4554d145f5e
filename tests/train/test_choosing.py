"""Training over choices: siblings in one row equal brute force one by one, and a run takes such records."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmit.data.chat import chat_format
from mmit.data.dataset import Choosing
from mmit.data.loader import MicroBatch, micro_batches
from mmit.errors import ConfigError, RecordError
from mmit.models.assemble import assemble
from mmit.models.tuning import apply_tuning
from mmit.records import Record, Text, Turn, write_jsonl
from mmit.train.data.setup import Encoding, open_data
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.run import run
from tests.tiny_run import two_layers as tiny_config

ANSWERS = ["red", "dark blue", "green"]


def choosing(number: int, shares: Sequence[float] | None = None, answers: Sequence[str] = ANSWERS) -> Record:
    turns = (Turn("user", (Text(f"What colour is number {number}?"),)), Turn("assistant", (Text(answers[0]),)))
    meta: dict[str, Any] = {"choices": list(answers)}
    if shares is not None:
        meta["shares"] = list(shares)
    return Record(turns, id=f"r{number}", meta=meta)


class Bench:
    """A tiny model, and losses and gradients of records that choose."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = tiny_config(folder, model={"vision": None}, tune={"llm": {"mode": "full", "lr": 1e-2}})
        self.vlm, self.tokenizer = assemble(self.config.model.model_dump(), dtype=torch.float32, seed=0, packed=True)
        self.chat = chat_format("hf", self.tokenizer)

    def batches(
        self, records: list[Record], *, lm: float = 0.0, split: bool = False, share: bool = True, capacity: int = 4096
    ) -> list[MicroBatch]:
        path = self.folder / "choosing.jsonl"
        write_jsonl(records, path)
        source = self.config.data.train[0].model_dump() | {"path": str(path)}
        data = open_data(
            [source],
            Encoding(self.chat, self.tokenizer),
            cache=self.folder / "cache",
            on_bad=None,
            preparation=None,
            max_length=256,
            capacity=capacity,
            share_prefix=share,
            choosing=Choosing(lm=lm),
        )
        scan = data.scan()
        if scan.bad:
            raise scan.bad[0]
        assert len(scan.length) == len(records), "siblings stay together"
        units = list(range(len(records)))
        return list(micro_batches(data, scan, [[u] for u in units] if split else [units], load_image=None))

    def step(self, records: list[Record], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses of the records, gradient of their weighted sum)."""
        vlm = copy.deepcopy(self.vlm)
        tune = self.config.tune.model_dump() | {"vision": {"mode": "frozen", "lr": None, "options": {}}}
        engine = TorchEngine(vlm, apply_tuning(vlm, tune), device=torch.device("cpu"), precision="fp32")
        losses = [
            engine.forward_backward(batch.tensors, scale=1.0, last=True, weights=batch.uneven_weights)
            for batch in self.batches(records, **options)
        ]
        gradient = torch.cat([m.grad.double().flatten() for m in engine.masters if m.grad is not None])
        return torch.cat(losses), gradient


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("choosing"))


RECORDS = [choosing(1), choosing(2, [0.2, 0.5, 0.3]), choosing(3, [0.5, 0.5], ["yes", "no"])]


@pytest.mark.parametrize("lm", [0.0, 0.3])
def test_siblings_in_one_row_equal_each_choice_alone(bench: Bench, lm: float) -> None:
    found, gradient = bench.step(RECORDS, lm=lm)
    expected = []
    for record in RECORDS:
        answers = record.meta["choices"]
        shares = record.meta.get("shares") or [1.0, 0.0, 0.0]
        user = f"<|im_start|>user\n{record.turns[0].text}<|im_end|>\n<|im_start|>assistant\n"
        scores = torch.stack([-_losses(bench, user, f"{answer}<|im_end|>").sum() for answer in answers])
        loss = -(torch.tensor(shares) * scores.log_softmax(0)).sum()
        asked = _losses(bench, "<|im_start|>user\n", record.turns[0].text).mean()
        expected.append((1 - lm) * loss + lm * asked)
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    for other in ({"split": True}, {"share": False}):
        losses, same = bench.step(RECORDS, lm=lm, **other)
        assert torch.allclose(losses, found, atol=1e-6)
        assert (same - gradient).norm() <= 1e-6 * gradient.norm()


def _losses(bench: Bench, before: str, said: str) -> torch.Tensor:
    """Cross-entropies of the tokens of `said`, by a plain forward of the language model."""
    first, ids = (bench.tokenizer(text, add_special_tokens=False).input_ids for text in (before, said))
    whole = torch.tensor([first + ids])
    with torch.no_grad():
        logits = bench.vlm.llm(input_ids=whole).logits[0, len(first) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), whole[0, len(first) :], reduction="none")


def test_the_order_of_the_choices_changes_nothing(bench: Bench) -> None:
    turned = choosing(2, [0.3, 0.2, 0.5], [ANSWERS[2], ANSWERS[0], ANSWERS[1]])
    (first, before), (second, after) = bench.step([RECORDS[1]]), bench.step([turned])
    assert torch.allclose(first, second, atol=1e-6) and (before - after).norm() <= 1e-6 * before.norm()


def test_a_share_of_one_is_the_answer_itself(bench: Bench) -> None:
    (_, own), (_, given) = bench.step([choosing(1)]), bench.step([choosing(1, [1.0, 0.0, 0.0])])
    assert torch.equal(own, given)


def test_a_record_weighs_as_it_says_and_counts_twice_where_it_is_twice(bench: Bench) -> None:
    _, once = bench.step([choosing(1)])
    _, heavy = bench.step([replace(choosing(1), weight=2.0)])
    losses, twice = bench.step([choosing(1), choosing(1)])
    assert len(losses) == 2
    for gradient in (heavy, twice):
        assert (gradient - 2 * once).norm() <= 1e-6 * once.norm()


def test_choices_that_do_not_fit_one_row(bench: Bench) -> None:
    with pytest.raises(RecordError, match="with all of its choices, more than data.pack_tokens=60"):
        bench.step([choosing(1, answers=[f"{n} and a long answer" for n in range(20)])], capacity=60)


def test_a_run_over_choices_learns_them_and_refuses_what_does_not_go_with_it(tmp_path: Path) -> None:
    write_jsonl([choosing(n, [0.0, 1.0, 0.0]) for n in range(6)], tmp_path / "choosing.jsonl")
    data = {"train": [{"path": str(tmp_path / "choosing.jsonl")}], "eval": [{"path": str(tmp_path / "choosing.jsonl")}]}
    train = {"steps": 3, "rows_per_step": 1, "objective": {"kind": "choices"}}
    options = {"model": {"vision": None}, "tune": {"projector": {"mode": "frozen"}}, "train": train}
    assert run(tiny_config(tmp_path, data=data, **options)) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"eval_loss"' in lines[-1] and '"weight": 6.0' in lines[0]
    with pytest.raises(ConfigError, match="data.split_turns: does not go with train.objective.kind=choices"):
        run(tiny_config(tmp_path, data=data | {"split_turns": True}, run={"dir": str(tmp_path / "b")}, **options))
