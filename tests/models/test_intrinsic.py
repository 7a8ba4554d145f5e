"""Intrinsic prompts: maps that reproduce, few numbers that are trained, a checkpoint that knows its space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmit.analysis.intrinsic import TaskLoss, make_subspace
from mmit.errors import CheckpointError, ConfigError, ModelError
from mmit.models.intrinsic import Back, Maps, Tasks, find_subspace, read_subspace, write_subspace
from mmit.models.tuning import apply_tuning, merge
from mmit.models.virtual import SoftPrompt
from mmit.train.checkpoint import model as checkpoint
from mmit.train.run import run
from tests.models.tuned_models import PREDICT_AT, composite, config_for, logits, row, tune_plan
from tests.tiny_run import DROPOUT, tiny_config
from tests.train.launch import start_ranks

PROMPTS = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("intrinsic")


def space(folder: Path, dim: int = 2, prompts: torch.Tensor = PROMPTS) -> Path:
    layers, z = find_subspace(prompts, dim, hidden=4, steps=5)
    write_subspace(folder, layers, z, tokens=prompts.shape[1], facts={})
    return folder


def test_linear_maps_of_all_numbers_reproduce_any_prompt() -> None:
    layers, z = find_subspace(PROMPTS, 3 * 16, hidden=0)
    assert torch.allclose(Back(layers, 3)(z), PROMPTS, atol=1e-6)
    directions = layers["outer.weight"]
    other = torch.randn(3, 16)  # a prompt that was not there: its point by least squares
    point = torch.linalg.lstsq(directions.double(), (other.flatten() - layers["outer.bias"]).double()[:, None])
    assert torch.allclose(Back(layers, 3)(point.solution[:, 0].float()), other, atol=1e-4)


def test_four_numbers_reproduce_five_prompts_and_fewer_lose_some() -> None:
    lost = []
    for dim in (1, 2, 4):
        layers, z = find_subspace(PROMPTS, dim, hidden=0)
        lost.append(float((Back(layers, 3)(z) - PROMPTS).pow(2).sum()))
    assert lost[0] > lost[1] > lost[2] and lost[2] < 1e-10
    assert torch.allclose(Back(layers, 3)(z.mean(0)), PROMPTS.mean(0), atol=1e-6)


def test_a_hidden_layer_learns_to_reproduce() -> None:
    few, many = (find_subspace(PROMPTS, 4, hidden=32, steps=steps, lr=1e-2) for steps in (1, 300))
    before, after = (float((Back(layers, 3)(z) - PROMPTS).pow(2).mean()) for layers, z in (few, many))
    assert after < before / 20
    again, _ = find_subspace(PROMPTS, 4, hidden=32, steps=300, lr=1e-2)
    assert all(torch.equal(again[k], many[0][k]) for k in again)


def test_the_loss_on_tasks_reaches_the_maps_through_a_frozen_model_and_trains_nothing_else(world: Path) -> None:
    soft = tune_plan("llm", "soft_prompt", {"tokens": 3})
    vlm, _ = composite(config_for(world, soft))
    apply_tuning(vlm, soft)
    vlm.requires_grad_(False).eval()
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items() if "mmit_prompt" not in name}
    met = []

    def loss(prompt: torch.nn.Module, task: int) -> torch.Tensor:
        """Each task wants another answer to one row."""
        vlm.llm.add_module("mmit_prompt", prompt)
        found = vlm(**row() | {"targets": torch.full((len(PREDICT_AT),), 20 + task)}).mean()
        met.append((task, float(found.detach())))
        return found

    for hidden in (0, 4):
        met.clear()
        maps = Maps(PROMPTS, 2, hidden=hidden, seed=0)
        loss(maps, 0).backward()
        assert {n for n, p in maps.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} == {
            n for n, _ in maps.named_parameters()
        }
        assert [n for n, p in vlm.named_parameters() if p.grad is not None and "mmit_prompt" not in n] == []
        met.clear()
        layers, z = find_subspace(PROMPTS, 2, hidden=hidden, steps=5, tasks=Tasks(loss, 20, lr=3e-2, weight=1e3))
        assert [task for task, _ in met[:6]] == [0, 1, 2, 3, 4, 0]
        first, last = (sum(value for _, value in part) for part in (met[:5], met[-5:]))
        assert last < first - 0.02  # random weights hardly look at a prompt
        vlm.llm.mmit_prompt.prompt = 3  # the module that was trained is what `Back` makes of the layers
        assert torch.allclose(Back(layers, 3)(z[3]), vlm.llm.mmit_prompt().float(), atol=1e-5)
    assert all(torch.equal(vlm.state_dict()[name], tensor) for name, tensor in before.items())


def test_only_its_numbers_are_trained_and_it_starts_as_the_mean_points_prompt(world: Path, tmp_path: Path) -> None:
    folder = space(tmp_path / "space")
    plan = tune_plan("llm", "intrinsic", {"subspace": str(folder)})
    vlm, _ = composite(config_for(world, plan))
    groups = apply_tuning(vlm, plan)
    assert [(name, tuple(p.shape)) for g in groups for name, p in g.parameters] == [("mmit_prompt.z", (2,))]
    assert sum(p.numel() for p in vlm.parameters() if p.requires_grad) == 2
    layers, start, _ = read_subspace(folder)
    soft, _ = composite(config_for(world, plan))
    apply_tuning(soft, tune_plan("llm", "soft_prompt", {"tokens": 3}))
    with torch.no_grad():
        soft.llm.get_parameter("mmit_prompt.embeddings").copy_(Back(layers, 3)(start))
    for one, other in zip(logits(vlm), logits(soft), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    logits(vlm).sum().backward()
    assert vlm.llm.get_parameter("mmit_prompt.z").grad.abs().min() > 0
    with pytest.raises(ModelError, match="a soft prompt is input"):
        merge(vlm)


@pytest.mark.slow
def test_runs_of_soft_prompts_become_a_space_and_a_run_in_it_resumes(world: Path, tmp_path: Path) -> None:
    soft = {"llm": {"mode": "soft_prompt", "lr": 1e-2, "options": {"tokens": 3}}}
    for name in "ab":
        config = tiny_config(world, run={"dir": str(tmp_path / name), "seed": ord(name)}, tune=soft, train={"steps": 1})
        assert run(config) == 0
    table = make_subspace([tmp_path / "a", tmp_path / "b"], out=tmp_path / "space", dim=1, hidden=0)
    assert [share < 1e-6 for _, share in table] == [True, True]
    train = {"steps": 4, "schedule": "constant", "warmup": 0.0, "save_every": 2}
    tune = {"llm": {"mode": "intrinsic", "lr": 1e-2, "options": {"subspace": str(tmp_path / "space")}}}
    found = []
    for name, steps in (("whole", (4,)), ("halves", (2, 4))):
        for count in steps:
            place = {"dir": str(tmp_path / name), "resume": "auto" if count == 4 and len(steps) > 1 else None}
            assert run(tiny_config(world, run=place, tune=tune, train={**train, "steps": count})) == 0
        found.append(load_file(checkpoint.find(tmp_path / name) / "llm_tuned.safetensors"))
    assert found[0].keys() == {"mmit_prompt.z", "mmit_prompt.subspace"} and found[0]["mmit_prompt.z"].shape == (1,)
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert torch.isfinite(logits(checkpoint.load_model(tmp_path / "whole", device="cpu").vlm)).all()
    # Another space of the same shape in the same place is refused.
    weights = (tmp_path / "space" / "subspace.safetensors").read_bytes()
    space(tmp_path / "other", dim=1)
    make_subspace([tmp_path / "b", tmp_path / "a"], out=tmp_path / "third", dim=1, hidden=0)
    other = (tmp_path / "third" / "subspace.safetensors").read_bytes()
    assert len(other) == len(weights)
    (tmp_path / "space" / "subspace.safetensors").write_bytes(other)
    with pytest.raises(CheckpointError, match="a point in another subspace"):
        checkpoint.load_model(tmp_path / "whole", device="cpu")
    _refusals(world, tmp_path, soft)


def _refusals(world: Path, folder: Path, soft: dict) -> None:
    """What cannot be made a space of, and a space that is not there or of another model."""
    assert run(tiny_config(world, run={"dir": str(folder / "lora")}, tune=DROPOUT, train={"steps": 1})) == 0
    with pytest.raises(ConfigError, match="tune.llm.mode=lora, and has no soft prompt"):
        make_subspace([folder / "a", folder / "lora"], out=folder / "c", dim=1)
    with pytest.raises(ConfigError, match="the folder is not empty"):
        make_subspace([folder / "a", folder / "b"], out=folder / "space", dim=1)
    with pytest.raises(ModelError, match="1 prompts of 3 x 16"):
        make_subspace([folder / "a"], out=folder / "c", dim=1)
    facts = json.loads((folder / "space" / "subspace.json").read_text())
    facts["llm"]["name"] = "another/model"
    (folder / "space" / "subspace.json").write_text(json.dumps(facts))
    tune = {"llm": {"mode": "intrinsic", "lr": 1e-2, "options": {"subspace": str(folder / "space")}}}
    with pytest.raises(ConfigError, match="is a space of soft prompts of another/model"):
        run(tiny_config(world, run={"dir": str(folder / "d")}, tune=tune))


@pytest.mark.slow
def test_the_loss_of_a_task_is_that_of_its_run_and_a_space_is_trained_on_it(world: Path, tmp_path: Path) -> None:
    soft = {"projector": {"mode": "frozen"}, "llm": {"mode": "soft_prompt", "lr": 1e-30, "options": {"tokens": 3}}}
    start = {"projector": {"mode": "full", "lr": 1e-2}, "llm": {"mode": "frozen", "lr": None, "options": {}}}
    assert run(tiny_config(world, run={"dir": str(tmp_path / "start")}, tune=start, train={"steps": 1})) == 0
    runs = [tmp_path / name for name in "abc"]
    for place in runs:
        begin = None if place.name == "c" else str(tmp_path / "start")  # c has a projector of its own
        train = {"steps": 2, "rows_per_step": 1}
        place_of = {"dir": str(place), "seed": ord(place.name), "init_from": begin}
        assert run(tiny_config(world, run=place_of, tune=soft, train=train)) == 0
    with pytest.raises(ConfigError, match="has another projector than the first run"):
        TaskLoss(runs)
    runs.pop()
    tasks = TaskLoss(runs[:1])
    prompt = SoftPrompt(load_file(checkpoint.find(runs[0]) / "llm_tuned.safetensors")["mmit_prompt.embeddings"])
    told = [json.loads(line)["loss"] for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert [float(tasks(prompt, 0).detach()) for _ in range(2)] == pytest.approx(told, abs=1e-5)
    plain, trained = (
        make_subspace(runs, out=tmp_path / f"space-{steps}", dim=1, hidden=0, task_steps=steps) for steps in (0, 4)
    )
    assert plain != trained and json.loads((tmp_path / "space-4" / "subspace.json").read_text())["task_steps"] == 4
    with pytest.raises(ConfigError, match="tune.projector.mode=full, so that its prompt belongs to a model"):
        TaskLoss([tmp_path / "start"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "no subspace is named"),
        ({"subspace": "nowhere"}, "holds no subspace"),
        ({"subspace": "wide"}, "of width 8"),
    ],
)
def test_spaces_that_cannot_be_used(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    space(tmp_path / "wide", prompts=torch.randn(3, 2, 8))
    plan = tune_plan("llm", "intrinsic", options)
    vlm, _ = composite(config_for(world, plan))
    with pytest.raises(ModelError, match=problem) as refused:
        apply_tuning(vlm, plan)
    assert refused.value.remedy


@pytest.mark.slow
def test_zero3_on_two_ranks_equals_one_process(tmp_path: Path) -> None:
    space(tmp_path / "space")
    tune = {"llm": {"mode": "intrinsic", "lr": 1e-2, "options": {"subspace": str(tmp_path / "space")}}}
    options = {"tune": tune, "train": {"steps": 3, "rows_per_step": 4, "precision": "fp32"}}
    assert run(tiny_config(tmp_path, run={"dir": str(tmp_path / "one")}, **options)) == 0
    two = tiny_config(tmp_path, run={"dir": str(tmp_path / "two")}, engine={"deepspeed": "zero3"}, **options)
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    start_ranks(["-m", "tests.train.run_many", str(tmp_path / "two.yaml")], ranks=2, timeout=600)
    lines = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    one, two_ranks = ([json.loads(line)["loss"] for line in found] for found in lines)
    assert two_ranks == pytest.approx(one, abs=1e-5)
    tensors = [load_file(checkpoint.find(tmp_path / n) / "llm_tuned.safetensors") for n in ("one", "two")]
    torch.testing.assert_close(tensors[0], tensors[1], atol=2e-3, rtol=0)
