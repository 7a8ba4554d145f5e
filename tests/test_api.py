"""The front door for Python: the same run as `mmit train` makes, errors before anything is written, logits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mmit
from mmit.cli import app
from mmit.errors import ConfigError, MmitError
from mmit.records import Record, read_jsonl
from tests.tiny_run import DROPOUT, tiny_config

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"train.rows_per_step": 2, "train.precision": "fp32", "data.max_length": 128, "data.pack_tokens": 160}
SETTINGS |= {"data.workers": 0, "device": "cpu"}


def same_files(a: Path, b: Path) -> list[str]:
    """Files of two checkpoints that differ."""
    names = {str(p.relative_to(f)) for f in (a, b) for p in f.rglob("*") if p.is_file()}
    return sorted(n for n in names if not (b / n).exists() or (a / n).read_bytes() != (b / n).read_bytes())


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return folder, tiny_config(folder).model_dump()["model"]


def test_it_is_the_run_that_the_command_makes(sections, tmp_path):
    """Bit for bit, dropout included; then the command goes on where the function stopped."""
    folder, model = sections
    data = folder / "data" / "train.jsonl"
    asked = {"tune": DROPOUT, "steps": 3, "settings": SETTINGS}
    run = mmit.train(model, data, dir=tmp_path / "python", **asked)
    assert run.finished and run.dir == tmp_path / "python"
    (tmp_path / "c.yaml").write_text(run.config.to_yaml())
    elsewhere = f"run.dir={tmp_path / 'command'}"
    done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.yaml"), elsewhere])
    assert done.exit_code == 0, done.output
    a, b = (tmp_path / name / "checkpoints" / "step-000003" for name in ("python", "command"))
    # The folder of the run is in the config, and the config's hash in the manifest.
    assert set(same_files(a, b)) <= {"config.yaml", "manifest.json"}
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("python", "command")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    more = ["train", "--config", str(tmp_path / "c.yaml"), "resume=auto"]
    assert CliRunner().invoke(app, more).exit_code == 0


def test_records_and_a_checkpoint_as_the_start(sections, tmp_path):
    """Weights go on from a run; Record objects are kept in the new run's folder."""
    folder, model = sections
    first = mmit.train(model, folder / "data" / "train.jsonl", dir=tmp_path / "a", steps=1, settings=SETTINGS)
    records = [Record.triple("What is it?", f"A {word}.") for word in ("hat", "cat")]
    second = mmit.train(first.dir, records, dir=tmp_path / "b", tune={"llm": mmit.lora(r=16)}, steps=1)
    assert [r.turns for r in read_jsonl(tmp_path / "b" / "data.jsonl")] == [r.turns for r in records]
    assert second.config.run.init_from == str(first.dir / "checkpoints" / "step-000001")
    assert second.config.data.max_length == 128 and second.config.tune.llm.options["r"] == 16


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch):
    """README and docs/python.md show the same lines; here they run with a tiny model in place of the quickstart's."""
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/python.md"))
    code = next(block.split("```")[0] for block in readme.split("```python\n")[1:] if "mmit.train(" in block)
    assert code in page and len([line for line in code.splitlines() if line.strip()]) <= 10
    sizes = {"data": {**tiny_config(tmp_path).data.model_dump(), "max_length": 512, "pack_tokens": 512}}
    sizes["tune"] = {"llm": {"mode": "lora", "lr": 1e-2, "options": {"r": 16}}}  # of configs/train/quickstart.yaml
    config = tiny_config(tmp_path, run={"dir": str(tmp_path / "runs" / "quickstart")}, train={"steps": 1}, **sizes)
    from mmit.train.run import run

    assert run(config) == 0
    os.symlink(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("steps=50", "steps=1"), "README", "exec"), {"__name__": "readme"})
    assert (tmp_path / "runs" / "mine" / "finished.json").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": 7}, "model is a int"),
        ({"data": []}, "data: no data"),
        ({"data": [3]}, "data is a int"),
        ({"steps": 0}, "train.steps"),
        ({"steps": 2, "epochs": 1.0}, "exactly one of epochs and steps"),
        ({"tune": {"vison": {"mode": "full"}}}, "vison"),
        ({"settings": {"train.step": 3}}, "train.step"),
        ({"model": {"lm": {"name": "x"}}}, "model.lm"),
        ({"model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_a_wrong_argument_is_one_error_and_nothing_is_written(sections, tmp_path, change, told):
    folder, model = sections
    call = {"model": model, "data": [Record.triple("a", "b")], "dir": tmp_path / "run", "steps": 1} | change
    with pytest.raises(MmitError) as caught:
        mmit.train(call.pop("model"), call.pop("data"), **call)
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_logits_are_those_of_the_likelihoods(sections, tmp_path):
    """With an image: the log-probabilities of an answer add up to what `score` says."""
    folder, model = sections
    loaded = mmit.train(model, folder / "data" / "train.jsonl", dir=tmp_path / "r", steps=1, settings=SETTINGS).model
    picture, answer = str(folder / "data" / "0.png"), "red"
    record = Record.triple("What color is it?", answer, images=[picture])
    (sample,) = loaded.prompt_maker().choices(record, 0, answers=[answer], with_end=True).samples
    assert any(token < 0 for token in sample.ids)
    logits = loaded.logits(sample.ids, picture)
    wide = len(sample.ids) - 1 + loaded.vlm.image_tokens
    assert logits.shape == (wide, len(loaded.vlm.word_embeddings))
    # Counted from the end, where the image does not shift positions.
    chosen = [
        logits.log_softmax(-1)[i - len(sample.ids) - 1, sample.ids[i]] for i, on in enumerate(sample.supervised) if on
    ]
    (score,) = loaded.score([record], [answer], with_end=True)
    assert torch.stack(chosen).sum().item() == pytest.approx(score[0], rel=1e-5)
    text = loaded.logits([5, 6, 7])
    torch.testing.assert_close(text[:2], loaded.logits(torch.tensor([5, 6])))
    with pytest.raises(ConfigError, match="0 image slots .* for 1 images"):
        loaded.logits([5, 6], picture)
    with pytest.raises(ConfigError, match="one sequence"):
        loaded.logits(torch.zeros(1, 3, dtype=torch.int64))


def test_the_parts_work_without_a_config(sections, tmp_path):
    """The lines of docs/python.md under "The parts", with tiny models in their places."""
    folder, model = sections
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = page.split("## The parts\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**model["llm"]["random_init"])).save_pretrained(
        tmp_path / "llm"
    )
    for path in (folder / "tokenizer").iterdir():
        (tmp_path / "llm" / path.name).write_bytes(path.read_bytes())
    code = code.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(tmp_path / "llm")))
    code = code.replace('"openai/clip-vit-base-patch32"', repr(str(model["vision"]["name"])))
    code = code.replace('"assets/', f'"{ROOT}/assets/')
    names: dict[str, object] = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    assert isinstance(names["answer"], str)
