"""`--push-to-hub` against a hub on this machine: what arrives is what was written; a refusal is one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmit.errors import ModelError
from mmit.interop.push import push
from tests.interop.hub_stub import TOKEN, Hub, hub


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and the library told where it is as HF_ENDPOINT tells it; large files by Git LFS."""
    with hub() as held:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", held.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's own tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield held


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export in miniature: small and large files, one of them empty, in two folders."""
    out = tmp_path / "out"
    (out / "vision").mkdir(parents=True)
    (out / "README.md").write_text("---\nlicense: mit\n---\n# M\u00f6del\n", encoding="utf-8")
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(os.urandom(300_000))
    (out / "vision" / "model.safetensors").write_bytes(bytes(range(256)) * 3)
    (out / "vision" / "empty.txt").write_bytes(b"")
    return out


def refused(folder: Path, name: str = "me/tiny") -> str:
    with pytest.raises(ModelError) as error:
        push(folder, name, private=False)
    assert error.value.where == f"upload to {name}" and "\n" not in error.value.problem
    assert f"hf upload {name} {folder}" in (error.value.remedy or "")
    return f"{error.value.problem} {error.value.remedy}"


@pytest.mark.parametrize("private", [False, True])
def test_what_arrives_is_what_was_written(at: Hub, folder: Path, private: bool) -> None:
    assert push(folder, "me/tiny", private=private) == f"{at.url}/me/tiny"
    written = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert at.files["me/tiny"] == written | {".gitattributes": b""}
    assert at.private == ({"me/tiny"} if private else set())


def test_an_empty_repository_is_taken_and_one_with_files_is_not(at: Hub, folder: Path) -> None:
    at.files["me/tiny"] = {".gitattributes": b""}  # made on the hub's page
    push(folder, "me/tiny", private=False)
    (folder / "config.json").write_text("changed")
    said = refused(folder)
    assert "holds files, such as README.md" in said and "replace what it holds" in said
    assert at.files["me/tiny"]["config.json"] == b"{}"


def test_a_refused_token(at: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    said = refused(folder)
    assert "Invalid credentials" in said and "HTTP 401" in said and "token that may write to me" in said
    assert not at.files


def test_a_connection_that_is_cut_while_a_large_file_goes(at: Hub, folder: Path) -> None:
    at.cut = "/lfs/"
    said = refused(folder)
    assert "Error while uploading" in said and "check the network" in said and "token" not in said
    assert at.files["me/tiny"] == {".gitattributes": b""}  # nothing of half a model
    at.cut = None
    assert push(folder, "me/tiny", private=False)  # and again


def test_a_card_that_the_hub_does_not_take(at: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("no front matter")
    assert "Invalid metadata in README.md" in refused(folder)
    assert at.files["me/tiny"] == {".gitattributes": b""}
