"""Micro-batches: the same bytes from any number of workers, each image once, bad records by the policy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from mmit.data.chat import chat_format, encode
from mmit.data.dataset import InstructionData
from mmit.data.loader import MicroBatch, _Maker, idle_batch, micro_batches
from mmit.data.prefetch import Ahead
from mmit.data.preparation import ImagePreparation
from mmit.data.sources import open_source
from mmit.errors import RecordError
from mmit.records import Image, Record, Text, Turn, write_jsonl
from mmit.train.data.setup import image_loader
from tests.tiny_run import write_tokenizer

SIZE = ImagePreparation((16, 16), "resize", "bicubic", (0, 0, 0), tokens=4)


@pytest.fixture
def data(tmp_path: Path) -> InstructionData:
    """Six records: two of one image, one of another image, two of text alone, one whose image is cut off."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    chat = chat_format("hf", tokenizer)
    for name, color in (("a", "red"), ("b", "blue"), ("cut", "green")):
        PIL.Image.new("RGB", (20, 20), color).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])  # its header is whole, so measuring takes it
    records = []
    for number, image in enumerate(["a.png", None, "b.png", "a.png", None, "cut.png"]):
        shown = (Image(str(tmp_path / image)),) if image else ()
        turns = (Turn("user", (*shown, Text("what is it?"))), Turn("assistant", (Text("red " * (number + 1)),)))
        records.append(Record(turns))
    write_jsonl(records, tmp_path / "records.jsonl")
    return InstructionData(
        [open_source(tmp_path / "records.jsonl")],
        lambda turns: encode(turns, chat, tokenizer),
        preparation=SIZE,
        max_length=200,
        capacity=400,
    )


def same(one: MicroBatch, other: MicroBatch) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[key]) if isinstance(value, torch.Tensor) else value == other.tensors[key]
        for key, value in one.tensors.items()
    )
    rest = [getattr(one, key) == getattr(other, key) for key in ("image_keys", "weight", "unshared_tokens")]
    targets = (
        torch.equal(one.target_records, other.target_records),
        torch.equal(one.target_weights, other.target_weights),
    )
    return tensors and all(rest) and all(targets)


def test_batches_do_not_depend_on_the_number_of_workers(data: InstructionData) -> None:
    scan = data.scan()
    rows = [[0, 1, 2], [3], [], [4, 0]]
    given: dict[str, Any] = {"load_image": image_loader(SIZE)}
    alone, ahead = (list(micro_batches(data, scan, rows, **given, ahead=Ahead(n))) for n in (0, 2))
    assert len(alone) == len(ahead) == 4
    assert all(same(a, b) for a, b in zip(alone, ahead, strict=True))
    assert not same(alone[0], alone[3])


def test_an_image_that_comes_twice_is_decoded_and_encoded_once(data: InstructionData) -> None:
    decoded: list[str] = []
    load = image_loader(SIZE)

    def counted(image: Image, where: str) -> torch.Tensor:
        decoded.append(Path(str(image.source)).name)
        return load(image, where)

    (batch,) = micro_batches(data, data.scan(), [[0, 2, 3]], load_image=counted)
    assert sorted(decoded) == ["a.png", "b.png"] and len(batch.image_keys) == 2
    assert batch.tensors["pixels"].shape == (2, 3, 16, 16)
    red = batch.tensors["pixels"][0, :, 8, 8].tolist()
    assert red == [255, 0, 0]  # crops stand in the order of image_keys
    # Records 0 and 3 share their image in the row: its tokens stand there once.
    assert batch.tensors["image_index"].tolist() == list(range(2 * 4)) and batch.unshared_tokens > batch.tokens


def test_a_bad_record_is_left_out_and_named_or_raised(data: InstructionData) -> None:
    scan = data.scan()
    given: dict[str, Any] = {"load_image": image_loader(SIZE)}
    with pytest.raises(RecordError, match="cut.png"):
        list(micro_batches(data, scan, [[1, 5]], **given))
    skipped, alone = micro_batches(data, scan, [[1, 5], [1]], **given, skip_bad=True)
    assert list(skipped.bad) == [5] and "cut.png" in str(skipped.bad[5])
    assert same(skipped, alone) and alone.bad == {}
    (nothing,) = micro_batches(data, scan, [[5]], **given, skip_bad=True)
    assert nothing.weight == 0 and nothing.targets == nothing.tokens == 0 and list(nothing.bad) == [5]


def test_an_idle_batch_counts_for_nothing_but_runs(data: InstructionData) -> None:
    (batch,) = micro_batches(data, data.scan(), [[]], load_image=None)
    assert same(batch, idle_batch()) and len(batch.tensors["input_ids"]) == 1
    assert (batch.tokens, batch.targets, batch.loss_weight) == (0, 0, 0.0)


def test_a_batch_crosses_processes_whole(data: InstructionData) -> None:
    (batch,) = micro_batches(data, data.scan(), [[0, 1]], load_image=image_loader(SIZE))
    assert same(pickle.loads(pickle.dumps(batch)), batch)


def test_the_forecast_of_a_batch_holds_what_it_takes(data: InstructionData) -> None:
    """Prefetching stays within its budget only if a batch never takes more than was expected of it."""
    scan = data.scan()
    load = image_loader(SIZE)
    expected = _Maker(data, scan, load, skip_bad=False).most_bytes
    for units in ([0], [1], [0, 2, 3], [0, 1, 2, 3, 4], []):
        (batch,) = micro_batches(data, scan, [units], load_image=load)
        assert batch.bytes <= expected(units)
