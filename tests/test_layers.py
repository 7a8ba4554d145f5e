"""The walls between modules hold, and the light modules stay light."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
# The same for several folders: each in a fork of one process, which has imported the linter.
LINT_EACH = """
import json, os, sys, tempfile
from importlinter.cli import lint_imports
found = []
for folder in sys.argv[1:]:
    out = tempfile.TemporaryFile("w+")
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.chdir(folder)
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            code = lint_imports(no_cache=True)
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out.seek(0)
    found.append((code, out.read()))
print(json.dumps(found))
"""
has_linter = pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="no lint extra here")


def run(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@has_linter
def test_the_walls_hold() -> None:
    result = run(LINT)
    assert result.returncode == 0, result.stdout + result.stderr


WALLS = [
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
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """What the linter says of a tree for each wall, and of one in which nothing is wrong."""
    folders = []
    for module, line, broken in [*WALLS, ("cli.py", "", "")]:
        folders.append(tmp_path_factory.mktemp("tree"))
        tree(folders[-1])
        if "cycles" in broken:
            (folders[-1] / "mmit/train/__init__.py").write_text("import mmit.generate")
        (folders[-1] / "mmit" / module).write_text(line)
    result = subprocess.run(
        [sys.executable, "-c", LINT_EACH, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return [tuple(found) for found in json.loads(result.stdout)]


@has_linter
@pytest.mark.parametrize("wall", range(len(WALLS)), ids=[f"{module}-{broken}" for module, _, broken in WALLS])
def test_each_wall_stops_what_it_is_there_for(verdicts: list[tuple[int, str]], wall: int) -> None:
    """A contract that nothing can break would be no wall."""
    code, said = verdicts[wall]
    broken = WALLS[wall][2]
    assert code == 1 and [text for text in said.splitlines() if broken in text and text.endswith("BROKEN")], said


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
def test_nothing_stops_the_tree_of_the_test_above(verdicts: list[tuple[int, str]]) -> None:
    assert verdicts[-1][0] == 0, verdicts[-1][1]


@pytest.mark.parametrize("module", ["mmit", "mmit.config", "mmit.records", "mmit.cli"])
def test_light_modules_import_no_torch(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist")
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'}"
    result = run(f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))")
    assert result.stdout == "[]\n", result.stdout + result.stderr
