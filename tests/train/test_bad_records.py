"""Bad records met while training: skipped exactly, all listed, and an end of the run when they are too many."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest

import mmit.train.run as run_module
from mmit.data.shards.reader import open_shards
from mmit.data.shards.writer import build_shards
from mmit.errors import MmitError
from mmit.records import Record, write_jsonl
from mmit.train.data.batches import TrainData
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow


def pictures(folder: Path, number: int) -> list[Record]:
    folder.mkdir(parents=True)
    records = []
    for i in range(number):
        path = folder / f"{i}.png"
        PIL.Image.new("RGB", (20, 20), (i, 2 * i % 256, 90)).save(path)
        records.append(Record.triple("What is it?", "A colour.", images=[str(path)], id=f"picture-{i}"))
    return records


def run(folder: Path, data: Path, *, fraction: float, workers: int = 0) -> int:
    config = tiny_config(
        folder,
        run={"dir": str(folder / "run"), "on_bad_record": "skip", "max_bad_fraction": fraction},
        data={"train": [{"path": str(data)}], "max_length": 128, "pack_tokens": 160, "workers": workers},
        train={"steps": None, "epochs": 1, "rows_per_step": 2, "precision": "fp32"},
    )
    return run_module.run(config)


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "run" / "bad_records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_equals_injected_and_the_rest_is_read_once(tmp_path, monkeypatch, workers):
    """Bytes of pictures and of texts change in the shards after they were indexed."""
    build_shards(pictures(tmp_path / "pictures", 60), tmp_path / "shards", max_bytes=40_000)
    source = open_shards(tmp_path / "shards")
    hurt = {3, 17, 18, 40, 59}
    for number in hurt:
        sample = source.index.samples[number]
        # Of the picture, so that planning, which reads the text alone, does not meet it first; and of one text.
        member = source.index.members[int(sample["member"]) + (0 if number == 17 else 1)]
        shard = tmp_path / "shards" / source.index.header["shards"][int(sample["shard"])]["name"]
        data = bytearray(shard.read_bytes())
        data[int(member["start"]) + int(member["lead"]) + int(member["size"]) // 2] ^= 4
        shard.write_bytes(data)
    seen: Counter[int] = Counter()
    real = TrainData.prepare

    def prepare(self, batch):
        seen.update(batch.records)
        return real(self, batch)

    monkeypatch.setattr(TrainData, "prepare", prepare)
    assert run(tmp_path, tmp_path / "shards", fraction=0.1, workers=workers) == 0
    assert len(listed(tmp_path)) == len(hurt)
    assert {source.key(number) for number in hurt} == {row["where"].split(": ")[1] for row in listed(tmp_path)}
    assert all("crc32" in row["problem"] and row["remedy"] for row in listed(tmp_path))
    assert seen == Counter(set(range(60)) - hurt)


def truncated(folder: Path, numbers: list[int], *, of: int) -> Path:
    """Records whose headers are sound, so that only decoding meets the damage."""
    records = pictures(folder / "pictures", of)
    write_jsonl(records, folder / "rows.jsonl")
    for number in numbers:
        path = folder / "pictures" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:-40])
    return folder / "rows.jsonl"


def test_a_rate_above_the_ceiling_ends_the_run(tmp_path):
    data = truncated(tmp_path, list(range(0, 60, 4)), of=60)
    with pytest.raises(MmitError, match="more than the 12 that are tolerated") as error:
        run(tmp_path, data, fraction=0.2)
    assert "bad_records.jsonl" in error.value.remedy and len(listed(tmp_path)) > 12


def test_a_run_of_bad_records_ends_the_run_whatever_the_rate(tmp_path):
    """A disk that is gone looks like this."""
    data = truncated(tmp_path, list(range(150)), of=150)
    with pytest.raises(MmitError, match="100 bad records came without a good one"):
        run(tmp_path, data, fraction=1.0)
    assert 100 <= len(listed(tmp_path)) < 150
