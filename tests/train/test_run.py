"""A run from end to end in miniature: it learns, it resumes exactly, its checkpoint is whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from mmit.errors import CheckpointError, ConfigError, ImageError, RecordError
from mmit.train.checkpoint import model as checkpoint
from mmit.train.data.batches import TrainData
from mmit.train.monitor import metrics_log
from mmit.train.monitor.heartbeat import read_beats
from mmit.train.run import EXIT_STOPPED, run
from tests.tiny_run import DROPOUT
from tests.tiny_run import two_layers as tiny_config


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.newest(run_dir)
    assert folder is not None
    return {
        **load_file(folder / "projector.safetensors"),
        **load_file(folder / "adapter" / "adapter_model.safetensors"),
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps that nothing interrupted, with dropout."""
    folder = tmp_path_factory.mktemp("straight")
    assert run(tiny_config(folder, tune=DROPOUT)) == 0
    return folder


def test_it_learns_and_says_what_it_did(straight):
    values = losses(straight / "run")
    assert len(values) == 6 and values[-1] < values[0]
    row = json.loads((straight / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["tokens"] > 0 and row["supervised"] > 0 and 0 < row["fill"] <= 1 and row["bad_records"] == 0
    assert (straight / "run" / "loss.png").stat().st_size > 5000
    assert read_beats(straight / "run")[0].works > 0, "measuring long data would be told as a standstill"


def test_the_curve_is_painted(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log, "paint", metrics_log.paint.real)  # the tests' own serves all runs with one picture
    pictures = []
    for name, rows in (("all", None), ("two", 2)):
        lines = (straight / "run" / "metrics.jsonl").read_text().splitlines()[:rows]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        metrics_log.draw_loss(tmp_path / "metrics.jsonl", tmp_path / f"{name}.png")
        with PIL.Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (840, 480)
            pictures.append(image.convert("RGB").tobytes())
    blue = bytes((0x1F, 0x4E, 0x79))
    assert all(blue in picture for picture in pictures) and pictures[0] != pictures[1]
    (tmp_path / "metrics.jsonl").write_text(lines[0])
    metrics_log.draw_loss(tmp_path / "metrics.jsonl", tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(straight, tmp_path, workers):
    folder = tmp_path
    os.symlink(straight / "data", folder / "data")
    for part in ("tokenizer", "vision"):
        os.symlink(straight / part, folder / part)
    train = {"steps": 6, "rows_per_step": 2, "precision": "fp32", "save_every": 2}
    config = tiny_config(folder, train=train, tune=DROPOUT)
    real_save, saves = checkpoint.write_folder, []

    def save_then_die(*args, **kwargs):
        real_save(*args, **kwargs)
        saves.append(1)
        if len(saves) == 1:
            raise KeyboardInterrupt

    checkpoint.write_folder = save_then_die
    try:
        with pytest.raises(KeyboardInterrupt):
            run(config)
    finally:
        checkpoint.write_folder = real_save
    again = {"dir": str(folder / "run"), "resume": "auto"}
    data = {**config.data.model_dump(), "workers": workers}
    assert run(tiny_config(folder, run=again, data=data, train=train, tune=DROPOUT)) == 0
    assert losses(folder / "run") == losses(straight / "run")
    ours, theirs = final_tensors(folder / "run"), final_tensors(straight / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_adapters_with_dropout_start_from_others_and_from_pissa(straight, tmp_path):
    """Adapters that are not zero at the start: the checks before the first step must not run with dropout on."""
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    then = str(straight / "run")
    assert run(tiny_config(tmp_path, run={"dir": str(tmp_path / "next"), "init_from": then}, tune=DROPOUT)) == 0
    pissa = {"llm": {**DROPOUT["llm"], "options": {**DROPOUT["llm"]["options"], "init": "pissa"}}}
    assert run(tiny_config(tmp_path, run={"dir": str(tmp_path / "pissa")}, tune=pissa)) == 0


@pytest.mark.parametrize("packing", [True, False])
def test_splitting_a_step_differently_changes_nothing(tmp_path_factory, straight, packing):
    results = []
    for micro in (1, 2, 4):
        folder = tmp_path_factory.mktemp("split")
        for part in ("data", "tokenizer", "vision"):
            os.symlink(straight / part, folder / part)
        train = {"steps": 3, "rows_per_step": 4, "micro_rows": micro, "precision": "fp32"}
        data = {**tiny_config(folder).data.model_dump(), "packing": packing}
        assert run(tiny_config(folder, train=train, data=data)) == 0
        results.append((losses(folder / "run"), final_tensors(folder / "run")))
    for values, tensors in results[1:]:
        assert values == pytest.approx(results[0][0], abs=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, results[0][1][name], atol=2e-4, rtol=0)


def test_cached_features_and_word_alignment(straight, tmp_path):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    train = {"steps": 3}
    plain = tiny_config(tmp_path, run={"dir": str(tmp_path / "a")}, train=train)
    vision = plain.model.vision.model_dump()
    assert run(plain) == 0
    for kind in ("memory", "disk", "disk"):
        name = tmp_path / f"{kind}{len(list(tmp_path.glob(kind + '*')))}"
        model = {**plain.model.model_dump(), "vision": {**vision, "cache": kind}}
        assert run(tiny_config(tmp_path, run={"dir": str(name)}, model=model, train=train)) == 0
        assert losses(name) == losses(tmp_path / "a")
    aligned = tiny_config(
        tmp_path,
        run={"dir": str(tmp_path / "b")},
        train=train,
        align={"captions": str(tmp_path / "data" / "captions.jsonl"), "epochs": 3},
    )
    assert run(aligned) == 0
    assert read_beats(tmp_path / "b")[0].works > read_beats(tmp_path / "a")[0].works  # its steps too
    assert losses(tmp_path / "b") != losses(tmp_path / "a")


def test_missing_captions_are_told_before_the_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr("mmit.train.parts._untuned", None)
    config = tiny_config(tmp_path, align={"captions": str(tmp_path / "none.jsonl")}, train={"steps": 1})
    with pytest.raises(ConfigError, match="no such file") as error:
        run(config)
    assert "align.captions" in error.value.where and "mmit data import" in error.value.remedy


def test_sigterm_saves_and_leaves_with_its_code(straight, tmp_path, monkeypatch):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    config = tiny_config(tmp_path, train={"steps": 5000, "rows_per_step": 2, "precision": "fp32"})
    real, seen = TrainData.prepare, []

    def prepare(*given, **more):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **more)

    monkeypatch.setattr(TrainData, "prepare", prepare)
    assert run(config) == EXIT_STOPPED
    folder = checkpoint.newest(tmp_path / "run")
    assert folder is not None
    assert json.loads((folder / "trainer" / "progress.json").read_text())["step"] in range(1, 5000)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_process_ends_although_workers_ignore_signals(straight, tmp_path, broken):
    for part in ("tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    shutil.copytree(straight / "data", tmp_path / "data")
    if broken:  # found by a worker, after the scan
        picture = tmp_path / "data" / "5.png"
        picture.write_bytes(picture.read_bytes()[:-30])
    data = {**tiny_config(tmp_path).data.model_dump(), "workers": 1}
    (tmp_path / "c.yaml").write_text(tiny_config(tmp_path, data=data).to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "mmit", "train", "--config", str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (2 if broken else 0), done.stderr
    assert not broken or "5.png" in done.stderr


def test_an_existing_run_is_not_overwritten(straight):
    with pytest.raises(ConfigError, match="resume=auto"):
        run(tiny_config(straight))


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_a_damaged_checkpoint_is_noticed_before_use(straight, tmp_path, harm):
    import shutil

    source = checkpoint.newest(straight / "run")
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        copy = tmp_path / "copy"
        shutil.copytree(source, copy)
        victim = copy / path.relative_to(source)
        data = bytearray(victim.read_bytes())
        if harm == "delete":
            victim.unlink()
        elif harm == "truncate":
            victim.write_bytes(data[:-1])
        elif victim.name == "manifest.json":
            shutil.rmtree(copy)
            continue
        else:
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_model(copy)
        assert victim.name in str(error.value) and error.value.remedy
        shutil.rmtree(copy)


def test_bad_records_stop_or_are_skipped_and_listed(straight, tmp_path):
    import shutil

    for part in ("tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    shutil.copytree(straight / "data", tmp_path / "data")
    (tmp_path / "data" / "3.png").unlink()  # found by the scan
    broken = tmp_path / "data" / "5.png"
    broken.write_bytes(broken.read_bytes()[:-30])  # found when it is decoded
    with pytest.raises(RecordError, match="3.png") as error:
        run(tiny_config(tmp_path))
    assert "picture-3" in str(error.value) and "on_bad_record=skip" in str(error.value)
    with pytest.raises(RecordError, match="max_bad_fraction"):
        run(tiny_config(tmp_path, run={"dir": str(tmp_path / "run"), "on_bad_record": "skip"}))
    skip = {"dir": str(tmp_path / "run"), "on_bad_record": "skip", "max_bad_fraction": 0.2}
    train = {"steps": None, "epochs": 1, "rows_per_step": 2, "precision": "fp32"}
    assert run(tiny_config(tmp_path, run=skip, train=train)) == 0
    listed = [json.loads(x) for x in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert len(listed) == 2
    assert "3.png" in listed[0]["problem"] and "5.png" in listed[1]["where"]
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["bad_records"] == 1
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "data" / "3.png").write_bytes((tmp_path / "data" / "4.png").read_bytes())
    with pytest.raises(ImageError, match="5.png"):
        run(tiny_config(tmp_path))


def test_a_soft_prompt_counts_against_the_context(straight, tmp_path):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    tune = {"llm": {"mode": "soft_prompt", "lr": 1e-2, "options": {"tokens": 12}}}
    data = {**tiny_config(tmp_path).data.model_dump(), "max_length": 501, "pack_tokens": 512}
    with pytest.raises(ConfigError, match="501 is more than the 500 tokens .* less the 12 of the soft prompt"):
        run(tiny_config(tmp_path, tune=tune, data=data))


def test_a_record_longer_than_max_length_is_named(straight, tmp_path):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    data = tiny_config(tmp_path).data.model_dump()
    with pytest.raises(RecordError, match="data.max_length=40") as error:
        run(tiny_config(tmp_path, data={**data, "max_length": 40}))
    assert "picture-" in str(error.value)


@pytest.mark.parametrize("precision", ["bf16"])
def test_bf16_keeps_float32_masters(straight, tmp_path, precision):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    assert run(tiny_config(tmp_path, train={"steps": 6, "rows_per_step": 2, "precision": precision})) == 0
    folder = checkpoint.newest(tmp_path / "run")
    state = load_file(folder / "trainer" / "optimizer-00001.safetensors")
    masters = {k: v for k, v in state.items() if k.endswith("|master")}
    assert masters and all(v.dtype == torch.float32 for v in masters.values())
    assert all(v.dtype == torch.bfloat16 for v in final_tensors(tmp_path / "run").values())


def test_other_data_cannot_be_resumed(straight, tmp_path):
    import shutil

    shutil.copytree(straight, tmp_path / "x", symlinks=True)
    folder = tmp_path / "x"
    from tests.tiny_run import write_records

    write_records(folder / "data", count=9)
    with pytest.raises(CheckpointError, match="what is learned from data.train.0 .* has changed"):
        run(tiny_config(folder, run={"dir": str(folder / "run"), "resume": "auto"}, tune=DROPOUT))


def test_text_only_model(straight, tmp_path):
    from tests.tiny_run import write_records

    os.symlink(straight / "tokenizer", tmp_path / "tokenizer")
    write_records(tmp_path / "data", count=0, text_only=8)
    model = {**tiny_config(straight).model.model_dump(), "vision": None}
    assert run(tiny_config(tmp_path, model=model)) == 0
    assert checkpoint.load_model(tmp_path / "run").vlm.image_tokens == 0


@pytest.mark.parametrize(
    "stage",
    [pytest.param(f"zero{s}", marks=pytest.mark.slow if s in (2, 3) else pytest.mark.long) for s in (0, 1, 2, 3)],
)
def test_two_deepspeed_ranks_equal_one_process(straight, tmp_path, stage):
    for part in ("data", "tokenizer", "vision"):
        os.symlink(straight / part, tmp_path / part)
    train = {"steps": 4, "rows_per_step": 4, "precision": "fp32"}
    assert run(tiny_config(tmp_path, run={"dir": str(tmp_path / "one")}, train=train)) == 0
    config = tiny_config(tmp_path, run={"dir": str(tmp_path / "two")}, train=train, engine={"deepspeed": stage})
    (tmp_path / "two.yaml").write_text(config.to_yaml())
    root = Path(__file__).resolve().parents[2]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", str(root / "scripts" / "train.py")]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [*launcher, "--config", str(tmp_path / "two.yaml")], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = final_tensors(tmp_path / "one"), final_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)
    assert checkpoint.load_model(tmp_path / "two").vlm.image_tokens == 4
