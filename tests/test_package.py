"""What `pip install` brings is whole: the wheel works in an empty folder, outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmit.configs import SUFFIXES, moved, shipped
from mmit.errors import ConfigError
from mmit.eval.tasks import load_task
from mmit.train.engines.zero import deepspeed_options
from tests.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import json, sys
import mmit
from mmit.configs import shipped
from mmit.eval.tasks import load_task
from mmit.train.engines.zero import deepspeed_options
tasks = [load_task(name).name for name in shipped("eval")]
stages = {name: deepspeed_options(name)["zero_optimization"]["stage"] for name in shipped("deepspeed")}
print(json.dumps([mmit.__file__, tasks, stages]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, as setuptools writes beside its sources, and install it alone into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "mmit", source / "mmit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, cwd=folder)
    wheel = next(folder.glob("*.whl"))
    into = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(into, check=True, cwd=folder)
    with zipfile.ZipFile(wheel) as packed:
        info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
        assert {name.split("/")[0] for name in packed.namelist()} == {"mmit", info}
    return folder / "site"


def outside(installed: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_loads_every_shipped_name(installed: Path, tmp_path: Path) -> None:
    place, tasks, stages = json.loads(outside(installed, tmp_path, "-c", LOAD).splitlines()[-1])
    assert Path(place).is_relative_to(installed)
    assert tasks == list(shipped("eval")) and len(tasks) > 30
    assert list(stages) == list(shipped("deepspeed")) and set(stages.values()) == {0, 1, 2, 3}


@pytest.mark.slow
def test_the_wheel_trains(installed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"steps": 2})
    assert config.engine.deepspeed in shipped("deepspeed")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    outside(installed, tmp_path, "-m", "mmit", "train", "--config", "c.yaml")
    assert (tmp_path / "run" / "finished.json").exists()


def test_every_shipped_config_has_the_suffix_that_the_wheel_packs() -> None:
    for kind, suffix in SUFFIXES.items():
        folder = ROOT / "mmit" / "configs" / kind
        assert {path.suffix for path in folder.iterdir()} == {suffix}
        assert f'"{kind}/*{suffix}"' in (ROOT / "pyproject.toml").read_text()


def test_paths_from_before_the_move_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_task("configs/eval/pope.yaml").name == "pope"
    assert deepspeed_options("configs/deepspeed/zero2.json") == deepspeed_options("zero2")
    assert deepspeed_options("./configs/deepspeed/zero3.json") == deepspeed_options("zero3")
    with pytest.raises(ConfigError, match="cannot read the task"):
        load_task("configs/eval/no_such.yaml")
    with pytest.raises(ConfigError, match="no DeepSpeed config"):
        deepspeed_options("elsewhere/zero2.json")
    # A file that stands there is the user's own.
    monkeypatch.chdir(tmp_path)
    own = Path("configs", "eval", "pope.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\n")
    assert moved("eval", own) == own


def test_a_task_beside_the_shipped_ones_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_task("custom_example").name == "custom_example"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="unknown task 'custom_example'"):
        load_task("custom_example")
