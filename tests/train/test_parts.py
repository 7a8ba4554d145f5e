"""The parts of a run: what each refuses, and what the main rank alone does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.config import Config
from mmit.errors import ConfigError
from mmit.models.llm import load_llm
from mmit.models.tuning import apply_tuning
from mmit.models.vlm import VLM
from mmit.train import parts
from mmit.train.engines.world import World
from mmit.train.parts import Start, take_folder
from tests.models.small_llms import family
from tests.models.tuned_models import tune_plan


def config_of(folder: Path, **sections: Any) -> Config:
    raw: dict[str, Any] = {
        "model": {"vision": {"kind": "hf", "name": "eye", "cache": "memory"}, "llm": {"name": "llm"}},
        "tune": {"llm": {"mode": "lora", "lr": 1e-3}},
        "data": {"train": [{"path": "a.jsonl"}]},
        "train": {"steps": 3},
        "run": {"dir": str(folder / "run")},
    }
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    return Config.from_dict(raw, where="a test")


def start_of(config: Config, *, rank: int = 0, begin: Path | None = None) -> tuple[Start, list[Any]]:
    said: list[Any] = []
    heart: Any = SimpleNamespace(phase=lambda name, step: None)
    return Start(config, begin, World(rank, 2, torch.device("cpu"), deepspeed=False), said.append, heart), said


def test_weights_come_from_the_checkpoint_that_is_continued_and_else_from_the_start_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = config_of(tmp_path, run={"init_from": str(tmp_path / "start")}), list[str]()
    told: Any = SimpleNamespace(flat=dict, model_dump=dict)
    monkeypatch.setattr(parts.checkpoint, "read_config", lambda path: told)
    monkeypatch.setattr(parts.checkpoint, "find", lambda path, warn: path / "newest")
    monkeypatch.setattr(parts.identity, "check_config", lambda then, now, folder, say: calls.append("config"))
    monkeypatch.setattr(parts, "check_start", lambda start, then, now, say: calls.append("start"))
    assert parts._weights_from(config, tmp_path / "step", say=print) == tmp_path / "step"
    assert parts._weights_from(config, None, say=print) == tmp_path / "start" / "newest"
    assert parts._weights_from(config_of(tmp_path), None, say=print) is None
    assert calls == ["config", "start"]


def test_features_of_an_encoder_that_is_trained_are_never_cached(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    start, _ = start_of(config)
    tower = SimpleNamespace(trainable=True)
    model: Any = SimpleNamespace(config=config, vlm=SimpleNamespace(vision=tower), preparation=object())
    records: Any = SimpleNamespace(scan=SimpleNamespace(illustrated=[1]))
    with pytest.raises(ConfigError, match="features of a tower that is trained cannot be cached") as error:
        parts._features(start, model, records)
    assert error.value.where == "model.vision.cache"
    records.scan.illustrated = []  # no record shows a picture: nothing to compute
    assert parts._features(start, model, records) is None
    model.config = config_of(tmp_path, model={"vision": {"kind": "hf", "name": "eye", "cache": "off"}})
    records.scan.illustrated = [1]
    assert parts._features(start, model, records) is None


def test_checkpointing_is_forecast_where_it_is_left_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        parts, "least_recompute", lambda config, **given: asked.append(given) or ("selective", "it fits")
    )
    world: Any = SimpleNamespace(deepspeed=False, size=3, most=lambda mode, order: "full")
    said: list[str] = []
    assert parts._recompute(config_of(tmp_path, train={"checkpointing": "none"}), world, said.append) == "none"
    assert parts._recompute(config_of(tmp_path, train={"checkpointing": "auto"}), world, said.append) == "full"
    assert asked == [{"ranks": 3, "stage": None}]  # the rank that needs most decides for all
    assert said == ["train.checkpointing is full: it fits"]


def test_compiled_layers_and_divided_weights_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Divided:
        stage = 3
        device = torch.device("cpu")

    compiled: list[Any] = []
    vlm: Any = SimpleNamespace(llm="llm")
    engine: Any = Divided()
    monkeypatch.setattr(parts, "DeepSpeedEngine", Divided)
    monkeypatch.setattr(parts, "compile_layers", lambda llm, device: compiled.append((llm, device)))
    with pytest.raises(ConfigError, match="compiled layers do not see that ZeRO-3 gathers"):
        parts._compile(vlm, engine)
    engine.stage = 2
    parts._compile(vlm, engine)
    assert compiled == [("llm", "cpu")]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_rank_alone_writes_into_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    config, calls = config_of(tmp_path), list[Any]()
    (tmp_path / "run").mkdir()
    start, _ = start_of(config, rank=rank)
    monkeypatch.setattr(parts.resume, "set_aside_later", lambda folder, step, say: calls.append(("aside", step)))
    monkeypatch.setattr(parts.resume, "match_best", lambda folder, progress, metric, say: calls.append(metric))
    monkeypatch.setattr(parts, "describe", lambda *given, **more: {"hardware": {"ranks": 2}})
    model: Any = SimpleNamespace(config=config, vlm=torch.nn.Linear(1, 1).eval())
    records: Any = SimpleNamespace(train=None, scan=None, row_order=None)
    progress: Any = SimpleNamespace(step=4)
    take_folder(start, model, records, feeds=SimpleNamespace(eval=None), progress=progress)  # type: ignore[arg-type]
    assert model.vlm.training
    written = sorted(path.name for path in (tmp_path / "run").iterdir())
    if rank:
        assert written == [] and calls == []
        return
    assert written == ["config.yaml", "run.json"] and calls == [("aside", 4), None]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["step"] == 4


def test_an_export_that_a_tuned_model_cannot_be_merged_for_is_refused_at_the_start() -> None:
    """A fold into a tied head would change the words too."""
    options = family("llama") | {"tie_word_embeddings": True}
    vlm = VLM(load_llm("tiny", random_init=options, dtype=torch.float32), vision=None, projector=None)
    apply_tuning(vlm, tune_plan("llm", "lora", {"r": 2, "targets": ["lm_head"]}))
    config: Any = SimpleNamespace(export=["peft", "mmit"], tune=SimpleNamespace(llm=SimpleNamespace(mode="lora")))
    parts._check_exports(vlm, config)
    config.export.append("gguf")
    with pytest.raises(ConfigError, match="gguf has plain weights only: 'lm_head' has an adapter of its own"):
        parts._check_exports(vlm, config)
