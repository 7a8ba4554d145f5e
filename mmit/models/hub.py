"""Models by hub id: the folder that a path or an id stands for.

Goes in: a folder, or `owner/name`, with `@revision` if wanted. Comes out: a local folder; a hub model is fetched once
into the hub's cache (HF_HOME), and read from there when offline. Never fetches code.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from mmit.errors import ModelError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Code, and weights of other frameworks.
NEVER = ["*.py", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.gguf", "trainer/*"]
PICKLED = "pytorch_model*.bin"


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Tell whether `source` reads as `owner/name` and neither it nor a folder `owner` is there."""
    path = Path(source)
    return HUB_ID.fullmatch(os.fspath(source)) is not None and not path.exists() and not path.parent.is_dir()


def model_folder(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: `source` itself unless `is_hub_id`, else its snapshot in the hub's cache.

    Raises ModelError when the hub has no such model, or cannot be reached and the cache does not hold it.
    """
    if not is_hub_id(source):
        return Path(source).expanduser()
    name, _, revision = os.fspath(source).partition("@")
    folder = _fetch(name, revision, ignore=[*NEVER, PICKLED])
    held = {path.name for path in folder.iterdir()}
    whole = any(n.endswith(".safetensors") or n in ("mm_projector.bin", "manifest.json") for n in held)
    return folder if whole else _fetch(name, revision, ignore=NEVER)


@contextmanager
def unasked() -> Iterator[None]:
    """Answer no question: stdin is empty meanwhile.

    For libraries that call transformers without `trust_remote_code=False`, which then asks whether to run the code of
    a model's folder and takes the answer from whatever stands on stdin.
    """
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


def _fetch(name: str, revision: str, *, ignore: list[str]) -> Path:
    try:
        try:
            return Path(snapshot_download(name, revision=revision or None, ignore_patterns=ignore))
        except OfflineModeIsEnabled:  # huggingface_hub 1.33 asks for the list of files of a commit that it holds
            return Path(
                snapshot_download(name, revision=revision or None, ignore_patterns=ignore, local_files_only=True)
            )
    except Exception as error:  # the client lets errors of its transport through, whose library differs by version
        text = str(error).strip().split("\n")[0]
        raise ModelError(
            f"no such folder, and the hub gave no such model: {text[:240]}",
            where=name,
            remedy="check the spelling and the network; private and gated models need `hf auth login`; offline, fetch "
            "it elsewhere with `hf download` and give the folder (or copy it into the cache under HF_HOME)",
        ) from error
