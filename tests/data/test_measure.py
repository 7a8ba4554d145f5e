"""The first pass: the same numbers from any number of processes and the cache, until what they depend on changes."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmit.data import marks, measure, preparation
from mmit.data.chat import chat_format, encode
from mmit.data.dataset import InstructionData
from mmit.data.preparation import ImagePreparation
from mmit.data.sources import SourceSpec, open_source
from mmit.data.store import Store
from tests.tiny_run import write_tokenizer

WHOLE = ImagePreparation((16, 16), "resize", "bicubic", (0, 0, 0), tokens=4)
TILED = ImagePreparation((16, 16), "dynamic", "bicubic", (0, 0, 0), tokens=4, tiles={"max_tiles": 6})


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    chat = chat_format("hf", tokenizer)
    return lambda conversation: encode(conversation, chat, tokenizer)


@pytest.fixture
def folder(tmp_path):
    """Two files of LLaVA rows, some of them bad, and pictures, one of them missing."""
    rng = random.Random(0)
    for i in range(8):
        PIL.Image.new("RGB", (20 + 13 * i, 90 - 9 * i)).save(tmp_path / f"{i}.png")
    for name in ("a.json", "b.jsonl"):
        rows = []
        for i in range(60):
            turns = [
                {"from": side, "value": " ".join(rng.choices(["a", "cat", "Ü", "dog."], k=rng.randint(1, 9)))}
                for _ in range(rng.randint(1, 3))
                for side in ("human", "gpt")
            ]
            row = {"id": f"{i}", "conversations": turns, "topic": "x"}
            if rng.random() < 0.6:
                row["image"] = f"{rng.randint(0, 8)}.png"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            if rng.random() < 0.1:
                row["conversations"] = []
            rows.append(row)
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else lines)
    return tmp_path


def data_of(folder, coded, *, store=None, shown=WHOLE, key="chat", **options):
    cache = None if store is None else store.folder
    sources = [
        open_source(SourceSpec(folder / name, format="llava"), cache=cache, check_rows=False)
        for name in ("a.json", "b.jsonl")
    ]
    given = {"max_length": 120, "capacity": 120, **options}
    return InstructionData(sources, coded, preparation=shown, key=key, **given)


def same(a, b):
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "bad":
            x, y = [e.facts for e in x], [e.facts for e in y]
        assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, field.name
    assert np.array_equal(a.illustrated, b.illustrated)


@pytest.mark.parametrize("shown", [WHOLE, TILED])
def test_processes_and_cache_change_nothing(folder, coded, shown, monkeypatch):
    alone = data_of(folder, coded, shown=shown).scan()
    assert alone.bad and len(alone.illustrated) and alone.kept[0]["topic"] and alone.records == 120
    monkeypatch.setattr(measure, "FEW", 10)
    monkeypatch.setattr(measure, "PIECE", 7)
    monkeypatch.setattr(measure, "FILES", 5)
    store, told = Store(folder / "cache"), []
    for workers in (3, 0, 2):
        data = data_of(folder, coded, shown=shown, store=store)
        same(data.scan(workers=workers, store=store, progress=lambda *done: told.append(done)), alone)
        assert told[-1] == (120, 120)
    monkeypatch.setattr(measure, "_measure", None)  # nothing is measured again
    same(data.scan(store=store), alone)
    assert not data.scan(store=store).length.flags.writeable or len(data.sources) > 1


def test_one_source_is_mapped_not_copied(folder, coded):
    store = Store(folder / "cache")
    for _ in range(2):
        source = open_source(SourceSpec(folder / "a.json", format="llava"), cache=store.folder, check_rows=False)
        data = InstructionData([source], coded, preparation=WHOLE, max_length=120, capacity=120, key="chat")
        scan = data.scan(store=store)
    assert not scan.length.flags.writeable and not scan.length.flags.owndata


def test_what_is_measured_again_and_what_is_not(folder, coded, monkeypatch):
    store, measured = Store(folder / "cache"), []
    original = measure._measure
    monkeypatch.setattr(
        measure,
        "_measure",
        lambda data, source, *rest: (measured.append(source), original(data, source, *rest))[1],
    )

    def again(**options):
        measured.clear()
        data_of(folder, coded, store=store, **options).scan(store=store)
        return sorted(set(measured))

    assert again() == [0, 1] and again() == []
    assert again(key="another chat") == [0, 1] and again(max_length=100) == [0, 1]
    assert again(split_turns=True) == [0, 1] and again(share_prefix=False) == [0, 1]
    assert again(shown=TILED) == [0, 1] and again(shown=TILED) == [] and again() == []
    os.utime(folder / "3.png", ns=(1, 1))
    assert again() == [0, 1] and again(shown=TILED) == [0, 1]  # what a resumed run compares holds the images' contents
    with open(folder / "3.png", "ab") as file:
        file.write(b"\0")
    os.utime(folder / "3.png", ns=(1, 1))  # longer, of the same time
    assert again() == [0, 1]
    (folder / "8.png").write_bytes((folder / "7.png").read_bytes())  # it was missing
    assert again() == [0, 1] and again() == []
    (folder / "0.png").unlink()
    assert again() == [0, 1]
    text = (folder / "b.jsonl").read_text()
    (folder / "b.jsonl").write_text(text.replace("cat", "cow"))
    assert again() == [1]


def test_a_warm_start_opens_no_picture(folder, coded, monkeypatch):
    """Where sizes decide the tokens, they are read from the files' headers once, not at every start."""
    store = Store(folder / "cache")
    cold = data_of(folder, coded, store=store, shown=TILED).scan(store=store)
    opened = []
    monkeypatch.setattr(preparation, "image_size", lambda image, **_: opened.append(image) or (20, 90))
    monkeypatch.setattr(marks, "picture_mark", lambda image: opened.append(image) or b"")
    warm = data_of(folder, coded, store=store, shown=TILED).scan(store=store)
    same(cold, warm)
    assert len(cold.illustrated) and not opened
    data_of(folder, coded, shown=TILED).scan()
    assert opened  # what is watched is what a cold start opens pictures with


