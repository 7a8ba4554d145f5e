"""The commands do what their help says, start at once, and answer a mistake with one message."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from mmit.cli import app
from mmit.records import Record, Text, Turn
from tests.cli.commands import ROOT, assert_one_message, good, mmit, python, write_task
from tests.tiny_run import tiny_config

DATA_COMMANDS = [["data", name] for name in ("import", "check", "show", "stats")]
COMMANDS = [["init"], ["train"], ["eval"], ["chat"], ["data"], *DATA_COMMANDS, ["inspect"], ["env"], ["config"]]


# Help


def test_help_comes_at_once_and_without_torch():
    seconds = []
    for _ in range(3):  # the fastest of three, since the machine may be busy with something else
        start = time.perf_counter()
        result = python("-m", "mmit", "--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0 and "train" in result.stdout, result.stderr
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1, seconds
    heavy = "{'torch', 'transformers', 'numpy', 'PIL'}"
    code = f"import sys, mmit.cli\ntry: mmit.cli.main(['--help'])\nexcept SystemExit: print({heavy} & set(sys.modules))"
    assert python("-c", code).stdout.endswith("set()\n")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help(command):
    text = good(*command, "--help").output
    undocumented = re.findall(r"^│ +(--[\w-]+) .*<\w+> *│$", text, re.MULTILINE)
    assert not undocumented


def test_unknown_words_get_a_suggestion():
    result = mmit("trian")
    assert result.exit_code == 2 and "'train'" in result.stderr
    result = mmit("chat", "run", "--imgae", "x.png")
    assert result.exit_code == 2 and "--image" in result.stderr


SPEAKS = (
    "{% if shout is defined %}{{ raise_exception('shouted at: ' + shout) }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.reasoning_content %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content }}{% if 'LOUD' in m.content %}{{ '!' }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def spoken(made, tmp_path_factory):
    """A run with a template that looks at words, on thoughts, and what its start said."""
    folder = tmp_path_factory.mktemp("spoken")
    for part in ("tokenizer", "vision"):
        os.symlink(made / part, folder / part)
    (folder / "speaks.jinja").write_text(SPEAKS)
    (folder / "data").mkdir()
    say = {"role": "user", "content": "Say it"}
    rows = [{"messages": [say, {"role": "assistant", "content": "no", "reasoning_content": "hm"}]}] * 3
    rows += [{"messages": [say, {"role": "assistant", "content": "LOUD"}]}]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "data" / "train.jsonl"), "format": "messages", "name": "talks"}
    config = tiny_config(folder, data={"train": [source], "loss": {"sources": {"talks": 0.5}, "think": 0.5}})
    (folder / "config.yaml").write_text(config.to_yaml())
    chat = f"model.chat.format={folder / 'speaks.jinja'}"
    return folder, good("train", "--config", folder / "config.yaml", "train.steps=1", chat).output


def test_a_text_that_is_not_the_templates_is_told_at_every_stage(spoken):
    folder, said = spoken
    said = " ".join(said.split())
    assert "is not what the chat template writes: at character" in said
    assert "assistant\\nLOUD<|im_end|>\\n', the template '" in said and "assistant\\nLOUD!<|im_end|>" in said
    assert "«0.25:<think>" in said  # the record of the start, its source's weight in it
    given = (folder / "data" / "train.jsonl", "--tokenizer", folder / "tokenizer", "--chat", folder / "speaks.jinja")
    checked = mmit("data", "check", *given, "--format", "messages")
    assert checked.exit_code == 1 and "not-the-template" in checked.stdout and "train.jsonl:4" in checked.stdout
    assert "not what the chat template writes" in good("inspect", *given, "--row", 4).stdout
    assert "not what" not in good("inspect", *given, "--row", 1).stdout


def test_weights_of_sources_are_shown(spoken):
    folder, _ = spoken
    shown = good("inspect", folder / "config.yaml", f"--chat={folder / 'speaks.jinja'}").stdout
    assert "0.25:" in shown and "0.5:" in shown  # a thought, half of it, in a source of half weight; its answer
    page = folder / "show.html"
    good("data", "show", folder / "config.yaml", f"--chat={folder / 'speaks.jinja'}", "--out", page)
    assert "weight 0.25" in page.read_text() and "weight 0.5" in page.read_text()


def test_a_run_that_learnt_thoughts_is_asked_before_them(spoken):
    from mmit.generate import load

    folder, _ = spoken
    checkpoint = next((folder / "run").rglob("mmit.json"))
    assert json.loads(checkpoint.read_text())["chat"]["thinks"] is True
    question = Record((Turn("user", (Text("Say it"),)),))
    ends = {}
    for args in ({}, {"enable_thinking": False}):
        model = load(folder / "run", template_args=args)
        (sample,) = model.prompt_maker().question(question, 0).samples
        ends[bool(args)] = model.tokenizer.decode(sample.ids[:-1])
    assert ends[False].endswith("<|im_start|>assistant\n") and ends[True].endswith("<think>\n\n</think>\n\n")
    told = mmit("chat", folder / "run", "-p", "Hi", "--template-arg", "shout=me")
    assert_one_message(told, "shouted at: me")
    good("chat", folder / "run", "-p", "Hi", "--template-arg", "enable_thinking=false", "--max-new-tokens", 2)
    wrong = mmit("chat", folder / "run", "-p", "Hi", "--template-arg", "shout")
    assert wrong.exit_code == 2 and "'shout' is not NAME=VALUE" in wrong.stderr


# Mistakes

QUESTION = {"role": "user", "parts": [{"text": "What?"}]}
ANSWER = {"role": "assistant", "parts": [{"text": "A thing."}]}


def rows_with(folder: Path, *turns: Any) -> None:
    """Put a sound record and one of `turns` into the data."""
    rows = [{"id": "good", "turns": [QUESTION, ANSWER]}, {"id": "bad", "turns": list(turns)}]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(name: str) -> dict[str, Any]:
    return {"role": "user", "parts": [{"image": name}, {"text": "What?"}]}


def spoil(folder: Path) -> None:
    (folder / "data" / "0.png").write_text("no picture")


BAD_DATA = {
    "missing image": (lambda f: rows_with(f, picture("gone.png"), ANSWER), ["train.jsonl", "(bad)", "gone.png"]),
    "unreadable image": (spoil, ["0.png", "picture-0"]),
    "image without a file": (lambda f: rows_with(f, picture(""), ANSWER), ["record 2", "without a file"]),
    "wrong role order": (lambda f: rows_with(f, ANSWER, QUESTION), ["record 2", "turn 1 is the assistant's"]),
    "no answer": (lambda f: rows_with(f, QUESTION), ["train.jsonl:2", "no answer"]),
    "empty answer": (
        lambda f: rows_with(f, QUESTION, {"role": "assistant", "parts": [{"text": " "}]}),
        ["record 2", "turn 2 (assistant) is empty"],
    ),
    "too long": (
        lambda f: rows_with(f, QUESTION, {"role": "assistant", "parts": [{"text": "word " * 200}]}),
        ["train.jsonl:2", "data.max_length=128"],
    ),
    "not JSON": (lambda f: (f / "data" / "train.jsonl").write_text('{"turns": [}\n'), ["train.jsonl", "not JSON"]),
    "no record": (lambda f: (f / "data" / "train.jsonl").write_text("\n"), ["train.jsonl", "no record"]),
    "no data file": (lambda f: (f / "data" / "train.jsonl").unlink(), ["train.jsonl", "no such file"]),
}
BAD_SETTINGS = {
    "train.stps=3": ["train.stps", "unknown key", "steps"],
    "train.steps=many": ["train.steps", "whole number", "many"],
    "model.vision.kind=opn_clip": ["model.vision: ", "opn_clip", "did you mean 'open_clip'?"],
    "model.projector.kind=mpl": ["model.projector: ", "mpl", "did you mean 'mlp'?"],
    "model.projector.options.dpth=3": ["model.projector: ", "dpth", "depth"],
    "model.chat.format=vicuna": ["model.chat.format: ", "did you mean 'vicuna_v1'?"],
    "model.llm.name=./nowhere": ["model.llm: ", "nowhere", "no such folder"],
    "tune.llm.mode=lorra": ["lorra", "lora"],
    "data.train.0.format=lava": ["data.train.0: ", "did you mean 'llava'?"],
    "data.max_length=600": ["data.max_length", "pack_tokens"],
    "{data: 1}": ["override", "key=value"],
    "engine.kind=deepspeed": ["engine.kind", "deepspeed --num_gpus"],
    "engine.kind=deepspead": ["engine.kind", "deepspeed"],
    "tune.llm.options.r=many": ["tune.llm.options.r: is 'many'", "a whole number, 1 or more"],
    "tune.llm.options.dropout=1": ["tune.llm.options.dropout: is 1", "0 or more and below 1"],
    "model.llm.random_init.hidden_size=15": ["model.llm: ", "15", "not a multiple"],
    "align={captions: nowhere.jsonl}": ["align.captions: nowhere.jsonl: no such file"],
    "run.resume=nowhere": ["nowhere", "no such folder"],
    "run.init_from=nowhere": ["nowhere", "no such folder"],
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_with_its_place(fresh, case):
    harm, expected = BAD_DATA[case]
    harm(fresh)
    result = mmit("train", "--config", fresh / "config.yaml")
    assert_one_message(result, *expected)
    assert "\n  " in result.stderr, "no remedy"
    assert not (fresh / "run" / "checkpoints").exists()


@pytest.mark.parametrize("override", BAD_SETTINGS)
def test_bad_settings_are_named_with_the_right_ones(fresh, override):
    assert_one_message(mmit("train", "--config", fresh / "config.yaml", override), *BAD_SETTINGS[override])


def test_a_record_that_is_longer_than_the_context(fresh):
    long = ["data.max_length=600", "data.pack_tokens=600"]
    assert_one_message(mmit("train", fresh / "config.yaml", *long), "data.max_length", "512 tokens")


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [("open_clip", "ViT-B-33", "ViT-B-32"), ("timm", "resnet1888", "resnet18"), ("hf", "./nowhere", "nowhere")],
)
def test_an_unknown_encoder(fresh, kind, name, expected):
    given = [f"model.vision.kind={kind}", f"model.vision.name={name}"]
    assert_one_message(mmit("train", fresh / "config.yaml", *given), name, expected)


def test_missing_files(made, tmp_path):
    shutil.copy(made / "config.yaml", tmp_path / "confg.yaml")
    result = mmit("train", "--config", tmp_path / "config.yaml")
    assert_one_message(result, "config.yaml", "no such config file", "did you mean 'confg.yaml'?")
    assert_one_message(mmit("eval", tmp_path / "run"), "no such folder", "run")
    assert_one_message(mmit("chat", tmp_path, "-p", "Hi"), "holds no whole checkpoint")
    assert_one_message(mmit("chat", made / "run", "-i", tmp_path / "x.png", "-p", "Hi"), "x.png")
    assert_one_message(mmit("inspect", tmp_path / "x.jsonl", "--tokenizer", made / "tokenizer"), "x.jsonl")
    assert_one_message(mmit("data", "import", "llava", tmp_path / "x.json", "--out", tmp_path / "y"), "x.json")


def test_folders_that_cannot_be_made_and_devices_that_are_not_there(made, fresh):
    file = fresh / "config.yaml"
    assert_one_message(mmit("train", file, f"run.dir={file}/run"), "run.dir: ", "cannot be made")
    assert_one_message(mmit("eval", made / "run", "-t", write_task(made), "--out", file), "cannot write")
    assert_one_message(mmit("chat", made / "run", "-p", "Hi", "--device", "tpu"), "device: ", "'tpu'")
    assert_one_message(mmit("chat", made / "run", "-p", "Hi", "--dtype", "bf61"), "did you mean 'bf16'?")


def test_unknown_names(made, tmp_path):
    assert_one_message(mmit("eval", made / "run", "--task", "easy_vqq"), "easy_vqq", "did you mean 'easy_vqa'?")
    result = mmit("data", "import", "easyvqa", "--out", tmp_path / "x")
    assert_one_message(result, "easyvqa", "did you mean 'easy-vqa'?")
    data = made / "data" / "train.jsonl"
    result = mmit("inspect", data, "--tokenizer", made / "tokenizer", "--chat", "vicuna")
    assert_one_message(result, "vicuna", "did you mean 'vicuna_v1'?")


@pytest.mark.parametrize("name", ["manifest.json", "projector.safetensors", "config.yaml", "mmit.json"])
def test_a_checkpoint_with_a_file_missing(made, tmp_path, name):
    whole = next((made / "run" / "checkpoints").iterdir())
    folder = tmp_path / whole.name
    shutil.copytree(whole, folder)
    (folder / name).unlink()
    assert_one_message(mmit("chat", folder, "-p", "Hi"), name, str(folder))
    assert_one_message(mmit("eval", folder), name, str(folder))


def test_the_traceback_is_there_on_request_and_defects_keep_theirs(made, tmp_path):
    command = ["-m", "mmit", "config", "--resolve", str(tmp_path / "x.yaml")]
    assert "Traceback" not in python(*command).stderr
    assert "Traceback" in (result := python(*command, MMIT_TRACEBACK="1")).stderr
    assert result.returncode == 2 and "error: " in result.stderr


def test_ctrl_c_ends_with_130(monkeypatch, made):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmit.config.load_config", interrupt)
    result = mmit("config", "--resolve", made / "config.yaml")
    assert result.exit_code == 130 and not result.output


def test_messages_cannot_act_on_the_terminal(tmp_path):
    result = mmit("config", "--resolve", tmp_path / "\x1b[31mx\x07.yaml")
    assert result.exit_code == 2 and "\x1b" not in result.output and "\x07" not in result.output


def test_a_message_names_only_commands_that_exist():
    """A remedy that sends the reader to a command which is not there is worse than none."""
    known = set(typer.main.get_command(app).commands)
    named = []
    for path in (ROOT / "mmit").rglob("*.py"):
        text = path.read_text("utf-8")
        named += [(path.name, word) for word in re.findall(r"(?:\(mmit|[Rr]un mmit|`mmit) ([a-z][a-z-]+)", text)]
    assert len(named) > 30 and [(name, word) for name, word in named if word not in known] == []
