"""A resumed run is the run it resumes: other contents and other deciding settings are refused, the rest is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmit.config import Config, describe, load_config
from mmit.data.marks import ENDS, picture_mark
from mmit.data.shards.writer import build_shards
from mmit.data.store import Store
from mmit.errors import CheckpointError
from mmit.records import Image, read_jsonl
from mmit.train.checkpoint import folders
from mmit.train.checks import identity
from mmit.train.run import run
from tests.tiny_run import DROPOUT, tiny_config

KEYS = [entry.key for entry in describe()]


def test_every_key_has_a_role():
    assert [key for key in KEYS if identity.role(key) is None] == []


def test_every_line_of_the_table_is_about_a_key():
    first = {next(p for p in identity.ROLES if identity.fnmatchcase(key, p)) for key in KEYS}
    assert first == set(identity.ROLES)


def test_what_a_new_key_has_to_be_given():
    assert identity.role("weather.tomorrow") is None


@pytest.mark.parametrize("key", KEYS)
def test_no_key_changes_without_a_word(flat, key):
    """Refused, or said, in either case with both values; but for two that say themselves that this is another start."""
    said: list[str] = []
    told = f"{key} was 5 and is 7"
    try:
        identity.check_config({**flat, key: 5}, {**flat, key: 7}, folder=Path("ckpt"), say=said.append)
    except CheckpointError as error:
        assert identity.role(key) in ("decides", "length") and told in error.problem
    else:
        assert identity.role(key) not in ("decides", "length")
        assert len(said) == (key not in ("run.dir", "run.resume")) and all(told in line for line in said)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("flat"), tune=DROPOUT).flat()


def compare(flat, change):
    said: list[str] = []
    identity.check_config(flat, {**flat, **change}, folder=Path("ckpt"), say=said.append)
    return said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 5),
        ("tune.llm.options.alpha", 999),
        ("tune.llm.options.dropout", 0.2),
        ("tune.llm.lr", 1.0),
        ("tune.projector.mode", "frozen"),
        ("model.vision.fit", "pad"),
        ("model.vision.layer", -1),
        ("train.precision", "bf16"),
        ("train.betas.1", 0.98),
        ("train.weight_decay", 0.1),
        ("train.clip", None),
        ("train.schedule", "constant"),
        ("train.warmup", 0.1),
        ("train.steps", 12),
        ("train.epochs", 2.0),
        ("train.rows_per_step", 4),
        ("data.train.0.weight", 2.0),
        ("data.train.0.limit", 3),
        ("data.train.1.path", "more.jsonl"),
        ("data.pack_tokens", 320),
        ("data.mixing.scheme", "sqrt"),
    ],
)
def test_what_decides_the_result_is_refused_with_both_values(flat, key, value):
    if key == "data.train.1.path":  # a second source brings all of its keys
        value, more = "more.jsonl", {"data.train.1.weight": 1.0}
    else:
        more = {}
    with pytest.raises(CheckpointError, match="another run") as error:
        compare(flat, {key: value, **more})
    told = next(iter(more), key)
    old = identity.inline_yaml(flat[key]) if key in flat else "not given"
    new = identity.inline_yaml({key: value, **more}[told])
    assert f"{told} was {old} and is {new}" in str(error.value)
    assert "run.init_from=ckpt" in error.value.remedy and "run.dir" in error.value.remedy


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("data.workers", 2, ""),
        ("train.save_every", 9, ""),
        ("train.report_to", ["tensorboard"], ""),
        ("train.threads", 1, "rounding"),
        ("train.micro_rows", 2, "rounding"),
        ("train.checkpointing", "full", "rounding"),
        ("engine.deepspeed", "zero3", "rounding"),
        ("device", "cuda", "rounding"),
        ("run.init_from", "elsewhere", "none now"),
        ("align", {"captions": "c.jsonl"}, "none now"),
        ("data.train.0.path", "moved.jsonl", ""),
        ("model.llm.name", "moved", ""),
    ],
)
def test_what_may_change_is_said_with_both_values(flat, key, value, hint):
    (line,) = compare(flat, {key: value})
    assert f"{key} was {identity.inline_yaml(flat[key])} and is {identity.inline_yaml(value)}" in line
    assert hint in line


def test_a_run_whose_learning_rate_does_not_end_may_be_made_longer(flat):
    constant = {**flat, "train.schedule": "constant", "train.warmup": 2.0}
    assert compare(constant, {"train.steps": 12}) == ["resume: train.steps was 6 and is 12"]
    with pytest.raises(CheckpointError, match="train.steps was 6 and is 12.*another course of the learning rate"):
        compare({**constant, "train.warmup": 0.03}, {"train.steps": 12})  # its warm-up would be a longer one


def test_the_same_config_says_nothing(flat):
    assert compare(flat, {"run.dir": "elsewhere", "run.resume": "auto"}) == []


@pytest.mark.parametrize(("key", "found"), [("train.precision", "bf16"), ("data.packing", True)])
def test_auto_now_is_what_it_came_to_then(flat, key, found):
    said: list[str] = []
    identity.check_config({**flat, key: found}, {**flat, key: "auto"}, folder=Path("ckpt"), say=said.append)
    assert said == []


class World:
    """A run that was stopped after step 3, in a folder that may be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, **sections) -> Config:
        llm = self.folder / "llm"
        model = tiny_config(self.folder).model.model_dump()
        model["llm"].update(name=str(llm), random_init=None)
        train = {"steps": 6, "rows_per_step": 2, "micro_rows": 2, "precision": "fp32", "save_every": 3}
        given = {"run": {"dir": str(self.folder / "run"), "resume": "auto"}, "model": model, "tune": DROPOUT}
        return tiny_config(self.folder, **{**given, "train": train, **sections})

    def copy(self, target: Path) -> World:
        """Elsewhere, with every path of it."""
        shutil.copytree(self.folder, target)
        for path in (*target.rglob("*.jsonl"), *target.rglob("config.yaml")):
            if "run" not in path.relative_to(target).parts[:1]:
                path.write_text(path.read_text().replace(str(self.folder), str(target)))
        return World(target)

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        folder = folders.newest(self.folder / "run")
        assert folder is not None and folders.step_of(folder) == 6
        return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("identity") / "world")
    world.folder.mkdir()
    from mmit.models.assemble import assemble

    vlm, tokenizer = assemble(tiny_config(world.folder).model.model_dump(), dtype=torch.float32)
    vlm.llm.save_pretrained(world.folder / "llm")
    tokenizer.save_pretrained(world.folder / "llm")
    assert run(world.config()) == 0
    return world


