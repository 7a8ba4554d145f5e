"""DPO, ORPO and KTO: the published formulas, on packed branches, however the rows are split, resumed or refused."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmit.config import Config
from mmit.data.preference import conversations
from mmit.data.prefetch import Ahead
from mmit.errors import CheckpointError, ConfigError, MmitError, RecordError
from mmit.models.tuning import apply_tuning
from mmit.records import Record, Text, Turn
from mmit.train.objective import Items, Method, Preference, Shared, comparison_losses
from mmit.train.reference import FILE
from mmit.train.run import run
from tests.tiny_run import DROPOUT, tiny_config
from tests.train.launch import start_ranks
from tests.train.preference_bench import Bench, Data, write_pairs

METHODS = {
    "dpo": Method("dpo", beta=0.3),
    "hinge": Method("dpo", beta=0.3, loss="hinge"),
    "ipo": Method("dpo", beta=0.3, loss="ipo"),
    "robust": Method("dpo", beta=0.3, loss="robust", label_smoothing=0.2),
    "dpo and sft": Method("dpo", beta=0.3, sft_weight=0.7),
    "orpo": Method("orpo", beta=0.3),
    "kto": Method("kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
}
ROWS = [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [], [0, 2]]]


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    return {kind: Bench(folder, kind) for kind in ("dpo", "orpo", "kto")}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + math.e ** (-x))


def published(method: Method, logps: torch.Tensor, *, lengths: Any, reference: Any, good: Any) -> torch.Tensor:
    """The mean loss as the papers write it, of (B, 2) float64 log-probabilities; for KTO column 1 is mismatched."""
    beta, losses = method.beta, []
    if method.kind == "kto":
        moved = max(float((logps[:, 1].detach() - reference[:, 1]).mean()), 0.0)
    for b in range(len(logps)):
        (y_w, y_l), (r_w, r_l), (n_w, n_l) = logps[b], reference[b], lengths[b]
        if method.kind == "kto":
            sign, weight = (1, method.desirable_weight) if good[b] else (-1, method.undesirable_weight)
            losses.append(weight * (1 - sigmoid(sign * beta * (y_w - r_w - moved))))
        elif method.kind == "orpo":
            odds = [torch.exp(y / n) / (1 - torch.exp(y / n)) for y, n in ((y_w, n_w), (y_l, n_l))]
            losses.append(-beta * torch.log(sigmoid(torch.log(odds[0] / odds[1]))))
        elif method.loss == "ipo":
            losses.append(((y_w - r_w) / n_w - (y_l - r_l) / n_l - 1 / (2 * beta)) ** 2)
        else:
            h = beta * ((y_w - r_w) - (y_l - r_l))
            e = method.label_smoothing
            plain = -torch.log(sigmoid(h))
            losses.append(
                torch.clamp(1 - h, min=0)
                if method.loss == "hinge"
                else plain
                if method.loss == "sigmoid"
                else ((1 - e) * plain + e * torch.log(sigmoid(-h))) / (1 - 2 * e)
            )
    loss = torch.stack(losses).mean()
    tokens = sum(n for n, _ in lengths)
    weight = {"orpo": 1.0, "dpo": method.sft_weight, "kto": 0.0}[method.kind]
    return loss - weight * logps[:, 0].sum() / tokens


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_the_papers(name):
    torch.manual_seed(0)
    method, count = METHODS[name], 16
    logps, reference = (-3 * torch.rand(count, 2, dtype=torch.float64) - 0.1 for _ in range(2))
    lengths, good = torch.randint(1, 9, (count, 2)), torch.arange(count) % 3 > 0
    moved = max(float((logps - reference)[:, 1].mean()), 0.0) if method.kind == "kto" else 0.0
    items = Items(logps, lengths, reference, good, torch.ones(count))
    losses = comparison_losses(method, items, Shared(moved, count / float(lengths[:, 0].sum())))
    expected = published(method, logps, lengths=lengths.tolist(), reference=reference, good=good)
    torch.testing.assert_close(losses.mean(), expected, atol=1e-12, rtol=1e-12)


def test_an_answer_that_is_certain_has_a_finite_odds_ratio():
    logps = torch.tensor([[-1e-6, -40.0], [-90.0, -1e-6]], requires_grad=True)
    items = Items(logps, torch.ones(2, 2), torch.zeros(2, 2), torch.ones(2, dtype=torch.bool), torch.ones(2))
    losses = comparison_losses(METHODS["orpo"], items, Shared(per_token=1.0))
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad is not None and logps.grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_branches_of_one_row_have_the_gradient_of_answers_alone(benches, name):
    """Against the papers' loss over a plain forward of every answer by itself."""
    method = METHODS[name]
    bench = benches[method.kind]
    loss, gradients, metrics = bench.step(method, ROWS[0])
    vlm = copy.deepcopy(bench.vlm)
    groups = apply_tuning(vlm, bench.tune)
    samples = bench.samples()
    logps = torch.stack([torch.stack([bench.alone(vlm, n, s) for s in own]) for n, own in enumerate(samples)])
    lengths = [[sum(s.supervised) for s in own] for own in samples]
    good = [bench.data.record(n).label is not False for n in range(bench.count)]
    expected = published(method, logps, lengths=lengths, reference=bench.reference.double(), good=good)
    if method.kind == "kto":  # its second column is a constant of the loss
        assert metrics["kl"] > 0.1
        assert metrics["kl"] == pytest.approx(
            max(float((logps - bench.reference)[:, 1].mean().detach()), 0.0), abs=1e-5
        )
    assert loss == pytest.approx(float(expected.detach()), abs=2e-6, rel=2e-6)
    expected.backward()
    theirs = {f"{g.name}.{n}": p.grad for g in groups for n, p in g.parameters}
    scale = max(float(g.abs().max()) for g in gradients.values())
    assert scale > 1e-3
    for parameter, mine in gradients.items():
        theirs_ = theirs[parameter] if theirs[parameter] is not None else torch.zeros_like(mine)
        torch.testing.assert_close(mine, theirs_, atol=2e-6 * max(scale, 1.0), rtol=2e-5)