def test_another_template_opens_no_picture_again(folder, coded, monkeypatch):
    """Sizes and marks of files are kept apart from what a template and a preparation make of them."""
    store = Store(folder / "cache")
    data_of(folder, coded, store=store, shown=TILED).scan(store=store)
    opened = []
    read, mark = preparation.image_size, marks.picture_mark
    monkeypatch.setattr(preparation, "image_size", lambda image, **told: opened.append(image) or read(image, **told))
    monkeypatch.setattr(marks, "picture_mark", lambda image: opened.append(image) or mark(image))

    def again(**options):
        opened.clear()
        found = data_of(folder, coded, store=store, **options).scan(store=store)
        names = {Path(image.source).name for image in opened}
        same(found, data_of(folder, coded, **options).scan())
        return names

    assert again(key="another chat", shown=TILED) == set() == again(max_length=100)
    os.utime(folder / "3.png", ns=(1, 1))
    assert again(key="another chat", shown=TILED) == {"3.png"} and again(key="a third", shown=TILED) == set()
    for entry in store.folder.glob("pictures-*"):
        shutil.rmtree(entry)
    assert len(again(key="a fourth")) > 2 and again(key="a fifth") == set()
    assert len(again(key="a sixth", shown=TILED)) > 2  # sizes were not needed before
    assert again(key="a seventh", shown=TILED) == set()


def test_damage_is_noticed_and_mended(folder, coded):
    said = []
    store = Store(folder / "cache", said.append)
    first = data_of(folder, coded, store=store).scan(store=store)
    file = next(store.folder.glob("measured-*/units.npy"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    same(data_of(folder, coded, store=store).scan(store=store), first)
    assert len(said) == 1 and "units.npy is not what was written" in said[0]
    assert data_of(folder, coded, store=store).scan(store=store) and len(said) == 1


def test_without_a_key_nothing_is_kept(folder, coded):
    store = Store(folder / "cache")
    data_of(folder, coded, store=store, key="").scan(store=store)
    assert not list(store.folder.glob("measured-*"))
