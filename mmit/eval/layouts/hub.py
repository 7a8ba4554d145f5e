"""Benchmarks by hub id: a data set's files, fetched once into the hub's cache, are a folder like any other.

In: "hub:owner/name", with "@revision" if wanted. Out: a local folder. Never fetches code, and reads the cache when
there is no network.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmit.errors import ConfigError

PREFIX = "hub:"


def local_folder(folder: str) -> str:
    """Return the folder itself, or the files of the hub's data set that it names. Raises ConfigError."""
    if not folder.startswith(PREFIX):
        return folder
    name, _, revision = folder.removeprefix(PREFIX).partition("@")
    try:
        return snapshot_download(name, repo_type="dataset", revision=revision or None, ignore_patterns=["*.py"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()
        raise ConfigError(
            f"the hub does not give the data set '{name}': {said[0] if said else type(error).__name__}",
            where=folder,
            remedy="Check the id, the network and (for gated sets) `hf auth login`; or download it to a folder: "
            f"hf download --repo-type dataset {name} --local-dir {Path('FOLDER')}",
        ) from error
