"""A written folder on the Hugging Face Hub.

Goes in: a folder and a repository. Comes out: the address, or for a trial the list of what would go there. Refuses a
repository that holds files already: nothing on the hub is replaced.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from mmit.errors import ModelError

ANYWAY = {".gitattributes"}  # what the hub puts into a new repository


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
    """Upload a folder into a repository that is new or empty. Raises ModelError; the folder stays as it is."""
    api, where = HfApi(), f"upload to {name}"
    try:
        held = _make(api, name, private=private)
        if held:
            problem = f"the repository is there and holds files, such as {held[0]}"
            remedy = f"name another one, or replace what it holds: hf upload {name} {folder}"
            raise ModelError(problem, where=where, remedy=remedy)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of mmit")
    except ModelError:
        raise
    except Exception as error:  # the hub's own kinds of errors, and those of the HTTP library below it
        remedy = f"{folder} is complete; check the network, then: hf upload {name} {folder}"
        if _status(error) in (401, 403):
            owner = name.partition("/")[0]
            remedy = f"{folder} is complete; log in with a token that may write to {owner} (`hf auth login`), then: "
            remedy += f"hf upload {name} {folder}"
        raise ModelError(_told(error), where=where, remedy=remedy) from error
    return f"{api.endpoint}/{name}"


def _make(api: HfApi, name: str, *, private: bool) -> list[str]:
    """Make a repository. One that is there already is taken if it is empty: the names of the files it holds."""
    try:
        api.create_repo(name, private=private)
    except HfHubHTTPError as error:
        if _status(error) != 409:
            raise
        return sorted({*api.list_repo_files(name)} - ANYWAY)
    return []


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _told(error: BaseException) -> str:
    """What went wrong in one line: what the hub says, or the library; with the cause that it names in a chain only."""
    said = getattr(error, "server_message", None) or next(iter(str(error).strip().splitlines()), "")
    cause = error.__cause__
    behind = f" ({type(cause).__name__}: {_told(cause)})" if cause is not None and not _status(error) else ""
    status = f" (HTTP {_status(error)})" if _status(error) else ""
    return f"{said or type(error).__name__}{status}{behind}"
