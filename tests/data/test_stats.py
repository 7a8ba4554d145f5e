"""Counts, lengths, diversity and pictures of `mmit data stats`."""

from __future__ import annotations

import json

import PIL.Image
import pytest

from mmit.cli.data_stats import _lines
from mmit.data.chat import chat_format, encode
from mmit.data.stats import Stats, collect, summary
from mmit.errors import RecordError
from mmit.records import Image, Record, Text, Turn
from tests.data.small_tokenizers import family


def records(folder) -> list[Record]:
    PIL.Image.new("RGB", (40, 30)).save(folder / "a.png")
    PIL.Image.new("RGB", (20, 60)).save(folder / "b.png")
    first, second = str(folder / "a.png"), str(folder / "b.png")
    talk = (
        Turn("user", (Image(first), Text("What is it?"))),
        Turn("assistant", (Text("A cat."),)),
        Turn("user", (Text("What color is it?"),)),
        Turn("assistant", (Text("Black."),)),
    )
    return [
        Record(talk, source="one", licence="MIT"),
        Record.triple("Describe the picture.", "Tall.", images=[second, first], source="one"),
        Record.triple("Write a poem about rain.", "Rain, rain.", source="two"),
        Record.triple("What?", "Gone.", images=[str(folder / "gone.png")], source="two"),
    ]


def encoder(record: Record):
    tokenizer = family("byte_level")
    return [encode(record.turns, chat_format("qa", tokenizer), tokenizer)]


def test_counts(tmp_path):
    found = collect([*records(tmp_path), RecordError("bad")])
    assert found.bad == 1 and found.licences == {"MIT": 1, "not stated": 3}
    one, two = found.sources["one"], found.sources["two"]
    assert (one.records, one.text_only, one.turns, one.images) == (2, 0, 6, 3)
    assert (two.records, two.text_only, two.turns, two.images) == (2, 1, 4, 1)
    assert one.prompts == [11, 17, 21] and one.answers == [6, 6, 5]
    assert sorted(found.image_sizes) == [(20, 60), (40, 30)] and found.unreadable_images == 1
    whole = found.whole
    assert whole.records == 4 and whole.turns == 10 and len(whole.prompts) == 5
    assert len(one.prompts) == 3, "summing must not change the parts"


def test_tokens(tmp_path):
    rows = records(tmp_path)
    found = collect(rows, encode=encoder, image_tokens=5)
    one = found.sources["one"]
    samples = [encoder(row)[0] for row in rows[:2]]
    assert one.tokens == [len(s.ids) + 4 * n for s, n in zip(samples, (1, 2), strict=True)]
    assert one.image_tokens == 15 and one.text_tokens == sum(len(s.ids) for s in samples) - 3
    assert one.supervised == sum(sum(s.supervised) for s in samples)
    data = one.to_json()
    assert data["supervised_share_of_text"] == pytest.approx(one.supervised / one.text_tokens, abs=1e-4)


def test_records_that_cannot_be_encoded_are_counted(tmp_path):
    def refuse(record: Record):
        raise RecordError("no")

    found = collect(records(tmp_path), encode=refuse)
    assert found.not_encoded == 4 and found.whole.records == 4 and not found.whole.tokens


def test_the_json_is_json(tmp_path):
    data = json.loads(json.dumps(collect(records(tmp_path), encode=encoder).to_json()))
    assert list(data["sources"]) == ["one", "two"] and data["images"]["different"] == 3
    assert data["images"]["width"] == {"count": 2, "mean": 30.0, "min": 20.0, "median": 30.0, "p95": 39.0, "max": 40.0}
    assert data["diversity"]["prompts"] == 5 and data["diversity"]["rouge_l_sample"] == 5
    assert json.dumps(Stats().to_json()) and summary([]) == {}


def test_the_sample_is_repeatable(tmp_path):
    rows = [Record.triple(f"Say the number {i} and {i * 7}.", "Yes.") for i in range(80)]
    assert collect(rows, sample=20, seed=1).rouge == collect(rows, sample=20, seed=1).rouge
    assert len(collect(rows, sample=20).rouge) == 20


def test_pairs_and_labels_are_counted():
    asked = Turn("user", (Text("What?"),))
    answers = [("a cat", "a"), ("a", "a dog"), ("ox", "ok")]
    rows = [
        Record((asked, Turn("assistant", (Text(a),))), source="pairs", rejected=Turn("assistant", (Text(b),)))
        for a, b in answers
    ]
    rows += [
        Record((asked, Turn("assistant", (Text("ok"),))), source="kto", label=good) for good in (True, True, False)
    ]
    found = collect(rows)
    pairs, labels = found.sources["pairs"].to_json(), found.sources["kto"].to_json()
    assert pairs["pairs"]["chosen_longer"] == pairs["pairs"]["chosen_shorter"] == 1
    assert pairs["pairs"]["chosen_characters"]["max"] == 5 and pairs["pairs"]["rejected_characters"]["min"] == 1
    assert labels["labels"] == {"good": 2, "bad": 1} and "pairs" not in labels and "labels" not in pairs
    lines = _lines(found)
    assert "3 pairs: chosen 2 / 5, rejected 2 / 5; chosen longer in 33%, shorter in 33%" in lines
    assert "labelled answers: 2 good, 1 bad" in lines
    assert not any("pairs: chosen" in line or "labelled" in line for line in _lines(collect(rows[:0])))
