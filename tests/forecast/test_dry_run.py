"""A dry run changes nothing: no folder gets a file, and the start after it finds what it would have found without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.data.store import borrowed
from mmit.errors import RecordError
from mmit.forecast.forecast import forecast
from mmit.train.data.setup import cache_folder
from mmit.train.run import run
from tests.forecast.counted import counted_once
from tests.tiny_run import two_layers as tiny_config


@pytest.fixture(scope="module", autouse=True)
def one_measurement():
    """All models here are the same, and what is written is what these tests see."""
    with counted_once({}):
        yield


def as_list(folder: Path) -> dict[str, str]:
    """Rows that are read where they stand; two of eight are bad."""
    rows = [
        {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": None if n in (2, 5) else "a"}]}
        for n in range(8)
    ]
    (folder / "rows.json").write_text(json.dumps([{**row, "topic": "t"} for row in rows]))
    return {"path": str(folder / "rows.json"), "format": "sharegpt"}


def as_table(folder: Path) -> dict[str, str]:
    """A table, which is converted; two of eight rows are bad."""
    rows = [f"q{n},{'' if n in (0, 7) else 'a'},t" for n in range(8)]
    (folder / "rows.csv").write_text("\n".join(["instruction,output,topic", *rows]) + "\n")
    return {"path": str(folder / "rows.csv"), "format": "csv"}


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file under a folder with its time and content, and every folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def config_of(folder: Path, source: dict[str, str], **run_options: object):
    return tiny_config(
        folder,
        run={"dir": str(folder / "run"), **run_options},
        data={"train": [source], "max_length": 128, "pack_tokens": 160, "workers": 0, "cache_dir": str(folder / "c")},
        train={"steps": 1, "rows_per_step": 2, "precision": "fp32"},
    )


@pytest.mark.parametrize("shape", [as_list, as_table])
def test_a_dry_run_leaves_every_folder_as_it_is_and_a_start_finds_the_same(shape, tmp_path):
    config = config_of(tmp_path, shape(tmp_path), on_bad_record="skip", max_bad_fraction=0.25)
    before = files_of(tmp_path)
    notes = forecast(config).notes
    assert files_of(tmp_path) == before
    assert "2 bad records are left out" in notes and any("kept in meta only: topic (6 rows)" in note for note in notes)
    assert run(config) == 0
    listed = (tmp_path / "run" / "bad_records.jsonl").read_text()
    assert len(listed.splitlines()) == 2
    after = files_of(tmp_path)
    assert forecast(config).notes == notes and files_of(tmp_path) == after


@pytest.mark.parametrize("shape", [as_list, as_table])
@pytest.mark.parametrize("policy", [{}, {"on_bad_record": "skip", "max_bad_fraction": 0.24}])
def test_what_a_start_refuses_its_dry_run_refuses_before_and_after(shape, policy, tmp_path):
    config = config_of(tmp_path, shape(tmp_path), **policy)
    said = []
    for attempt in (forecast, forecast, run, forecast, run):
        before = files_of(tmp_path)
        with pytest.raises(RecordError) as refused:
            attempt(config)
        said.append(refused.value.problem.partition(" (the first of")[0])
        assert attempt is run or files_of(tmp_path) == before
    assert len(set(said)) == 1, said


def test_what_a_run_kept_is_used_and_not_written(tmp_path):
    """A conversion without verdicts is no whole one: it is made again, elsewhere."""
    kept = tmp_path / "kept"
    (kept / "measured-1").mkdir(parents=True)
    (kept / "measured-1" / "entry.json").write_text("{}")
    for name in ("whole.jsonl", "whole.verdicts.json", "half.jsonl", ".draft"):
        (kept / name).write_text(name)
    before = files_of(kept)
    with borrowed(kept) as folder:
        assert sorted(files_of(folder)) == ["measured-1", "measured-1/entry.json", "whole.jsonl", "whole.verdicts.json"]
        (folder / "measured-1" / "more.npy").write_text("more")
        (folder / "half.jsonl").write_text("again")
    assert not folder.exists() and files_of(kept) == before
    with borrowed(tmp_path / "none") as folder:
        assert not files_of(folder)
    assert not (tmp_path / "none").exists()


def test_asking_where_things_are_kept_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MMIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    assert cache_folder(None, run_dir=tmp_path / "run") == tmp_path / "home" / "cache" / "mmit" / "data"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(None, run_dir=tmp_path / "run") == tmp_path / "run" / "data"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_from_a_model_imports_nothing_into_the_run(tmp_path, monkeypatch):
    from mmit.cli import export

    config = config_of(tmp_path, as_table(tmp_path), on_bad_record="skip", max_bad_fraction=0.5)
    made = []

    def make_start(source: str, out: Path, **options: object) -> None:
        made.append(out)
        out.mkdir()
        (out / "config.yaml").write_text(config.to_yaml())
        (out / "manifest.json").write_text("{}")

    monkeypatch.setattr(export, "make_start", make_start)
    before = files_of(tmp_path)
    told = ["--from", "model", f"run.dir={tmp_path / 'other'}", "dry_run=true"]
    result = CliRunner().invoke(app, ["train", *told])
    assert result.exit_code == 0, result.output
    assert files_of(tmp_path) == before and len(made) == 1 and not made[0].exists()
