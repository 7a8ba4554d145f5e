"""Folders that appear whole or not at all, and are verified before use: the ground checkpoints stand on.

Owns the manifest (size and sha256 of every file, written last), the rename that publishes a folder, and the search
for the newest whole one. Knows nothing of models. At every instant of a save, also when the power goes, at least one
earlier folder stays whole under its name; a folder without a manifest that verifies is never handed out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from mmit.errors import CheckpointError
from mmit.io import FULL

FORMAT = 1
MANIFEST = "manifest.json"
Warn = Callable[[str], None]
Fill = Callable[[Path], None]
Step = Callable[[], None]


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    # A file's own fsync does not cover its name: that belongs to the folder, which is synced in the same way.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(
    folder: Path,
    fills: Sequence[Fill],
    *,
    main: bool = True,
    all_fine: Callable[[bool], bool] = lambda mine: mine,
    later: Sequence[Fill] = (),
    hand_over: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Write a folder that appears whole: into a draft, fsynced, manifest last, renamed.

    Args:
        folder: the final name; an older folder of that name is replaced.
        fills: write files under the draft, one after the other; each is called on every rank.
        main: this rank makes the folder, the manifest and the rename.
        all_fine: this rank's verdict -> that of all ranks; waits for them, so that no rank is left waiting for one
            that failed.
        later: more of them, called on the main rank only; nothing but the manifest and the rename comes after.
        hand_over: receives what comes after `fills` as one callable (main rank only), to be run elsewhere; the
            folder appears when that has run. None runs it here.

    Raises:
        CheckpointError: the disk is full, broken or read-only, here or on another rank. What was there before is
            untouched and the draft is removed.
    """
    # A dot first: `checkpoints` globs step-*, so that a draft is never taken for a checkpoint, whoever dies when.
    # Beside the final name, not in /tmp: a rename is atomic within one file system only.
    draft = folder.with_name(f".{folder.name}.draft")
    steps: list[Step] = [lambda: _begin(draft, main), *(partial(fill, draft) for fill in fills)]
    rest: list[Step] = [*(partial(fill, draft) for fill in later), lambda: _publish(draft, folder)]
    if hand_over is None:
        # Every rank takes part in every step, if only by its verdict: `all_fine` is a collective.
        steps += [step if main else _nothing for step in rest]
    _write(folder, draft, steps, main=main, all_fine=all_fine)
    if hand_over is not None and main:
        # No collective in there: it runs in a thread, while the loop's own are under way on the same ranks.
        hand_over(lambda: _write(folder, draft, rest, main=True, all_fine=lambda mine: mine))


def _nothing() -> None:
    pass


def _write(folder: Path, draft: Path, steps: Sequence[Step], *, main: bool, all_fine: Callable[[bool], bool]) -> None:
    for step in steps:
        failure: Exception | None = None
        try:
            step()
        except Exception as error:
            # Libraries report a full disk in ways of their own: torch as RuntimeError, tokenizers as bare Exception.
            if not isinstance(error, (OSError, SafetensorError)) and not _of_a_disk(error):
                raise
            failure = error
        if all_fine(failure is None):
            continue
        # From here all ranks raise. Only the main one removes: the others may see the same folder.
        if main:
            shutil.rmtree(draft, ignore_errors=True)
        if failure is None:
            failure = OSError("another rank could not write")
        raise _unwritten(folder, failure) from failure


def _of_a_disk(error: Exception) -> bool:
    numbers = (*FULL, errno.EIO, errno.EROFS)
    words = (*map(os.strerror, numbers), "file write failed", "PytorchStreamWriter")
    return any(word in str(error) for word in words)


def _unwritten(folder: Path, error: Exception) -> CheckpointError:
    full = getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL)
    remedy = "earlier checkpoints are untouched; "
    remedy += "free space on this disk or lower train.keep_last" if full else "check the disk"
    return CheckpointError(
        f"could not be written: {error}", where=str(folder), remedy=f"{remedy}, then continue with resume=auto"
    )


def _begin(draft: Path, main: bool) -> None:
    if main:
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)


