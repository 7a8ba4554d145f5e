"""The walls between modules hold, and the light modules stay light."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
has_linter = pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="no lint extra here")


def run(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@has_linter
def test_the_walls_hold() -> None:
    result = run(LINT)
    assert result.returncode == 0, result.stdout + result.stderr


@has_linter
@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("models/vlm.py", "import mmit.data", "layers below"),
        ("data/chat.py", "import mmit.models", "layers below"),
        ("train/loop.py", "import mmit.eval", "layers below"),
        ("records.py", "import mmit.config", "layers below"),
        ("newcomer.py", "", "layers below"),
        ("generate.py", "import mmit.train\n", "import cycles"),
        ("data/chat.py", "def f():\n    from transformers import AutoTokenizer", "transformers only"),
        ("train/step.py", "import deepspeed", "deepspeed only"),
        ("data/mixture.py", "import webdataset", "webdataset only"),
        ("data/mixture.py", "import ray", "ray only"),
        ("generate.py", "import uvicorn", "starlette and uvicorn only"),
        ("train/loop.py", "from mmit.config import Config", "Config objects"),
    ],
)
def test_each_wall_stops_what_it_is_there_for(tmp_path: Path, module: str, line: str, broken: str) -> None:
    """A contract that nothing can break would be no wall."""
    tree(tmp_path)
    if "cycles" in broken:
        (tmp_path / "mmit/train/__init__.py").write_text("import mmit.generate")
    (tmp_path / "mmit" / module).write_text(line)
    result = run(LINT, cwd=tmp_path)
    verdicts = [text for text in result.stdout.splitlines() if broken in text and text.endswith("BROKEN")]
    assert result.returncode == 1 and verdicts, result.stdout + result.stderr


def tree(folder: Path) -> None:
    """A tree of empty modules, under the contracts of this repository."""
    files = ["errors", "yamlio", "sections", "config", "records", "generate", "cli"]
    files += [f"{package}/__init__" for package in (".", "configs", "data", "models", "train", "eval")]
    for name in files:
        path = folder / "mmit" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())


@has_linter
def test_nothing_stops_the_tree_of_the_test_above(tmp_path: Path) -> None:
    tree(tmp_path)
    assert run(LINT, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("module", ["mmit", "mmit.config", "mmit.records", "mmit.cli"])
def test_light_modules_import_no_torch(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist")
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'}"
    result = run(f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))")
    assert result.stdout == "[]\n", result.stdout + result.stderr