@pytest.mark.parametrize("rows", ROWS[1:], ids=["alone", "two and idle"])
@pytest.mark.parametrize("name", ["dpo and sft", "orpo", "kto"])
def test_any_split_of_the_same_pairs_is_the_same_step(benches, name, rows):
    bench = benches[METHODS[name].kind]
    (loss, mine, told), (expected, theirs, theirs_told) = (bench.step(METHODS[name], r) for r in (rows, ROWS[0]))
    assert loss == pytest.approx(expected, abs=1e-6) and told == pytest.approx(theirs_told, abs=1e-5)
    for parameter, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[parameter], atol=1e-6, rtol=1e-5)


def test_pairs_share_picture_and_prompt(benches):
    (batch,) = benches["dpo"].batches([[0, 1, 2, 3]])
    assert batch.records == [0, 1, 2, 3] and len(batch.image_keys) == 4
    assert batch.tokens < 0.65 * batch.unshared_tokens


def test_the_turns_before_the_answer_are_its_prompt():
    asked, earlier = Turn("user", (Text("q"),)), Turn("assistant", (Text("a "), Text("b", 0.5)), weight=2.0)
    record = Record((asked, earlier, asked, Turn("assistant", (Text("c"),))), rejected=Turn("assistant", (Text("d"),)))
    for found, answer in zip(conversations(record, "pairs"), "cd", strict=True):
        assert [turn.weight for turn in found.turns] == [0.0, 0.0, 0.0, None] and found.turns[-1].text == answer
        assert found.turns[1].parts == (Text("a "), Text("b")) and found.rejected is None
    with pytest.raises(RecordError, match="a compared answer has loss weights of its own"):
        conversations(replace(record, turns=(asked, earlier)), "pairs")


def test_the_weight_of_a_record_is_that_of_its_comparison(benches):
    bench, method = copy.copy(benches["dpo"]), METHODS["dpo"]
    one, two = (bench.step(method, [[n]])[0] for n in (0, 1))
    bench.data = copy.copy(bench.data)
    samples = bench.data.samples_of
    bench.data.samples_of = lambda record, number, **given: samples(  # type: ignore[method-assign]
        type(record)(**{f: getattr(record, f) for f in ("turns", "rejected")}, weight=3.0 if number == 0 else 1.0),
        number,
        **given,
    )
    assert bench.step(method, [[0, 1]])[0] == pytest.approx((3 * one + two) / 4, abs=1e-6)


def test_evaluation_is_the_loss_of_a_step_over_all(benches):
    """Also where the loss hangs on all of them: KTO's estimate, the tokens of a likelihood term."""
    for name in ("dpo and sft", "orpo", "kto"):
        method, bench = METHODS[name], benches[METHODS[name].kind]
        loss, _, told = bench.step(method, ROWS[0])
        engine = bench.engine()
        work = Preference(method, engine.model, bench.reference if method.referenced else None)
        found = work.evaluate(engine, Data(), bench.batches(ROWS[2]))
        assert found.pop("loss") == pytest.approx(loss, abs=1e-6) and found == pytest.approx(told, abs=1e-5)


