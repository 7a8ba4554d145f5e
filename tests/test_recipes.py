"""Recipes: every config loads, has the published numbers, and is built and stepped once on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mmit.train.run as training
from mmit.config import load_config
from mmit.data.preference import METHODS
from mmit.models.tuning import MODES
from mmit.train import parts
from mmit.train.checkpoint import model as checkpoint
from tests.tiny_run import tiny_config
from tests.train.preference_bench import write_pairs

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "train"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
STAGES = {p: load_config(FOLDER / f"{p}.yaml").run.init_from for p in RECIPES}

# Of haotian-liu/LLaVA scripts/v1_5/{pretrain,finetune,finetune_lora}.sh: records a step (global batch), projector and
# LLM learning rate, DeepSpeed stage.
LLAVA = {
    "llava_1.5_7b_stage1": (256, 1e-3, None, "zero2"),
    "llava_1.5_13b_stage1": (256, 1e-3, None, "zero2"),
    "llava_1.5_7b": (128, 2e-5, 2e-5, "zero3"),
    "llava_1.5_13b": (128, 2e-5, 2e-5, "zero3"),
    "llava_1.5_7b_lora": (128, 2e-5, 2e-4, "zero3"),
    "llava_1.5_13b_lora": (128, 2e-5, 2e-4, "zero3"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Data, tokenizer and tower that stand in for the published ones."""
    folder = tmp_path_factory.mktemp("recipes")
    return folder, tiny_config(folder).model


def overrides(small, config, run_dir: Path) -> list[str]:
    """Other sizes and other data; nothing of what a recipe says about training but its length."""
    folder, model = small
    captions = config.model.chat.format == "plain"
    data = folder / "data" / ("captions.jsonl" if captions else "train.jsonl")
    kind = config.train.objective.kind
    if METHODS[kind]:
        data = write_pairs(folder / kind, kind=kind)
    vision = {"kind": "hf", "name": model.vision.name, "weights": None, "key_order": False, "image_size": 32}
    if config.model.vision.kind != "hf":
        vision["layer"] = None  # counted in another encoder
    settings = {
        "run.dir": str(run_dir),
        "run.init_from": None,
        **{f"model.vision.{k}": v for k, v in vision.items()},
        "model.llm.name": model.llm.name,
        "model.llm.random_init": model.llm.random_init,
        "data.train": [{"path": str(data)}],
        "data.eval": [{"path": str(data)}] if config.data.eval else [],
        "data.max_length": 256,
        "data.pack_tokens": 512,
        "data.workers": 0,
        "train.epochs": None,
        "train.steps": 1,
        "train.rows_per_step": 1,
        "train.precision": "fp32",
        "engine.kind": "torch",
        "device": "cpu",
    }
    if config.align is not None:
        settings |= {"align.captions": str(folder / "data" / "captions.jsonl"), "align.epochs": 1}
    if config.tune.llm.mode == "qlora":  # needs bitsandbytes; LoRA is the same but for the base
        options = {k: v for k, v in config.tune.llm.options.items() if k in MODES["llm"]["lora"]}
        settings["tune.llm"] = {"mode": "lora", "lr": config.tune.llm.lr, "options": options}
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_built_and_stepped_once(small, tmp_path, monkeypatch, name):
    told = load_config(FOLDER / f"{name}.yaml")
    config = load_config(FOLDER / f"{name}.yaml", overrides(small, told, tmp_path / "run"))
    seen = {}

    def note(function, key):
        def noting(*args, **kwargs):
            seen[key] = function(*args, **kwargs) if key == "groups" else args[2]
            return seen[key] if key == "groups" else function(*args, **kwargs)

        return noting

    monkeypatch.setattr(parts, "apply_tuning", note(parts.apply_tuning, "groups"))
    monkeypatch.setattr(training, "train", note(training.train, "schedule"))
    assert training.run(config) == 0
    rates = {c: getattr(told.tune, c).lr for c in ("vision", "projector", "llm")}
    assert {g.name: g.lr for g in seen["groups"]} == {c: lr for c, lr in rates.items() if lr is not None}
    schedule = seen["schedule"]
    assert (schedule.shape, schedule.warmup, schedule.min_ratio) == (
        told.train.schedule,
        told.train.warmup,
        told.train.min_lr_ratio,
    )
    saved = checkpoint.read_config(checkpoint.find(tmp_path / "run"))
    assert saved.tune.projector == told.tune.projector and saved.tune.vision == told.tune.vision
    for key in ("weight_decay", "betas", "clip", "checkpointing", "micro_rows"):
        assert getattr(saved.train, key) == getattr(told.train, key)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])  # the last may be an evaluation
    assert row["loss"] > 0 and row["skipped_steps"] == 0


@pytest.mark.parametrize("name", LLAVA)
def test_llava_has_the_published_numbers(name):
    batch, projector, llm, zero = LLAVA[name]
    config = load_config(FOLDER / f"{name}.yaml")
    t = config.train
    assert (config.tune.projector.lr, config.tune.llm.lr, config.tune.vision.mode) == (projector, llm, "frozen")
    assert (t.schedule, t.warmup, t.weight_decay, t.epochs, t.precision) == ("cosine", 0.03, 0.0, 1, "bf16")
    assert (t.clip, t.betas, t.eps, t.checkpointing) == (1.0, (0.9, 0.999), 1e-8, "full")  # of Hugging Face's Trainer
    assert (config.data.max_length, config.engine.deepspeed) == (2048, zero)
    assert (config.model.vision.name, config.model.vision.layer) == ("openai/clip-vit-large-patch14-336", -2)
    assert config.model.projector.model_dump() == {"kind": "mlp", "options": {"depth": 2}}
    assert config.model.llm.name == f"lmsys/vicuna-{name.split('_')[2]}-v1.5"
    first = name.endswith("stage1")
    assert (config.model.chat.format, config.model.vision.fit) == (("plain", "crop") if first else ("vicuna_v1", "pad"))
    if "lora" in name:
        assert config.tune.llm.options == {"r": 128, "alpha": 256, "dropout": 0.05}
    # the published batch in tokens, as rows
    tokens = batch * (596 if first else 736)
    assert 0.9 <= tokens / (t.rows_per_step * config.data.pack_tokens) <= 1


@pytest.mark.parametrize("name", [n for n, start in STAGES.items() if start])
def test_a_second_stage_names_a_first_that_exists_or_says_how_to_make_it(name):
    start = STAGES[name]
    firsts = {load_config(FOLDER / f"{n}.yaml").run.dir for n in RECIPES}
    assert start in firsts or f"run.dir={start}" in (FOLDER / f"{name}.yaml").read_text()


def test_stage_two_goes_on_from_stage_one(small, tmp_path):
    for name, start in (("llava_1.5_7b_stage1", None), ("llava_1.5_7b", "a"), ("llava_1.5_7b_lora", "a")):
        told = load_config(FOLDER / f"{name}.yaml")
        target = tmp_path / ("a" if start is None else name)
        given = [*overrides(small, told, target), f"run.init_from={json.dumps(start and str(tmp_path / start))}"]
        assert training.run(load_config(FOLDER / f"{name}.yaml", given)) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_rows_divide_by_eight_ranks_or_run_on_one(name):
    config = load_config(FOLDER / f"{name}.yaml")
    text = (FOLDER / f"{name}.yaml").read_text()
    if "--num_gpus 8" in text:
        assert config.train.rows_per_step % (8 * config.train.micro_rows) == 0