@pytest.fixture
def stopped(finished, tmp_path):
    world = finished.copy(tmp_path / "world")
    shutil.rmtree(world.folder / "run" / "checkpoints" / "step-000006")
    (world.folder / "run" / "finished.json").unlink()
    return world


def other_answers(world: World) -> None:
    """Of a text-only record, by as many tokens."""
    path = world.folder / "data" / "train.jsonl"
    text = path.read_text()
    assert "It is 2." in text
    path.write_text(text.replace("It is 2.", "It is 9."))


def other_pictures(world: World) -> None:
    for path in (world.folder / "data").glob("*.png"):
        size = PIL.Image.open(path).size
        PIL.Image.new("RGB", size, (90, 10, 120)).save(path)


def one_other_picture_of_equal_size(world: World) -> None:
    path = world.folder / "data" / "5.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def other_order(world: World) -> None:
    path = world.folder / "data" / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[-1], lines[-2] = lines[-2], lines[-1]
    path.write_text("".join(lines))


def other_weights(name: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        (path,) = (world.folder / name).glob("*.safetensors")
        tensors = load_file(path)
        key = max(tensors, key=lambda k: tensors[k].numel())
        tensors[key] = tensors[key] * 1.5
        save_file(tensors, path, {"format": "pt"})

    return change


def other_template(world: World) -> None:
    for path in (*(world.folder / "llm").glob("chat_template.jinja"), world.folder / "llm" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("assistant", "answerer"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_answers, "data.train.0"),
        (other_pictures, "data.train.0"),
        (one_other_picture_of_equal_size, "data.train.0"),
        (other_order, "data.train.0"),
        (other_weights("vision"), "vision encoder is another one"),
        (other_weights("llm"), "language model is another one"),
        (other_template, "chat format is another one"),
    ],
)
def test_other_contents_are_refused(stopped, change, named):
    change(stopped)
    before = {p: p.read_bytes() for p in (stopped.folder / "run" / "checkpoints").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="another run") as error:
        run(stopped.config())
    assert named in error.value.problem and "run.init_from=" in error.value.remedy
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_run_that_was_moved_with_its_data_and_models_goes_on(finished, stopped, capsys):
    """Other paths, other times of the files: the same contents."""
    assert run(stopped.config()) == 0
    ours, theirs = stopped.trained, finished.trained
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "resume: model.llm.name was" in said and "resume: data.train.0.path was" in said


