"""From another project's folder to a run and back, and a run in every export format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

import mmit
from mmit.cli import app
from mmit.cli.export import _compare_adapter as compare_adapter
from mmit.config import Config
from mmit.errors import CheckpointError
from mmit.models.interop import hf_parts
from mmit.train.checkpoint import model as checkpoint_model
from mmit.train.checkpoint.model import read_config
from mmit.train.run import run
from tests.interop.llava_models import make_llava_hf
from tests.tiny_run import two_layers as tiny_config
from tests.tiny_run import write_records, write_tokenizer

PICTURE = PIL.Image.new("RGB", (30, 20), (200, 60, 40))


def command(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    """A run of a tiny model on a saved base, with an adapter."""
    from tests.interop.test_llava_hf_write import composite

    folder = tmp_path_factory.mktemp("run")
    tokenizer = write_tokenizer(folder / "tokenizer")
    composite(tokenizer).llm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    clip = tiny_config(folder).model.vision
    assert clip is not None
    model = {
        "vision": clip.model_dump(),
        "projector": {"kind": "mlp", "options": {"depth": 2}},
        "llm": {"name": str(folder / "base")},
    }
    assert run(tiny_config(folder, model=model, run={"dir": str(folder / "run")})) == 0
    return folder / "run"


def test_a_llava_hf_folder_is_tuned_and_goes_back(tmp_path: Path) -> None:
    make_llava_hf(tmp_path / "in", tokens="llama")
    data = write_records(tmp_path / "data")
    text = command("import-model", tmp_path / "in", tmp_path / "start")
    assert "train from it" in text
    source, start = mmit.load(tmp_path / "in", device="cpu"), mmit.load(tmp_path / "start", device="cpu")
    question: tuple[Any, ...] = (PICTURE, "What colour is it?")
    assert start.chat(*question, max_new_tokens=32) == source.chat(*question, max_new_tokens=32)

    raw = read_config(tmp_path / "start").model_dump()
    raw["run"]["dir"] = str(tmp_path / "run")
    raw["tune"]["llm"] = {"mode": "lora", "lr": 0.01, "options": {"r": 4}}
    raw["data"].update(train=[{"path": str(data)}], max_length=128, pack_tokens=160, workers=0)
    raw["train"].update(epochs=None, steps=2, rows_per_step=2)
    raw["device"] = "cpu"
    assert run(Config.from_dict(raw)) == 0
    untrained = load_file(tmp_path / "start" / "projector.safetensors")
    tuned = load_file(next((tmp_path / "run" / "checkpoints").iterdir()) / "projector.safetensors")
    moved = max(float((tuned[key] - untrained[key]).abs().max()) for key in tuned)
    assert 0 < moved < 0.1  # trained from the imported projector, not from a fresh one

    text = command("export", tmp_path / "run", "--out", tmp_path / "out")
    assert "largest difference of a logit" in text
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question[1]}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    batch = processor(images=[PICTURE], text=prompt, return_tensors="pt")
    new = model.generate(**batch, max_new_tokens=32, do_sample=False)[0, batch["input_ids"].shape[1] :]
    theirs = processor.decode(new, skip_special_tokens=True).strip()
    assert theirs == mmit.load(tmp_path / "run", device="cpu").chat(*question, max_new_tokens=32)


def test_an_imported_model_can_be_moved(tmp_path: Path) -> None:
    make_llava_hf(tmp_path / "in")
    command("import-model", tmp_path / "in", tmp_path / "start")
    expected = mmit.load(tmp_path / "start", device="cpu").chat(PICTURE, "What?", max_new_tokens=16)
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "start").rename(tmp_path / "elsewhere")
    assert mmit.load(tmp_path / "elsewhere", device="cpu").chat(PICTURE, "What?", max_new_tokens=16) == expected


def test_llava_hf(trained: Path, tmp_path: Path) -> None:
    text = command("export", trained, "--out", tmp_path / "out")
    assert "ids of the processor: the same" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_mmit_holds_everything(trained: Path, tmp_path: Path) -> None:
    assert "difference of a logit from the source: 0 " in command(
        "export", trained, "--format", "mmit", "--out", tmp_path / "out"
    )
    expected = mmit.load(trained, device="cpu").chat(PICTURE, "What?", max_new_tokens=16)
    hidden = {name: trained.parent / name for name in ("base", "vision", "tokenizer")}
    for name, folder in hidden.items():
        folder.rename(tmp_path / name)
    try:
        assert mmit.load(tmp_path / "out", device="cpu").chat(PICTURE, "What?", max_new_tokens=16) == expected
    finally:
        for name, folder in hidden.items():
            (tmp_path / name).rename(folder)


@pytest.mark.parametrize("words", [("export", "--format", "mmit", "--out"), ("merge",)])
def test_a_checkpoint_that_differs_from_its_source_is_removed(
    trained: Path, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read again has other logits, as if a tensor had been lost on the way."""
    read = checkpoint_model.load_model

    def other(folder: Path, **options: Any) -> Any:
        found = read(folder, **options)
        if Path(folder).resolve() == (tmp_path / "out").resolve():
            with torch.no_grad():
                found.vlm.word_embeddings.add_(0.1)
        return found

    monkeypatch.setattr(checkpoint_model, "load_model", other)
    said = command(words[0], trained, *words[1:], tmp_path / "out", code=2)
    assert "a logit is off by" in said and not (tmp_path / "out").exists()


def test_peft(trained: Path, tmp_path: Path) -> None:
    text = command("export", trained, "--format", "peft", "--out", tmp_path / "out")
    assert "largest difference of a logit" in text and "projector is not part" in text
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(trained.parent / "base")


