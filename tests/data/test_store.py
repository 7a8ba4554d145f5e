"""What is kept of data: equal when read again, thrown away when a byte changed, harmless when it cannot be kept."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from mmit.data.store import Store, code_version, digest, key_of

ARRAYS = {"a": np.arange(1000).reshape(10, 100), "none": np.zeros((5, 0), np.int64), "b": np.ones(3, np.uint8)}


def test_entries_come_back_memory_mapped(tmp_path):
    store = Store(tmp_path / "cache")
    assert store.find("kind", "key") is None and not store.folder.exists()
    assert store.keep("kind", "key", {"n": [1, "é"]}, ARRAYS)
    facts, arrays = store.find("kind", "key")
    assert facts == {"n": [1, "é"]} and arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert all(arrays[name].dtype == ARRAYS[name].dtype for name in ARRAYS)
    assert not arrays["a"].flags.owndata and not arrays["a"].flags.writeable
    assert store.keep("kind", "key", {"n": 2}, {}) and store.find("kind", "key") == ({"n": 2}, {})
    assert [path.name for path in store.folder.iterdir()] == ["kind-key"]


@pytest.mark.parametrize("seed", range(30))
def test_a_changed_byte_anywhere_is_noticed(tmp_path, seed):
    rng, said = random.Random(seed), []
    store = Store(tmp_path, said.append)
    store.keep("kind", "key", {"n": 1}, {"a": np.arange(50)})
    file = rng.choice(sorted((tmp_path / "kind-key").iterdir()))
    data = bytearray(file.read_bytes())
    if seed % 3 == 0:
        del data[rng.randrange(len(data)) :]
    elif seed % 3 == 1:
        file.unlink()
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if seed % 3 != 1:
        file.write_bytes(data)
    found = store.find("kind", "key")
    if found is None:
        assert len(said) == 1 and "made again" in said[0] and not (tmp_path / "kind-key").exists()
    else:  # the padding of a header means nothing
        assert found[0] == {"n": 1} and np.array_equal(found[1]["a"], np.arange(50))
        assert file.suffix == ".npy"


def test_an_entry_under_another_name_is_not_trusted(tmp_path):
    store = Store(tmp_path)
    store.keep("kind", "key", {}, {})
    os.rename(tmp_path / "kind-key", tmp_path / "kind-other")
    assert store.find("kind", "other") is None


def test_a_folder_that_cannot_be_written_is_said_not_raised(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    assert not Store(tmp_path / "file" / "cache", said.append).keep("kind", "key", {}, {})
    assert "measured again at each start" in said[0]


def test_a_digest_is_remembered_as_long_as_size_and_time_stay(tmp_path):
    store, file = Store(tmp_path / "cache"), tmp_path / "data"
    file.write_bytes(b"one")
    past = time.time_ns() - 10**10
    os.utime(file, ns=(past, past))
    first = digest(file, store)
    with open(file, "r+b") as same:
        same.write(b"two")
    os.utime(file, ns=(past, past))
    assert digest(file, store) == first  # the price of not reading it again
    os.utime(file, ns=(past + 1, past + 1))
    assert digest(file, store) != first == digest_of(tmp_path, b"one")
    file.write_bytes(b"new")  # so young that it may change within the resolution of its time: not remembered
    new = digest(file, store)
    os.utime(file, ns=(past + 2, past + 2))
    assert digest(file, store) == new != first


def digest_of(folder: Path, data: bytes) -> str:
    (folder / "other").write_bytes(data)
    return digest(folder / "other")


def test_keys_tell_values_apart():
    assert key_of([1, "a"], None) == key_of([1, "a"], None)
    assert len({key_of(1), key_of("1"), key_of([1]), key_of(1, None), key_of({"a": 1}), key_of()}) == 6
    assert len(code_version()) == 24