# Another value of each key that changes no weight; a new one of that kind has to be tried here too.
FREE = {
    "run.on_bad_record": "skip",
    "run.max_bad_fraction": 0.5,
    "run.stall_seconds": None,
    "model.vision.cache": "disk",
    "model.vision.cache_dir": "{data}/features",
    "export": ["mmit"],
    "data.train.0.name": "other",
    "data.eval": [{"path": "{data}/captions.jsonl"}],
    "data.workers": 1,
    "data.prefetch_mb": 1,
    "data.cache_dir": "{data}/cache",
    "train.save_every": 5,
    "train.keep_last": 1,
    "train.keep_best": {"metric": "eval_loss"},
    "train.save_in_background": True,
    "train.eval_every": 5,
    "train.eval_tasks": ["easy_vqa"],  # which the command hands in: tests/eval/test_while_training.py
    "train.eval_questions": 3,
    "train.log_every": 2,
    "train.report_to": [],
    "train.spike_sigma": 0.1,
    "train.spike_window": 2,
}


def test_what_is_said_to_change_no_weight_changes_none(finished, stopped):
    free = {key for key in KEYS if identity.role(key) == "free"}
    assert {key for key in free if not key.startswith(("data.eval.", "train.keep_best."))} == FREE.keys()
    world = json.dumps(FREE).replace("{data}", str(stopped.folder / "data"))
    overrides = [f"{key}={json.dumps(value)}" for key, value in json.loads(world).items()]
    (stopped.folder / "c.yaml").write_text(stopped.config().to_yaml())
    assert run(load_config(stopped.folder / "c.yaml", overrides)) == 0
    assert all(torch.equal(stopped.trained[k], v) for k, v in finished.trained.items())
    assert (stopped.folder / "run" / "best.json").exists()


def test_a_checkpoint_without_fingerprints_goes_on_and_says_what_cannot_be_told(finished, stopped, capsys):
    folder = folders.newest(stopped.folder / "run")
    path = folder / "trainer" / "progress.json"
    saved = json.loads(path.read_text())
    assert saved["order"].pop("content")
    path.write_text(json.dumps(saved))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer/progress.json"] = {"size": path.stat().st_size, "sha256": folders._hash(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(stopped.config()) == 0
    assert "keeps no fingerprints" in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert all(torch.equal(stopped.trained[k], v) for k, v in finished.trained.items())


def test_another_setting_is_refused_before_anything_is_built(stopped, monkeypatch):
    monkeypatch.setattr("mmit.train.parts._assemble", lambda *a, **k: pytest.fail("the model was built"))
    tune = {"llm": {**DROPOUT["llm"], "options": {**DROPOUT["llm"]["options"], "alpha": 999}}}
    with pytest.raises(CheckpointError, match="tune.llm.options.alpha was 32 and is 999"):
        run(stopped.config(tune=tune))