@pytest.mark.parametrize(
    ("quantised", "mode", "bits"),
    [
        (True, "qlora", {"quant": "nf4", "double_quant": True}),
        (False, "qlora", None),  # loaded where bitsandbytes is not
        (False, "lora", None),
    ],
)
def test_an_adapter_is_compared_on_the_base_that_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool, mode: str, bits: Any
) -> None:
    """On the plain base the logits of a QLoRA run's adapter are others, and every such export failed."""
    asked: list[Any] = []
    monkeypatch.setattr(hf_parts, "reload_adapter", lambda *_, quantization, **__: asked.append(quantization))
    config = tiny_config(tmp_path, tune={"llm": {"mode": mode, "lr": 1e-3}})
    llm = torch.nn.Linear(2, 2)
    llm.is_quantized = quantised  # type: ignore[assignment]
    compare_adapter(SimpleNamespace(config=config, vlm=SimpleNamespace(llm=llm)), tmp_path)  # type: ignore[arg-type]
    assert asked == [bits]


def test_llava(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = command("export", trained, "--format", "llava", "--out", out, code=2)
    assert "fit resize" in refused and not out.exists()  # known from the config

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    checkpoint = next((copy / "checkpoints").iterdir())
    _edit(checkpoint, fit="pad")
    text = command("export", copy, "--format", "llava", "--out", out)
    assert "largest difference of a projector weight from the source: 0 " in text
    assert "largest difference of a logit" in text
    width = {"vision": 8, "llm": 16}
    projector = torch.load(out / "mm_projector.bin", weights_only=True)
    assert {key: tuple(value.shape) for key, value in projector.items()} == {
        "model.mm_projector.0.weight": (width["llm"], width["vision"]),
        "model.mm_projector.0.bias": (width["llm"],),
        "model.mm_projector.2.weight": (width["llm"], width["llm"]),
        "model.mm_projector.2.bias": (width["llm"],),
    }
    rest = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert {key.removeprefix("base_model.model.") for key in rest} == set(projector)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["mm_projector_type"] == "mlp2x_gelu"
    assert config["image_aspect_ratio"] == "pad" and config["mm_vision_select_layer"] == -2
    adapter = load_file(out / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in adapter)


def _edit(checkpoint: Path, *, fit: str) -> None:
    """Change how pictures are fitted in a checkpoint, and its manifest with it."""
    import hashlib

    path = checkpoint / "config.yaml"
    path.write_text(path.read_text().replace("fit: resize", f"fit: {fit}"))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"]["config.yaml"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_every_export_has_a_card_and_can_be_listed_for_the_hub(trained: Path, tmp_path: Path) -> None:
    options = ("--push-to-hub", "me/tiny", "--dry-run", "--licence", "apache-2.0")
    text = command("export", trained, "--format", "peft", "--out", tmp_path / "peft", *options)
    assert "would go to me/tiny; nothing was uploaded" in text and "adapter_model.safetensors" in text
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "license: apache-2.0" in card and "library_name: peft" in card
    assert "has not been evaluated" in card and "not stated (16 records)" in card and "mode: lora" in card
    assert str(tmp_path) not in card and str(trained.parent) not in card  # names of this machine's folders
    command("export", trained, "--format", "mmit", "--out", tmp_path / "mmit")
    assert "library_name: mmit" in (tmp_path / "mmit" / "README.md").read_text()
    mmit.load(tmp_path / "mmit", device="cpu")
    assert "is for --push-to-hub" in command("export", trained, "--out", tmp_path / "c", "--dry-run", code=2)
    assert "owner/name" in command("export", trained, "--out", tmp_path / "c", "--push-to-hub", "tiny", code=2)


def test_an_upload_without_a_network_leaves_the_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    text = command("export", trained, "--format", "peft", "--out", out, "--push-to-hub", "me/tiny", code=2)
    assert "upload to me/tiny" in text and f"hf upload me/tiny {out}" in text
    assert (out / "adapter_model.safetensors").exists()


def test_a_folder_of_another_project_is_evaluated_and_started_from(tmp_path: Path) -> None:
    make_llava_hf(tmp_path / "in", tokens="llama")
    data = write_records(tmp_path / "data", count=4, text_only=0)
    task = tmp_path / "own.yaml"
    task.write_text(f"name: own\nrecords: {data}\nmetric: exact\nmax_new_tokens: 4\n")
    command("eval", tmp_path / "in", "--task", task, "--out", tmp_path / "scores", "--baseline-n", 2)
    assert json.loads((tmp_path / "scores" / "report.json").read_text())["model"] == str(tmp_path / "in")
    options = (f"run.dir={tmp_path / 'run'}", f"data.train.0.path={data}", "train.epochs=null", "train.steps=1")
    command("train", "--from", tmp_path / "in", *options, "tune.llm.mode=lora", "tune.llm.lr=1e-3", "data.workers=0")
    assert mmit.load(tmp_path / "run", device="cpu").chat(PICTURE, "What?", max_new_tokens=4)
    assert "not both" in command("train", "--from", tmp_path / "in", "--config", task, code=2)
    started = tiny_config(tmp_path, run={"dir": str(tmp_path / "b"), "init_from": str(tmp_path / "in")})
    with pytest.raises(CheckpointError, match="mmit train --from"):
        run(started)


def test_mistakes_are_told(trained: Path, tmp_path: Path) -> None:
    assert "llava-hf" in command("export", trained, "--format", "lava-hf", "--out", tmp_path / "a", code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "is there already" in command("export", trained, "--out", tmp_path / "full", code=2)
    assert "no layout" in command("import-model", trained, tmp_path / "b", code=2)
    assert not (tmp_path / "b").exists()
