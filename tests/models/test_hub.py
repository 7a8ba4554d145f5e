"""Hub ids where a folder is taken: read from the hub's cache, refused with what to do when it is not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest

from mmit.errors import ModelError
from mmit.models.hub import is_hub_id, model_folder


def cached(cache: Path, name: str, source: Path | None = None) -> Path:
    """Lay out a snapshot as the hub's client does; returns its folder."""
    store = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    snapshot = store / "snapshots" / commit
    if source is not None:
        shutil.copytree(source, snapshot)
    else:
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").touch()
    return snapshot


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_snapshot_in_the_cache_is_found(offline: Path) -> None:
    snapshot = cached(offline, "owner/tiny")
    assert model_folder("owner/tiny").resolve() == snapshot.resolve()
    assert model_folder(f"owner/tiny@{snapshot.name}").resolve() == snapshot.resolve()


def test_offline_the_error_says_what_to_do(offline: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)owner/other: no such folder.*hf download.*HF_HOME"):
        model_folder("owner/other")


def test_what_looks_like_a_path_is_one(offline: Path) -> None:
    Path("runs").mkdir()
    for path in ("runs/quickstat", "./owner/tiny", "/somewhere/else", "a/b/c", "~/x"):
        assert not is_hub_id(path)
    assert is_hub_id("owner/tiny") and is_hub_id("owner/tiny@main")
    Path("owner").mkdir()
    assert not is_hub_id("owner/tiny")