def _publish(draft: Path, folder: Path) -> None:
    """Sync every file, write the manifest, rename. An older folder of that name stays findable until then."""
    # The order is what a kill, or the power, at any point leaves behind:
    #   before the manifest is on disk   a draft, which nobody looks at and the next save sweeps up
    #   before the first rename          the same; the older folder still has its name
    #   between the renames              the older folder under .NAME.old, which `checkpoints` finds
    #   after the second                 the new folder, whole, since everything in it was synced before it got its name
    files = sorted(p for p in draft.rglob("*") if p.is_file())
    listing = {p.relative_to(draft).as_posix(): {"size": p.stat().st_size, "sha256": _hash(p)} for p in files}
    # The manifest only after what it vouches for: a file system may write out files in any order.
    for p in [*files, *(d for d in draft.rglob("*") if d.is_dir())]:
        _sync(p)
    manifest = draft / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": listing}, indent=1))
    _sync(manifest)
    _sync(draft)
    old = _aside(folder)
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)  # a rename onto a folder that is not empty fails
    draft.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)  # what is left of it is swept up after the next save


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever taken for a whole one. Raises OSError."""
    # Renamed first: files go one by one, and a kill between them would leave a checkpoint with holes under its name.
    gone = folder.with_name(f".{folder.name}.gone")
    if gone.exists():
        shutil.rmtree(gone)
    folder.rename(gone)
    shutil.rmtree(gone)


@contextmanager
def staying(folder: Path) -> Iterator[None]:
    """Tell an error of reading `folder` from the folder's removal: a run that goes on removes its older checkpoints."""
    try:
        yield
    except Exception as error:
        if folder.exists():
            raise
        raise CheckpointError(
            "was removed while it was read; a run that goes on keeps its newest checkpoints alone",
            where=str(folder),
            remedy="start the command again, with a copy of a checkpoint if it takes longer than train.keep_last saves",
        ) from error


def sweep(parent: Path) -> None:
    """Remove what interrupted writes and removals left behind."""
    for left in [*parent.glob(".*.draft"), *parent.glob(".*.gone")]:
        shutil.rmtree(left, ignore_errors=True)
    for old in parent.glob(".*.old"):
        # Alone it is the only whole copy of that step: the save that put it aside died before it published its own.
        if (parent / old.name[1:-4]).exists():
            shutil.rmtree(old, ignore_errors=True)


def verify(folder: Path) -> None:
    """Check every file against the manifest. Raises CheckpointError naming what is wrong."""
    remedy = "use another checkpoint of the run; resume=auto takes the newest one that is whole"
    where = str(folder / MANIFEST)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        layout = manifest["format"]
    except FileNotFoundError:
        problem = f"has no {MANIFEST}, so it is not a whole checkpoint"
        raise CheckpointError(problem, where=str(folder), remedy=remedy) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=where, remedy=remedy) from None
    if layout != FORMAT:
        raise CheckpointError(
            f"has layout {layout}, this version reads {FORMAT}", where=str(folder), remedy="update mmit"
        )
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError("is missing from the checkpoint", where=str(path), remedy=remedy)
        # The size first: it tells a cut file at once, where the hash of a large one takes seconds.
        if path.stat().st_size != size:
            raise CheckpointError(f"has {path.stat().st_size} bytes instead of {size}", where=str(path), remedy=remedy)
        if _hash(path) != sha256:
            raise CheckpointError("was changed after it was written (sha256 differs)", where=str(path), remedy=remedy)
    for path in sorted(p for p in (folder / "trainer").rglob("*") if p.is_file()):
        if path.relative_to(folder).as_posix() not in files:  # DeepSpeed unpickles what it finds there
            raise CheckpointError("is not listed in the manifest", where=str(path), remedy=remedy)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or not.

    A save that replaces a folder and dies between two renames leaves the older one as `.step-N.old`; it counts.
    """
    parent = Path(run_dir) / "checkpoints"
    found = {p.name: p for p in parent.glob(".step-*.old") if p.is_dir() and not (parent / p.name[1:-4]).is_dir()}
    found |= {p.name: p for p in parent.glob("step-*") if p.is_dir()}
    return sorted(found.values(), key=lambda p: (step_of(p), p.name))


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name, or -1."""
    digits = folder.name.removeprefix(".").removesuffix(".old").removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def newest(run_dir: str | Path, *, warn: Warn = lambda text: None) -> Path | None:
    """Newest checkpoint of a run that verifies; broken ones are named through `warn`."""
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warn(f"passing over a damaged checkpoint: {error}")
    return None


def find(folder: str | Path, *, warn: Warn = lambda text: None) -> Path:
    """Resolve a checkpoint folder or a run folder to a verified checkpoint. Raises CheckpointError."""
    folder = Path(folder)
    if (folder / MANIFEST).exists() or (folder / "mmit.json").exists():
        verify(folder)
        return folder
    found = newest(folder, warn=warn) if folder.is_dir() else None
    if found is None:
        what = "holds no whole checkpoint" if folder.is_dir() else "no such folder"
        remedy = "give a run folder or one of its checkpoints/step-*"
        if (folder / "config.json").exists():
            remedy += "; to start from a model of another project: mmit train --from, or mmit import-model"
        raise CheckpointError(what, where=str(folder), remedy=remedy)
    return found