def test_other_pictures_in_shards_are_refused(finished, tmp_path):
    world = finished.copy(tmp_path / "world")
    shutil.rmtree(world.folder / "run")
    data = {**tiny_config(world.folder).data.model_dump(), "train": [{"path": str(world.folder / "shards")}]}
    build_shards(read_jsonl(world.folder / "data" / "train.jsonl"), world.folder / "shards")
    assert run(world.config(data=data)) == 0
    shutil.rmtree(world.folder / "run" / "checkpoints" / "step-000006")
    other_pictures(world)
    shutil.rmtree(world.folder / "shards")
    build_shards(read_jsonl(world.folder / "data" / "train.jsonl"), world.folder / "shards")
    with pytest.raises(CheckpointError, match="data.train.0"):
        run(world.config(data=data))


def test_a_picture_file_is_known_by_its_size_and_both_ends(tmp_path):
    path = tmp_path / "p.jpg"
    data = bytearray(range(256)) * 64  # 16 KiB
    mark = {}
    for name, place in {"as it was": None, "first": 0, "last": len(data) - 1, "middle": ENDS + 5}.items():
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 255
        path.write_bytes(changed)
        mark[name] = picture_mark(Image(str(path)))
    assert len({mark["as it was"], mark["first"], mark["last"]}) == 3
    assert mark["middle"] == mark["as it was"]  # the bound that the docstring states
    path.write_bytes(data + b"x")
    assert picture_mark(Image(str(path))) not in mark.values()
    small = data[: ENDS + 6]  # shorter than both ends together: read whole
    path.write_bytes(small)
    one = picture_mark(Image(str(path)))
    small[ENDS + 5] ^= 255
    path.write_bytes(small)
    assert picture_mark(Image(str(path))) != one


def test_base_weights_of_the_hub_are_known_by_their_commit(tmp_path):
    common = {"unused": False, "store": Store(tmp_path)}
    assert identity.base_content("owner/name", commit="abc", **common) == {"commit": "abc"}
    assert identity.base_content("owner/name", commit=None, **common) == {}
    said: list[str] = []
    facts = {"sources": [], "vision": None, "chat": {}}
    identity.check_contents(
        {**facts, "llm": {"commit": "abc"}}, {**facts, "llm": {"files": {}}}, folder=tmp_path, say=said.append
    )
    assert len(said) == 1 and "cannot be told" in said[0]
    with pytest.raises(CheckpointError, match="abc then, def now"):
        identity.check_contents(
            {**facts, "llm": {"commit": "abc"}}, {**facts, "llm": {"commit": "def"}}, folder=tmp_path, say=said.append
        )


def test_changed_code_is_refused_and_a_changed_deepspeed_json_is_said(tmp_path):
    facts = {"sources": [], "vision": None, "llm": {}, "chat": {}}
    json_of = {"name": "mine.json", "options": {"zero_optimization": {"stage": 2}, "prescale_gradients": True}}
    then = {**facts, "code": {"model.projector.kind": "a" * 40, "tune.llm.mode": "c" * 40}, "deepspeed": json_of}
    said: list[str] = []

    def compare(**changed):
        identity.check_contents(then, {**then, **changed}, folder=tmp_path, say=said.append)

    compare()
    compare(deepspeed=None)
    compare(deepspeed={"name": "zero3", "options": {}})  # said as the setting it is
    identity.check_contents(facts, then, folder=tmp_path, say=said.append)  # a version that kept neither
    assert said == []
    with pytest.raises(CheckpointError, match="code behind tune.llm.mode .* c{12} then, d{12} now"):
        compare(code={**then["code"], "tune.llm.mode": "d" * 40})
    compare(deepspeed={"name": "mine.json", "options": {"zero_optimization": {"stage": 3}}})
    assert [line.split("; ")[0].partition(": ")[2] for line in said] == [
        "engine.deepspeed (mine.json): zero_optimization.stage was 2 and is 3",
        "engine.deepspeed (mine.json): prescale_gradients was true and is not given",
    ]
