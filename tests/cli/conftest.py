"""A run that `mmit train` made, once for all tests of commands."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mmit.records import read_jsonl, write_jsonl
from tests.cli.commands import good
from tests.tiny_run import tiny_config


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A folder with config.yaml and its data, another data file as test data, and nothing trained."""
    folder = tmp_path_factory.mktemp("data")
    config = tiny_config(folder, data={"split_turns": True})
    held_out = list(read_jsonl(folder / "data" / "train.jsonl"))[:2]
    write_jsonl([replace(record, source="held out") for record in held_out], folder / "data" / "test.jsonl")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


# check