def test_the_reference_is_what_the_model_gives_now(benches):
    """At its start a model has moved nowhere: all rewards are 0, and dpo's loss is log 2."""
    for kind, expected in (("dpo", math.log(2)), ("kto", 0.5)):
        bench = copy.copy(benches[kind])
        engine = bench.engine()
        bench.reference = Preference(Method(kind), engine.model).measure(
            engine, Data(bench.batches([[2, 0], [3, 1]])), 4
        )
        loss, _, told = bench.step(Method(kind), ROWS[0])
        assert loss == pytest.approx(expected, abs=1e-6)
        assert told["rewards/chosen"] == pytest.approx(0, abs=1e-5) and told.get("kl", 0) == pytest.approx(0, abs=1e-5)


def test_batches_from_worker_processes_are_the_same(benches):
    bench = benches["kto"]
    for mine, theirs in zip(bench.batches(ROWS[2]), bench.batches(ROWS[2], ahead=Ahead(2)), strict=True):
        others = [batch.compared.mismatched for batch in (mine, theirs)]
        assert [vars(batch.compared) | {"mismatched": 0} for batch in (mine,)] == [
            vars(theirs.compared) | {"mismatched": 0}
        ]
        for a, b in ((mine, theirs), others):
            assert a.compared.lengths == b.compared.lengths
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b.tensors[k])) for k, v in a.tensors.items())


# --- whole runs ---------------------------------------------------------------------------------------------------


def config(
    folder: Path, objective: dict[str, Any], *, steps: int = 4, data: Path | None = None, **given: Any
) -> Config:
    path = data or write_pairs(folder / "pairs", kind=objective["kind"], count=6)
    train = {"steps": steps, "rows_per_step": 2, "precision": "fp32", "objective": objective}
    sections: dict[str, Any] = {
        "data": {
            "train": [{"path": str(path)}],
            "eval": [{"path": str(path)}],
            "max_length": 128,
            "pack_tokens": 128,
            "workers": 0,
            **given.pop("data_keys", {}),
        },
        "train": {**train, **given.pop("train_keys", {})},
        "tune": DROPOUT,
        **given,
    }
    return tiny_config(folder, **sections)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", [{"kind": "dpo"}, {"kind": "orpo"}, {"kind": "kto"}], ids=lambda o: o["kind"])
def test_a_run_that_is_resumed_is_the_run(tmp_path, objective):
    """Bit for bit, reference included, which its own weights could not give any more."""
    whole = config(tmp_path, objective, train_keys={"save_every": 2, "keep_last": 4})
    assert run(whole) == 0
    trained = (tmp_path / "run" / "checkpoints" / "step-000004" / "adapter" / "adapter_model.safetensors").read_bytes()
    told = rows_of(tmp_path)
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"}
    assert names <= told[0].keys() and ("kl" in told[0]) == (objective["kind"] == "kto")
    assert {f"eval_{name}" for name in names} | {"eval_loss"} <= told[-1]["eval"].keys()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    (tmp_path / "run" / "finished.json").unlink()
    again = config(tmp_path, objective, run={"dir": str(tmp_path / "run"), "resume": "auto"})
    assert run(again) == 0
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == trained
    kept = [{k: v for k, v in r.items() if "seconds" not in k and "per_s" not in k} for r in rows_of(tmp_path)]
    for mine, theirs in zip(kept, told, strict=True):
        timed = ("memory_gib", "data_wait")
        assert all(mine[k] == theirs[k] for k in mine if k not in timed)


def test_what_a_resumed_run_may_not_change(tmp_path):
    objective = {"kind": "dpo"}
    assert run(config(tmp_path, objective, steps=2)) == 0
    resumed: dict[str, Any] = {"run": {"dir": str(tmp_path / "run"), "resume": "auto"}, "steps": 2}
    with pytest.raises(CheckpointError, match="train.objective.beta was 0.1 and is 0.2"):
        run(config(tmp_path, {"kind": "dpo", "beta": 0.2}, **resumed))
    other = write_pairs(tmp_path / "other", count=3)
    with pytest.raises(CheckpointError, match="measured on other records than those of data.eval"):
        run(config(tmp_path, objective, data_keys={"eval": [{"path": str(other)}]}, **resumed))
    (reference,) = tmp_path.glob(f"run/checkpoints/*/{FILE}")
    assert run(config(tmp_path, objective, **resumed)) == 0
    reference.unlink()
    with pytest.raises(MmitError):
        run(config(tmp_path, objective, **resumed))


