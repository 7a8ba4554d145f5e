"""The commands do what their help says, start at once, and answer a mistake with one message."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mmit.cli import app
from mmit.cli.train import split_arguments
from mmit.generate import Model
from mmit.records import Record, Text, Turn
from mmit.yamlio import dump_yaml, parse_yaml
from tests.tiny_run import tiny_config, write_records

ROOT = Path(__file__).parents[1]
DATA_COMMANDS = [["data", name] for name in ("import", "check", "show", "stats")]
COMMANDS = [["init"], ["train"], ["eval"], ["chat"], ["data"], *DATA_COMMANDS, ["inspect"], ["env"], ["config"]]


def mmit(*arguments: object, input: str | None = None) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input, env={"COLUMNS": "200"})


def good(*arguments: object, input: str | None = None) -> Any:
    """Run a command that has to succeed."""
    result = mmit(*arguments, input=input)
    assert result.exit_code == 0, result.output
    return result


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with this repository's mmit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with config.yaml, its data, and a run trained by `mmit train`."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "config.yaml").write_text(tiny_config(folder, data={"split_turns": True}).to_yaml())
    good("train", "--config", folder / "config.yaml", "train.steps=3")
    return folder


@pytest.fixture
def fresh(made, tmp_path):
    """A folder with the same config and data, to be trained or spoiled."""
    for part in ("tokenizer", "vision"):
        os.symlink(made / part, tmp_path / part)
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "config.yaml").write_text(tiny_config(tmp_path).to_yaml())
    return tmp_path


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


# Commands


def test_train_takes_its_config_either_way():
    file = Path("x.yaml")
    assert split_arguments(file, ["a.b=1"]) == (file, ["a.b=1"])
    assert split_arguments(None, ["x.yaml", "a.b=1", "resume=auto"]) == (file, ["a.b=1", "run.resume=auto"])
    # A file after --config is no override, and load_config will say so.
    assert split_arguments(file, ["y.yaml"]) == (file, ["y.yaml"])
    for nothing in ([], ["a.b=1"]):
        result = mmit("train", *nothing)
        assert result.exit_code == 2 and "--config" in result.stderr


def test_train_and_resume(fresh):
    endless = ("train.schedule=constant", "train.warmup=0")  # whose runs may be made longer
    good("train", fresh / "config.yaml", "train.steps=2", *endless)
    again = mmit("train", fresh / "config.yaml", "train.steps=2")
    assert again.exit_code == 2 and "resume=auto" in again.stderr
    longer = good("train", "--config", fresh / "config.yaml", "train.steps=4", "resume=auto", *endless)
    assert "resume: train.steps was 2 and is 4" in longer.stderr
    steps = [json.loads(line)["step"] for line in (fresh / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_script_for_the_launcher_is_the_same_command(made):
    script = [str(ROOT / "scripts" / "train.py"), "--local_rank=0", "--config", str(made / "config.yaml")]
    result = python(*script, "train.stps=3")
    assert result.returncode == 2 and "train.stps: unknown key" in result.stderr
    assert "(rank 1)" in python(*script, "train.stps=3", WORLD_SIZE="2", RANK="1").stderr


def write_task(folder: Path) -> Path:
    task = {
        "name": "colours",
        "records": str(folder / "data" / "train.jsonl"),
        "metric": "exact",
        "max_new_tokens": 4,
        "answers": ["red", "green", "blue", "black", "yes"],
    }
    path = folder / "colours.yaml"
    path.write_text(dump_yaml(task))
    return path


def test_eval_reports_the_score_beside_three_baselines(made, tmp_path):
    task = write_task(made)
    result = good("eval", made / "run", "--task", task, "--limit", 6, "--baseline-n", 3, "--batch-size", 4)
    folder = made / "run" / "eval" / "colours"
    report = json.loads((folder / "report.json").read_text())
    assert report["n"] == 6 and report["baselines"].keys() == {"majority", "untuned", "blank_image"}
    assert all(report["baselines"].values()) and report["baselines"]["untuned"]["n"] == 3
    for name in ("tuned model", "majority answer", "untuned model", "blank image"):
        assert name in result.output
    answers = [json.loads(line) for line in (folder / "answers-tuned.jsonl").read_text().splitlines()]
    assert len(answers) == 7 and answers[1]["prompt"]
    assert report["number_format"] == answers[0]["number_format"] == "fp32"
    other = mmit("eval", made / "run", "--task", task, "--limit", 8, "--baseline-n", 3, "--dtype", "bf16")
    assert_one_message(other, "number_format was 'fp32', is now 'bf16'", "--dtype fp32")
    good("eval", made / "run", "--task", task, "--limit", 6, "--no-baselines", "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["n"] == 6 and not any(report["baselines"].values())
    assert not (tmp_path / "out" / "answers-untuned.jsonl").exists()


def test_eval_of_a_run_that_goes_on_and_removes_the_checkpoint(made, tmp_path, monkeypatch):
    """The untuned model is loaded last: the checkpoint that was evaluated may be gone by then."""
    shutil.copytree(made / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    shutil.copytree(checkpoint, checkpoint.with_name("step-000002"))
    real = Model.generate

    def generate(self, *args, **options):
        shutil.rmtree(checkpoint, ignore_errors=True)
        return real(self, *args, **options)

    options = ("--task", write_task(made), "--limit", 4, "--baseline-n", 3, "--probe", "none")
    good("eval", made / "run", *options, "--out", tmp_path / "kept")
    monkeypatch.setattr(Model, "generate", generate)
    good("eval", tmp_path / "run", *options, "--out", tmp_path / "gone")
    assert not checkpoint.exists()
    for name in ("tuned", "untuned"):
        kept, gone = (
            [json.loads(line)["answer"] for line in (folder / f"answers-{name}.jsonl").read_text().splitlines()[1:]]
            for folder in (tmp_path / "kept", tmp_path / "gone")
        )
        assert kept == gone and len(kept) >= 3


def test_chat_answers_one_prompt(made):
    picture = made / "data" / "0.png"
    answers = {good("chat", made / "run", "-i", picture, "-p", "What color is it?").stdout for _ in range(2)}
    assert len(answers) == 1 and answers.pop().endswith("\n")


def test_chat_converses(made):
    lines = [f"/image {made / 'data' / '0.png'}", "What color is it?", "Is it red?", "/image nowhere.png", "/hlep"]
    result = good("chat", made / "run", "--max-new-tokens", 3, input="\n".join([*lines, "/reset", "Hello?", "/quit"]))
    assert result.stdout.count("> ") == 8
    assert result.stderr.count("error:") == 1 and "nowhere.png" in result.stderr
    assert "not understood: /hlep" in result.stderr
    good("chat", made / "run", "--max-new-tokens", 3, input="Hello?\n")  # ends with the input


def llava_rows(folder: Path) -> list[dict[str, Any]]:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    text = [{"from": "human", "value": "Hi <image>"}, {"from": "gpt", "value": "Hello."}]
    return [{"id": "a", "image": "0.png", "conversations": talk}, {"id": "b", "image": [], "conversations": text}]


def test_a_llava_file_is_imported_and_trained_on(fresh):
    rows = fresh / "data" / "llava.json"
    rows.write_text(json.dumps(llava_rows(fresh)))
    result = good("data", "import", "auto", rows, "--out", fresh / "data" / "out.jsonl", "--licence", "MIT")
    assert "format: llava (" in result.stdout
    assert "2 records (1 without images), 2 answers, 1 different image" in result.stdout
    first = json.loads((fresh / "data" / "out.jsonl").read_text().splitlines()[0])
    assert first["licence"] == "MIT" and first["turns"][0]["parts"][0] == {"image": "0.png"}
    good("train", fresh / "config.yaml", f"data.train.0.path={fresh / 'data' / 'out.jsonl'}", "train.steps=1")


def test_import_leaves_bad_rows_out_only_when_asked(fresh):
    missing = {"id": "gone", "image": "gone.png", "conversations": llava_rows(fresh)[0]["conversations"]}
    rows, out = fresh / "data" / "llava.json", fresh / "out.jsonl"
    rows.write_text(json.dumps([*llava_rows(fresh), missing]))
    result = mmit("data", "import", "llava", rows, "--out", out)
    assert result.exit_code == 2 and "gone.png" in result.stderr and not out.exists()
    result = good("data", "import", "llava", rows, "--out", out, "--skip-bad")
    assert "1 bad row left out" in result.stdout and f"{rows}:3 (gone)" in result.stdout
    assert len(out.read_text().splitlines()) == 2
    listed = json.loads((fresh / "out.bad.jsonl").read_text())
    assert "gone.png" in listed["problem"] and listed["where"]
    rows.write_text(json.dumps([missing]))
    before = out.read_bytes()
    result = mmit("data", "import", "llava", rows, "--out", out, "--skip-bad")
    assert result.exit_code == 2 and "no usable row" in result.stderr and out.read_bytes() == before


def test_easy_vqa_is_imported_from_its_package(tmp_path):
    pytest.importorskip("easy_vqa")
    result = good("data", "import", "easy-vqa", "--split", "test", "--out", tmp_path / "test.jsonl")
    assert "1,000 records (0 without images), 9,673 answers" in result.stdout
    result = mmit("data", "import", "easy-vqa", "--out", tmp_path / "x.jsonl")
    assert result.exit_code == 2 and "--split" in result.stderr
    result = mmit("data", "import", "easy-vqa", "x.json", "--split", "test", "--out", tmp_path / "x.jsonl")
    assert result.exit_code == 2 and "PATH" in result.stderr


def test_inspect_shows_the_mask(made, tmp_path):
    page, picture = tmp_path / "pages" / "record.html", tmp_path / "record.svg"
    result = good("inspect", made / "config.yaml", "--row", 2, "--html", page, "--svg", picture)
    assert "pair 1 of 2" in result.stdout and "1.png" in result.stdout
    assert "[image x4]" in result.stdout and "«" in result.stdout and "2 supervised" not in result.stdout.split("«")[0]
    assert 'class="supervised"' in page.read_text() and picture.read_text().startswith("<svg")
    assert "pair 2 of 2" in good("inspect", made / "config.yaml", "--pair", 2).stdout


def test_inspect_takes_overrides_as_a_run_does(made, tmp_path):
    data, config = made / "data" / "train.jsonl", made / "config.yaml"
    assert "chat format vicuna_v1" in good("inspect", config, "model.chat.format=vicuna_v1", "--row", 2).stdout
    other = write_records(tmp_path, count=1, text_only=1)
    shown = good("inspect", config, f"data.train.0.path={other}", "data.split_turns=false", "--row", 2).stdout
    assert "(text-0)" in shown and "pair" not in shown
    short = good("inspect", data, "data.max_length=9", "--config", config).stdout
    assert "training refuses it" in short and "max_length=9" in short
    assert_one_message(mmit("inspect", config, "data.max_lenght=9"), "max_lenght", "max_length")
    assert "overrides need the config" in mmit("inspect", data, "data.max_length=9", "--tokenizer", "a").stderr


def test_inspect_takes_a_data_file(made):
    data = made / "data" / "train.jsonl"
    result = good("inspect", data, "--tokenizer", made / "tokenizer", "--chat", "vicuna_v1", "--image-tokens", 9)
    assert "[image x9]" in " ".join(result.stdout.split()) and "chat format vicuna_v1" in result.stdout
    plain = mmit("inspect", data, "--tokenizer", made / "tokenizer", "--chat", "plain")
    assert_one_message(plain, "picture-0", "exactly one user turn")
    result = good("inspect", data, "--config", made / "config.yaml", "--row", 13)
    assert "pair 1 of 1" in result.stdout and "0 image slots" in result.stdout
    result = mmit("inspect", data)
    assert result.exit_code == 2 and "--tokenizer" in result.stderr
    result = mmit("inspect", data, "--config", made / "config.yaml", "--row", 17)
    assert result.exit_code == 2 and "16 rows" in result.stderr
    result = mmit("inspect", data, "--config", made / "config.yaml", "--pair", 3)
    assert result.exit_code == 2 and "--pair 1 to 2" in result.stderr


def test_inspect_takes_shards(made, tmp_path):
    from mmit.data.shards.writer import build_shards
    from mmit.records import read_jsonl

    build_shards(read_jsonl(made / "data" / "train.jsonl"), tmp_path / "shards")
    text = good("inspect", tmp_path / "shards", "--config", made / "config.yaml", "--row", 2).stdout
    assert "(picture-1)" in text and "image 1: inside the record" in text


def test_inspect_says_when_training_would_refuse(fresh):
    short = tiny_config(fresh, data={"max_length": 10}).to_yaml()
    (fresh / "short.yaml").write_text(short)
    (fresh / "data" / "0.png").unlink()
    text = good("inspect", fresh / "short.yaml").stdout
    assert "more than data.max_length=10" in text and "no such file" in text


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


def test_env_lists_what_is_installed_and_what_is_not(monkeypatch):
    import mmit.cli.env as env

    monkeypatch.setattr(env, "PACKAGES", {"torch": "", "no-such-package": "", "nor-this-one": "extra"})
    text = good("env").stdout
    assert re.search(r"torch +│ \d+\.\d+", text) and "CPU threads" in text
    assert "pip install no-such-package" in text and "mmit-tune[extra]" in text


def test_env_says_what_was_not_tested_and_who_holds_the_cores(monkeypatch):
    import mmit.cli.env as env
    from mmit import cores, versions

    monkeypatch.setattr(versions, "TESTED", {"torch": ("1.0", "1.1"), "python": ("3.10", "3.99")})
    monkeypatch.setattr(env, "PACKAGES", {"torch": "", "peft": ""})
    monkeypatch.setattr(cores.Watch, "others", lambda self: cores.Others(0.7, 2, "a[/b] (pid 7)"))
    text = " ".join(good("env").stdout.replace("│", " ").split())
    assert "outside the tested 1.0 to 1.1" in text and "train.precision auto:" in text
    assert "other processes use 0.7 of 2 cores" in text and "a[/b] (pid 7)" in text
    monkeypatch.setattr(cores.Watch, "others", lambda self: cores.Others(0.2, 2, ""))
    assert "other processes" not in good("env").stdout


def test_config_lists_every_key_and_resolves(made):
    from mmit.config import describe

    text = good("config").stdout
    assert all(entry.key in text for entry in describe())
    text = good("config", "--resolve", made / "config.yaml", "train.steps=7").stdout
    resolved, _ = parse_yaml(text, where="")
    assert resolved["train"]["steps"] == 7 and resolved["train"]["schedule"] == "cosine"
    assert mmit("config", "train.steps=7").exit_code == 2


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


def assert_one_message(result: Any, *expected: str) -> None:
    """Exit code 2 and, on stderr alone, one error with what is expected in it and a remedy on its own line."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.output
    message = result.stderr[result.stderr.index("error: ") :]
    for text in expected:
        assert text in message, message


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


def test_a_bad_row_is_what_inspect_shows_of_it(fresh):
    rows_with(fresh, QUESTION, {"role": "assistant", "parts": []})
    assert_one_message(mmit("inspect", fresh / "config.yaml", "--row", 2), "train.jsonl:2", "turn 2")


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
