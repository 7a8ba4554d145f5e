"""`mmit merge`: a run without its adapters is the same model, in one folder, and can be trained from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import mmit
from mmit.config import Config
from mmit.data.chat import chat_format
from mmit.interop import export as interop_export
from mmit.interop.export import source_logits
from mmit.records import Record, write_jsonl
from mmit.train.checkpoint.folders import write_folder
from mmit.train.checkpoint.model import Loaded, find, load_model, read_config, write_model
from mmit.train.run import run
from mmit.yamlio import dump_yaml
from tests.interop.test_portable import command
from tests.models.tuned_models import composite, config_for, tune_plan, tuned
from tests.tiny_run import tiny_config

PICTURE = PIL.Image.new("RGB", (30, 20), (200, 60, 40))
LORA = {"mode": "lora", "lr": 1e-3, "options": {"r": 4}}
FROZEN = {"mode": "frozen", "lr": None, "options": {}}
PLANS: dict[str, dict[str, Any]] = {
    "lora": tune_plan("llm", "lora", {"r": 4, "dora": True}),
    "ia3": tune_plan("llm", "ia3"),
    "layernorm": tune_plan("llm", "layernorm"),  # a part of the weights, not an adapter
    "vision": tune_plan("vision", "lora", {"r": 2}),
    "both": {"llm": LORA, "vision": LORA, "projector": {"mode": "full", "lr": 1e-3, "options": {}}},
    "vision in full": {"llm": LORA, "vision": {"mode": "full", "lr": 1e-3, "options": {}}, "projector": FROZEN},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


def checkpoint(folder: Path, plan: dict[str, Any], target: Path) -> Path:
    """A checkpoint of a model tuned by `plan`, its trained parameters moved."""
    config = config_for(folder, plan)
    vlm, (_, tokenizer) = tuned(config), composite(config)
    chat = chat_format("hf", tokenizer)

    def fill(draft: Path) -> None:
        write_model(draft, Loaded(vlm, tokenizer, chat, {}, target, {}, config), step=7)

    write_folder(target, [fill])
    return target


def scores(path: Path) -> list[torch.Tensor]:
    found = load_model(path, device="cpu", dtype=torch.float32)
    return source_logits(found.vlm, found.tokenizer, found.chat, found.image)


@pytest.mark.parametrize("case", PLANS)
def test_the_merged_model_is_the_same_one_and_needs_no_other_folder(folder: Path, tmp_path: Path, case: str) -> None:
    source = checkpoint(folder, PLANS[case], tmp_path / "run")
    before = scores(source)
    text = command("merge", source, tmp_path / "out")
    assert "largest difference of a logit from the source: 0 " in text and "train from it" in text
    assert not [path for path in (tmp_path / "out").glob("*") if "adapter" in path.name or "tuned" in path.name]
    out = (tmp_path / "out").rename(tmp_path / "moved")
    shutil.rmtree(source)
    for a, b in zip(before, scores(out), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    tune = read_config(out).tune
    assert tune.llm.mode == "frozen" and tune.vision.mode == ("full" if case == "vision in full" else "frozen")
    assert json.loads((out / "mmit.json").read_text())["step"] == 7
    card = (out / "README.md").read_text()  # with the recipe of the run, which its config does not have any more
    told = next(plan["mode"] for plan in PLANS[case].values() if plan["mode"] != "frozen")
    assert f"mode: {told}" in card and str(tmp_path) not in card


def test_it_is_trained_on_and_exported(folder: Path, tmp_path: Path) -> None:
    source = checkpoint(folder, PLANS["both"], tmp_path / "run")
    command("merge", source, tmp_path / "out")
    before = mmit.load(source, device="cpu").chat(PICTURE, "What?", max_new_tokens=8)
    assert mmit.load(tmp_path / "out", device="cpu").chat(PICTURE, "What?", max_new_tokens=8) == before
    raw = read_config(tmp_path / "out").model_dump()
    raw["run"]["dir"] = str(tmp_path / "second")
    raw["tune"]["llm"] = {"mode": "ia3", "lr": 1e-9}  # which cannot go on from LoRA
    raw["tune"]["projector"]["lr"] = 1e-9
    raw["train"].update(steps=1)
    assert run(Config.from_dict(raw)) == 0
    for a, b in zip(scores(tmp_path / "out"), scores(tmp_path / "second"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    command("export", tmp_path / "out", "--out", tmp_path / "hf")
    assert mmit.load(tmp_path / "hf", device="cpu").chat(PICTURE, "What?", max_new_tokens=8) == before


def test_a_model_that_sees_nothing_trains_nothing_once_it_is_merged(folder: Path, tmp_path: Path) -> None:
    raw = config_for(folder, PLANS["lora"]).model_dump()
    raw["model"]["vision"] = None
    raw["run"]["dir"] = str(tmp_path / "run")
    write_jsonl([Record.triple("Say red.", "red", id="red")], tmp_path / "texts.jsonl")
    raw["data"]["train"][0]["path"] = str(tmp_path / "texts.jsonl")
    raw["train"].update(steps=1)
    assert run(Config.from_dict(raw)) == 0
    expected = scores(find(tmp_path / "run"))
    command("merge", tmp_path / "run", tmp_path / "out", "--dtype", "bf16")
    for a, b in zip(expected, scores(tmp_path / "out"), strict=True):
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()
    config = tmp_path / "out" / "config.yaml"
    told = command("train", "--config", config, f"run.dir={tmp_path / 'second'}", code=2)
    assert "nothing is trained" in told and "full or lora" in told


def test_what_cannot_be_merged_is_refused_and_nothing_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = checkpoint(folder, tune_plan("projector", "full"), tmp_path / "plain")
    assert "nothing to merge" in command("merge", plain, out, code=2)
    prompt = checkpoint(folder, tune_plan("llm", "soft_prompt", {"tokens": 3}), tmp_path / "prompt")
    assert "a soft prompt is input, not weights" in command("merge", prompt, out, code=2)
    lora = checkpoint(folder, PLANS["lora"], tmp_path / "lora")
    assert "valid: bf16, fp16, fp32" in command("merge", lora, out, "--dtype", "fp8", code=2)
    assert "no such folder" in command("merge", tmp_path / "nothing", out, code=2)
    assert not list(tmp_path.glob("*out*"))
    out.mkdir()
    (out / "file").write_text("kept")
    assert "is there already" in command("merge", lora, out, code=2)
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_folder_that_is_another_model_does_not_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(folder, PLANS["lora"], tmp_path / "run")
    given = interop_export.source_logits
    calls: list[int] = []

    def later(*args: Any) -> list[torch.Tensor]:  # the third time is that of the folder that was written
        calls.append(1)
        return [x + 0.5 * (len(calls) == 3) for x in given(*args)]

    monkeypatch.setattr(interop_export, "source_logits", later)
    assert "a logit is off by 0.5" in command("merge", source, tmp_path / "out", code=2)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "how", "why"),
    [
        ("lora", ["merge"], "merged: the weights before training are not in the folder"),
        ("both", ["merge"], "merged: the weights before training are not in the folder"),
        ("lora", ["export", "--format", "mmit", "--out"], ""),
    ],
)
def test_it_is_evaluated(tmp_path: Path, case: str, how: list[str], why: str) -> None:
    """Answers and scores are the run's own; the untuned model is too, or the report says why there is none."""
    plans: dict[str, dict[str, Any]] = {"lora": {"llm": LORA}, "both": {"llm": LORA, "vision": LORA}}
    assert run(tiny_config(tmp_path, tune=plans[case], train={"steps": 6, "eval_every": None})) == 0
    task = {"name": "colours", "records": str(tmp_path / "data" / "train.jsonl"), "metric": "exact"}
    task |= {"prompt": "{question}", "max_new_tokens": 4, "answers": ["red", "green", "blue", "black", "yes"]}
    (tmp_path / "colours.yaml").write_text(dump_yaml(task))
    command(how[0], tmp_path / "run", *how[1:], tmp_path / "out")
    reports, answers, untuned = [], [], []
    for name in ("run", "out"):
        place = tmp_path / f"eval-{name}"
        command("eval", tmp_path / name, "--task", tmp_path / "colours.yaml", "--out", place, "--baseline-n", 3)
        reports.append(json.loads((place / "report.json").read_text()))
        lines = (place / "answers-tuned.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["answer"] for line in lines[1:]])
        beside = place / "answers-untuned.jsonl"
        untuned.append(
            [json.loads(line)["answer"] for line in beside.read_text().splitlines()[1:]] if beside.exists() else []
        )
    assert answers[0] == answers[1] and len(set(answers[0])) > 1
    before, after = reports
    assert before["accuracy"] == after["accuracy"] and before["n"] == after["n"] > 10
    assert before["baselines"]["untuned"]["n"] == 3
    if why:
        assert after["baselines"]["untuned"] is None and why in json.dumps(after)
    else:  # an export holds the base of its adapter, and the tower that was frozen
        assert untuned[0] == untuned[1] and len(untuned[1]) == 3
    assert before["baselines"]["blank_image"]["accuracy"] == after["baselines"]["blank_image"]["accuracy"]
