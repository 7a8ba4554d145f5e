"""Units, the scan, sources of any format, and order as a function of its arguments."""

from __future__ import annotations

import json
from dataclasses import replace

import PIL.Image
import pytest

from mmit.data.chat import chat_format, encode
from mmit.data.dataset import InstructionData, split_pairs
from mmit.data.loader import idle_batch, micro_batches
from mmit.data.preparation import ImagePreparation
from mmit.data.sources import SourceSpec, open_source
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text, Turn, write_jsonl
from tests.tiny_run import write_records, write_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = write_tokenizer(folder / "tokenizer")
    chat = chat_format("hf", tokenizer)
    path = write_records(folder / "records", count=6, text_only=3)
    return lambda turns: encode(turns, chat, tokenizer), path


EYE = ImagePreparation((16, 16), "resize", "bicubic", (0, 0, 0), tokens=4)


def data_of(parts, **options):
    arguments = {"preparation": EYE, "max_length": 200, "capacity": 200, **options}
    return InstructionData([open_source(parts[1])], parts[0], **arguments)


def test_pairs_keep_system_and_images_and_nothing_else():
    picture = Image("a.png")
    record = Record(
        (
            Turn("system", (Text("Be brief."),)),
            Turn("user", (picture, Text("one?"))),
            Turn("assistant", (Text("1"),)),
            Turn("user", (Text("two?"),)),
            Turn("assistant", (Text("2"),)),
        )
    )
    first, second = split_pairs(record)
    assert first.turns == record.turns[:3]
    assert [t.role for t in second.turns] == ["system", "user", "assistant"]
    assert second.turns[1].parts == (picture, Text("two?")) and second.turns[2].text == "2"
    late = Record((*record.turns[:3], Turn("user", (picture, Text("two?"))), record.turns[4]))
    with pytest.raises(RecordError, match="split_turns=false"):
        split_pairs(late)


def test_scan_measures_what_rows_then_take(parts):
    for options in ({}, {"split_turns": True}, {"share_prefix": False, "split_turns": True}):
        data = data_of(parts, **options)
        scan = data.scan()
        assert not scan.bad and scan.records == 9
        for unit in range(len(scan.length)):
            (batch,) = micro_batches(data, scan, [[unit]], load_image=None)
            assert batch.tokens == scan.length[unit]
        (batch,) = micro_batches(data, scan, [list(range(len(scan.length)))], load_image=None)
        assert batch.tokens <= scan.shared + (scan.length - scan.shared).sum()
        assert batch.targets == scan.supervised


def test_units_never_exceed_a_row(parts):
    data = data_of(parts, split_turns=True, capacity=45, max_length=45)
    scan = data.scan()
    assert not scan.bad
    assert scan.length.max() <= 45
    assert (scan.last - scan.first).sum() == 6 * 2 + 3


def test_splitting_shares_the_picture(parts):
    whole, split = data_of(parts).scan(), data_of(parts, split_turns=True).scan()
    unshared = data_of(parts, split_turns=True, share_prefix=False).scan()
    assert split.length.sum() < unshared.length.sum()
    assert split.supervised == whole.supervised


def test_bad_records_are_listed_by_name_and_the_rest_is_kept(parts, tmp_path):
    import shutil

    shutil.copytree(parts[1].parent, tmp_path / "d")
    path = tmp_path / "d" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["turns"][1]["parts"][0]["text"] = ""
    rows[2]["turns"].pop()
    (tmp_path / "d" / "4.png").unlink()
    lines = [json.dumps(r) for r in rows]
    lines[7] = lines[7][:-9]
    path.write_text("\n".join(lines) + "\n")
    data = InstructionData([open_source(path)], parts[0], preparation=EYE, max_length=200, capacity=200)
    scan = data.scan()
    places = " | ".join(str(e) for e in scan.bad)
    assert len(scan.bad) == 4, places
    assert all(e.where and e.remedy for e in scan.bad)
    for name in ("record 2", "picture-2", "4.png", "record 8"):
        assert name in places
    assert sorted(set(scan.record.tolist())) == [0, 3, 5, 6, 8]


def test_a_foreign_list_is_read_where_it_stands(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    source = open_source(SourceSpec(tmp_path / "alpaca.json", format="alpaca"), cache=tmp_path / "cache")
    assert len(source) == 2
    assert source[0].turns[0].text == "Add.\n\n1 2" and source[1].turns[1].text == "hi"
    assert (
        len(open_source(SourceSpec(tmp_path / "alpaca.json", format="alpaca", limit=1), cache=tmp_path / "cache")) == 1
    )


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.jsonl"):
        open_source(tmp_path / "nothing.jsonl")
    write_jsonl([], tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="empty.jsonl.*holds no record"):
        open_source(tmp_path / "empty.jsonl")


def test_pictures_need_a_vision_tower(parts):
    scan = data_of(parts, preparation=None).scan()
    assert len(scan.bad) == 6 and "no vision tower" in scan.bad[0].problem


def test_an_idle_batch_has_no_weight():
    batch = idle_batch()
    assert batch.weight == 0 and batch.tokens == 0 and batch.targets == 0


def test_boxes_are_refused_where_pictures_are_cut(parts, tmp_path):
    """Shares of a picture hold wherever all of it is seen."""
    PIL.Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    row = {"instruction": "What is at <bbox>?", "output": "x", "image": "a.png", "bbox": [2, 1, 10, 5]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    boxes = {"boxes": "norm1000", "boxes_in": "pixels"}
    source = open_source(SourceSpec(tmp_path / "rows.json", format="json", options=boxes), cache=tmp_path / "cache")
    options = {"max_length": 200, "capacity": 200}
    for mode in ("resize", "pad", "crop"):
        data = InstructionData([source], parts[0], preparation=replace(EYE, mode=mode), **options)
        assert data.record(0).turns[0].text == "What is at [100, 100, 500, 500]?"
        if mode != "crop":
            assert data.samples(0)[0]
            continue
        with pytest.raises(RecordError, match="has boxes, and fit crop cuts off") as refused:
            data.samples(0)
        assert "model.vision.fit" in refused.value.remedy and len(data.scan().bad) == 1
