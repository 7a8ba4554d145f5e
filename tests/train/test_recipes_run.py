"""Every file of configs/train, small in its sizes alone: start, kill -9, resume, evaluate, export, load elsewhere.

Dropout, offload, quantisation, checkpointing, precision, initialisation, schedule, DeepSpeed stage, loader workers and
formats of the data are the recipe's own. A new file is picked up by itself; what cannot run here is skipped by name.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import Config, load_config
from mmit.train.checkpoint import folders
from mmit.train.data.batches import TrainData
from tests import fresh
from tests.train.small_recipes import FOLDER, STEPS, Small, ranks_of, stage_one, why_not, write_task
from tests.train.test_kill import end, losses
from tests.train.test_kill_matrix import finish, import_deepspeed, start_all

RECIPES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
FAST = "llava_json"  # what the default tests run, on one process
KILLED_AT = 3  # micro-batches a rank has seen when it dies; a checkpoint of step 2 lies behind it


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    importlib.import_module("timm")  # each fork would import it again
    return Small(tmp_path_factory.mktemp("recipes"))


def die_in_step(number: int) -> None:
    """In a forked child: end as kill -9 does, when the micro-batch of that number is about to be learnt from.

    What is measured without gradients (a reference, an evaluation) does not count.
    """
    real, seen = TrainData.prepare, []

    def prepare(self, batch):
        if torch.is_grad_enabled():
            seen.append(1)
        if len(seen) > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch)

    TrainData.prepare = prepare


def log(run_dir: str | Path) -> str:
    return (Path(run_dir) / "log.txt").read_text()[-4000:]


def trained(config: Config, ranks: int) -> Path:
    """Run to the end in processes of its own."""
    assert finish(start_all(config, ranks)) == [0] * ranks, log(config.run.dir)
    return Path(config.run.dir)


def begun(small: Small, name: str) -> Path | None:
    """The finished run that a recipe starts from, made once."""
    first = stage_one(name)
    if first is None:
        return None
    stage, more = first
    made = small.folder / f"first-{stage}-{len(more)}"
    if not (made / "finished.json").exists():
        config = load_config(FOLDER / f"{stage}.yaml", [*more, *small.overrides(stage, made, init_from=None)])
        trained(config, ranks_of(stage, config))
    return made


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, of the model and of the optimizer; random states of each rank too."""
    folder = folders.newest(run_dir)
    assert folder is not None and folders.step_of(folder) == STEPS
    files = sorted(folder.rglob("*.safetensors"))
    assert any(f.parent.name == "trainer" for f in files)
    return {f"{f.relative_to(folder)}:{k}": v for f in files for k, v in load_file(f).items()}


def mmit(*arguments: str | Path) -> str:
    """Run a command of mmit in a fork, whose threads are gone before the next one; return what it printed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 99
        try:
            signal.alarm(240)
            torch.set_num_threads(1)  # makes torch's pool anew; threads that find the parent's would race to do so
            done = CliRunner().invoke(app, [str(a) for a in arguments])
            with open(write, "w") as file:
                file.write(done.output + "".join(traceback.format_exception(*done.exc_info) if done.exc_info else ()))
            code = done.exit_code
        finally:
            os._exit(code)
    os.close(write)
    with open(read) as file:
        output = file.read()
    assert end(child) == 0, output[-4000:]
    return output


def loaded_elsewhere(folder: Path) -> dict[str, str]:
    env = os.environ | {"PYTHONPATH": str(fresh.ROOT), "HF_HUB_OFFLINE": "1"}
    done = fresh.run_module("tests.train.load_elsewhere", folder, env=env)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def course(small: Small, name: str, folder: Path) -> Path:
    """Uninterrupted, and killed and resumed: the same to the last bit. Returns the resumed run."""
    start = begun(small, name)
    runs = []
    for place in ("straight", "killed"):
        given = small.overrides(name, folder / place, init_from=start)
        runs.append(load_config(FOLDER / f"{name}.yaml", given))
    ranks = ranks_of(name, runs[0])
    straight = trained(runs[0], ranks)
    died = finish(start_all(runs[1], ranks, before=lambda: die_in_step(KILLED_AT)))
    assert died == [-signal.SIGKILL] * ranks, log(folder / "killed")
    kept = folders.newest(folder / "killed")
    assert kept is not None and folders.step_of(kept) == 2
    killed = trained(runs[1], ranks)
    assert losses(killed) == losses(straight)
    ours, theirs = tensors(killed), tensors(straight)
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    return killed


SIZES = {
    *("run.dir", "run.init_from", "run.resume", "model.llm.name", "model.vision.name", "data.max_length"),
    *("data.pack_tokens", "train.epochs", "train.steps", "train.save_every", "train.rows_per_step", "device"),
    *("model.projector.options.queries", "model.projector.options.depth", "align.captions"),
}


def changed_settings(name: str, small: Config) -> set[str]:
    """Keys in which a config is more than the recipe with other sizes, names and paths."""
    told, ran = load_config(FOLDER / f"{name}.yaml").flat(), small.flat()
    changed = {k for k in told.keys() | ran.keys() if told.get(k) != ran.get(k)}
    return {k for k in changed - SIZES if not k.endswith((".path", ".image_root"))}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_small_in_its_sizes_alone(small, tmp_path, name):
    given = small.overrides(name, tmp_path / "run", init_from=None)
    assert changed_settings(name, load_config(FOLDER / f"{name}.yaml", given)) == set()
    other = load_config(FOLDER / f"{name}.yaml", [*given, "train.clip=7.5"])
    assert changed_settings(name, other) == {"train.clip"}


def settings_stay(name: str, run_dir: Path) -> None:
    """What ran is the recipe in all but its sizes, and what `auto` came to here."""
    folder = folders.newest(run_dir)
    assert folder is not None
    automatic = {k for k, value in load_config(FOLDER / f"{name}.yaml").flat().items() if value == "auto"}
    assert changed_settings(name, load_config(folder / "config.yaml")) <= automatic


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == FAST else pytest.mark.slow, id=n) for n in RECIPES])
def test_a_recipe_is_killed_resumed_evaluated_exported_and_loaded_elsewhere(small, tmp_path, name):
    if (reason := why_not(name)) is not None:
        pytest.skip(f"{name}: {reason}")
    config = load_config(FOLDER / f"{name}.yaml")
    if ranks_of(name, config) > 1 or stage_one(name):
        import_deepspeed()
    run_dir = course(small, name, tmp_path)
    settings_stay(name, run_dir)
    task = write_task(small.folder, plain=config.model.chat.format == "plain")
    score = mmit("eval", run_dir, "--task", task, "--device", "cpu", "--baseline-n", 4)
    assert "colours" in score
    form = "llava-hf" if fits_llava_hf(config) else "mmit"
    mmit("export", run_dir, "--out", tmp_path / "out", "--format", form)
    assert loaded_elsewhere(tmp_path / "out")["by"] == ("transformers" if form == "llava-hf" else "mmit")


def fits_llava_hf(config: Config) -> bool:
    """LLaVA's own parts: an MLP of two layers behind a CLIP or SigLIP tower of transformers."""
    projector, vision = config.model.projector, config.model.vision
    return vision is not None and vision.kind == "hf" and (projector.kind, projector.options) == ("mlp", {"depth": 2})
