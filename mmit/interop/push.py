"""A written folder on the Hugging Face Hub.

Goes in: a folder and a repository. Comes out: the address, or for a trial the list of what would go there.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from mmit.errors import ModelError
from mmit.models.vision_encoder import explained


def listing(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of every file that would be uploaded."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in files]


def check_repository(name: str) -> None:
    """Raise ModelError unless a name is `owner/name`; asked before anything is computed."""
    owner, _, own = name.partition("/")
    if not owner or not own or "/" in own:
        raise ModelError(f"'{name}' names no repository", where="--push-to-hub", remedy="write it as owner/name")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder, making the repository if need be. Raises ModelError; the folder stays as it is."""
    remedy = f"{folder} is complete; log in (`hf auth login`), check the network, then: hf upload {name} {folder}"
    with explained(f"upload to {name}", remedy=remedy):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of mmit")
    return f"{api.endpoint}/{name}"