@pytest.mark.parametrize(
    ("kind", "data", "problem", "remedy"),
    [
        ("sft", "dpo", "is a preference pair, of which plain tuning would learn one half", "train.objective.kind=dpo"),
        ("sft", "kto", "has an answer that is labelled bad", "train.objective.kind=kto"),
        ("dpo", "kto", r"has a label, and this method learns from pairs", "train.objective.kind=kto"),
        ("dpo", "sft", "has one answer and no verdict on it", "train.objective.kind=sft"),
        ("orpo", "sft", "has one answer and no verdict on it", "train.objective.kind=sft"),
        ("kto", "dpo", "is a preference pair, and this method learns from answers with a label", "dpo or orpo"),
    ],
)
def test_records_of_another_kind_are_refused(tmp_path, kind, data, problem, remedy):
    tiny = tiny_config(tmp_path)
    path = Path(tiny.data.train[0].path) if data == "sft" else write_pairs(tmp_path / "pairs", kind=data)
    with pytest.raises(RecordError, match=problem) as caught:
        run(config(tmp_path, {"kind": kind}, data=path))
    assert re.search(r"\.jsonl:\d+", caught.value.where) and remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"data_keys": {"loss": {"prompt_weight": 0.1}}}, "data.loss.prompt_weight"),
        ({"data_keys": {"split_turns": True}}, "data.split_turns"),
        ({"train_keys": {"router_loss": 0.1}}, "train.router_loss"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, given, key):
    with pytest.raises(ConfigError) as caught:
        run(config(tmp_path, {"kind": "dpo"}, **given))
    assert caught.value.where == key and key in caught.value.remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        ({"kind": "sft", "beta": 0.5}, "beta belongs to kind dpo or orpo or kto, and the kind is sft"),
        ({"kind": "orpo", "loss": "ipo"}, "loss belongs to kind dpo, and the kind is orpo"),
        ({"kind": "dpo", "desirable_weight": 2.0}, "desirable_weight belongs to kind kto, and the kind is dpo"),
        ({"kind": "dpo", "label_smoothing": 0.1}, "label_smoothing and loss robust belong together"),
        ({"kind": "dpo", "loss": "robust"}, "label_smoothing and loss robust belong together"),
        ({"kind": "simpo"}, "simpo"),
    ],
)
def test_options_of_another_method_are_refused(tmp_path, objective, problem):
    with pytest.raises(ConfigError, match=problem):
        config(tmp_path, objective, data=tmp_path / "none.jsonl")


def test_a_pair_longer_than_a_row_is_a_bad_record(tmp_path):
    with pytest.raises(RecordError, match="with all of its compared answers, more than data.pack_tokens=40") as caught:
        run(config(tmp_path, {"kind": "dpo"}, data_keys={"max_length": 40, "pack_tokens": 40, "share_prefix": False}))
    assert "pairs.jsonl:" in caught.value.where


def test_kto_needs_a_second_record(tmp_path):
    with pytest.raises(ConfigError, match="there is only one"):
        run(config(tmp_path, {"kind": "kto"}, data=write_pairs(tmp_path / "one", kind="kto", count=1)))


def test_a_model_that_cannot_pack_compares_padded_answers(tmp_path):
    losses = []
    for packing in (True, False):
        folder = tmp_path / str(packing)
        tune = {"tune": {"projector": {"mode": "full", "lr": 1e-2}, "llm": {"mode": "frozen"}}}
        keys = {"packing": packing, "group": False}
        rows = {"rows_per_step": 1 if packing else 6, "micro_rows": 1 if packing else 2}
        given = config(
            folder, {"kind": "dpo"}, steps=2, data_keys={"pack_tokens": 512, **keys}, train_keys=rows, **tune
        )
        assert run(given) == 0
        losses.append([row["loss"] for row in rows_of(folder) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "zero"), [("dpo", "zero3"), ("kto", "zero2")])
def test_two_ranks_are_one(tmp_path, kind, zero):
    """Rows, and what a step shares: the reference, KTO's estimate, the tokens of a likelihood term."""
    pytest.importorskip("deepspeed")
    keys = {"train_keys": {"eval_every": 2, "rows_per_step": 3}, "tune": {"llm": {"mode": "full", "lr": 1e-2}}}
    one = config(tmp_path, {"kind": kind}, **keys)
    assert run(one) == 0
    rows = rows_of(tmp_path)
    engine = {"kind": "deepspeed", "deepspeed": zero}
    two = config(tmp_path, {"kind": kind}, run={"dir": str(tmp_path / "two" / "run")}, engine=engine, **keys)
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    start_ranks(["-m", "mmit", "train", "--config", str(tmp_path / "two.yaml")], ranks=2, timeout=300)
    found = rows_of(tmp_path / "two")
    assert len(found) == len(rows) and "eval" in rows[-1]
    for mine, theirs in zip(found, rows, strict=True):
        pairs = [(mine["eval"], theirs["eval"])] if "eval" in mine else [(mine, theirs)]
        for a, b in pairs:
            names = [name for name in b if name.endswith(("loss", "kl")) or "/" in name]
            assert len(names) > 4
            assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, abs=2e-4, rel=1e-4)
