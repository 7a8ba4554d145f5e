"""docs/quickstart.ipynb: kept without output, its commands are mmit's, and its cells run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from mmit.cli import app
from mmit.cli.train import overrides_of
from mmit.config import load_config
from tests.test_readme import ROOT, environment, needs_weights

NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text("utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALL = {"STEPS": 2, "ALIGN": 1, "QUESTIONS": 8}


def commands(source: str) -> list[str]:
    return [line[1:] for line in source.splitlines() if line.startswith("!")]


def as_python(source: str) -> str:
    """What IPython makes of a cell: a line with ! is a command, {NAME} in it is a variable of the notebook."""
    return "\n".join(f"shell(f{line[1:]!r})" if line.startswith("!") else line for line in source.splitlines())


def test_it_is_kept_without_output_and_says_what_each_step_is() -> None:
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["metadata"].keys() == {"kernelspec", "language_info"}
    cells = NOTEBOOK["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) and cells[0]["cell_type"] == "markdown"
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    text = json.dumps(NOTEBOOK)
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@pytest.mark.parametrize("source", CODE, ids=range(len(CODE)))
def test_every_cell_compiles_and_its_commands_exist(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(CODE[0], names)
    compile(as_python(source), "cell", "exec")
    for command in commands(source):
        program, *words = shlex.split(command.format(**names))
        assert program == "mmit"
        group: Any = typer.main.get_command(app)
        while hasattr(group, "commands"):
            group = group.commands[words.pop(0)]
        known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, command
        if "train" in command.split() and "--config" in words:
            place = words.index("--config") + 1
            load_config(ROOT / words[place], overrides_of(words[place + 1 :]))


@pytest.mark.slow
@needs_weights
@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("assets", "configs", "docs"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    shown: list[list[str]] = []

    def show() -> None:
        shown.append([axes.get_title() for axes in plt.gcf().axes])
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)

    def shell(command: str) -> None:
        done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    space: dict[str, Any] = {"shell": shell}
    for source in CODE:
        for name, value in SMALL.items():
            source = re.sub(rf"^{name} = \d+", f"{name} = {value}", source, flags=re.MULTILINE)
        exec(compile(as_python(source), "cell", "exec"), space)
    assert [len(titles) for titles in shown] == [1, 8, 1]
    assert all("\n" in title for title in shown[1]) and len(set(shown[1])) == 8
