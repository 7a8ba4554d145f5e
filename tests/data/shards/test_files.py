"""Files of shards: ranges from any thread, a network that fails for a moment, jobs in processes that may be killed."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mmit.data.shards import files as shard_files
from mmit.data.shards.files import RangeReader, run_jobs
from mmit.data.shards.reader import open_shards
from mmit.data.shards.writer import build_shards
from mmit.errors import MmitError
from tests.data.shards.shard_samples import records


def test_threads_may_share_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "_OPEN_FILES", 1)
    given = records(10)
    build_shards(given, tmp_path, max_bytes=3000)
    source, numbers = open_shards(tmp_path), [int(n) for n in np.random.default_rng(0).integers(0, 10, 400)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, numbers)) == [given[n] for n in numbers]


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "_OPEN_FILES", 2)
    given = records(12)
    build_shards(given, tmp_path, max_bytes=3000)
    source = open_shards(tmp_path)
    for i in (0, 11, 5, 0, 8, 3):
        assert source[i] == given[i]
    assert len(source._ranges._open) == 2


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MmitError, match="pip install fsspec s3fs"):
        open_shards("s3://bucket/data")


def test_a_passing_fault_of_the_network_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    class Flaky:
        faults = 2

        def cat_file(self, path: str, *, start: int, end: int) -> bytes:
            self.faults -= 1
            if self.faults >= 0:
                raise TimeoutError("slow")
            return bytes(end - start)

    monkeypatch.setattr(shard_files, "filesystem", lambda path: Flaky())
    assert RangeReader().read("s3://b/x.tar", 5, 7) == bytes(7)
    Flaky.faults = 9
    with pytest.raises(MmitError, match="nothing was skipped"):
        RangeReader().read("s3://b/x.tar", 5, 7)


def die(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    assert list(run_jobs(abs, [(-n,) for n in range(9)], workers=2)) == list(range(9))
    with pytest.raises(MmitError, match="worker process was killed"):
        list(run_jobs(die, [(n,) for n in range(9)], workers=2))
