from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as hs

from mmit.data.chat import chat_format, encode
from mmit.data.packing import Sample, build_row
from mmit.data.preparation import ImagePreparation
from mmit.data.prompts import BLANK, Prompt, PromptMaker, as_prompt, batches
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text, Turn
from tests.data.small_tokenizers import byte_level, family

TOKENIZER = family("byte_level")
CHAT = chat_format("chatml", TOKENIZER)


def record(*talk: str, images: tuple[str, ...] = (), **provenance: Any) -> Record:
    turns = [Turn("assistant" if n % 2 else "user", (Text(text),)) for n, text in enumerate(talk)]
    turns[0] = Turn("user", (*map(Image, images), *turns[0].parts))
    return Record(tuple(turns), **provenance)


EYE = ImagePreparation((8, 8), "resize", "bicubic", (0, 0, 0), tokens=5)


def maker(**options: Any) -> PromptMaker:
    return PromptMaker(CHAT, TOKENIZER, **{"preparation": EYE, "context": 100} | options)


def test_a_prompt_ends_where_the_last_answer_begins() -> None:
    whole = record("one", "two", "three", "four", id="x", licence="mit")
    assert as_prompt(whole) == record("one", "two", "three", id="x", licence="mit")
    assert as_prompt(as_prompt(whole)) == as_prompt(whole)
    for bad in (Record(()), Record((Turn("assistant", (Text("hi"),)),)), Record((Turn("system", (Text("hi"),)),))):
        with pytest.raises(RecordError):
            as_prompt(bad)


def test_a_question_is_predicted_at_its_last_token() -> None:
    prompt = maker().question(record("What?", "a cat", images=("a.png",)), 7)
    ids = encode(record("What?", images=("a.png",)).turns, CHAT, TOKENIZER, generate=True).ids
    (sample,) = prompt.samples
    row = build_row([sample])
    assert len(row.input_ids) == prompt.length == len(ids) + 4
    assert row.predict_at.tolist() == [prompt.length - 1]
    assert prompt.number == sample.record == 7 and list(prompt.pictures) == ["a.png"]


def test_targets_of_choices_are_the_tokens_of_the_last_answer() -> None:
    talk = record("What?", "a cat", "Sure?")
    for with_end in (False, True):
        prompt = maker().choices(talk, 0, answers=["yes", "no, a dog"], with_end=with_end)
        for sample, answer in zip(prompt.samples, ["yes", "no, a dog"], strict=True):
            targets = [i for i, s in zip(sample.ids, sample.supervised, strict=True) if s]
            assert TOKENIZER.decode(targets) == answer + "<|im_end|>" * with_end


def test_a_thought_that_the_template_writes_is_no_target_of_a_choice() -> None:
    empty = "{% if m['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + empty + "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    chat = chat_format("hf", tokenizer)
    for turns in (record("What?").turns, record("What?", "a cat", "Sure?").turns):
        talk = Record(turns)
        for with_end in (False, True):
            prompt = PromptMaker(chat, tokenizer, None, None).choices(talk, 0, answers=["yes"], with_end=with_end)
            (sample,) = prompt.samples
            assert "</think>" in tokenizer.decode(sample.ids)
            targets = [i for i, s in zip(sample.ids, sample.supervised, strict=True) if s]
            assert tokenizer.decode(targets) == "yes" + "<|im_end|>" * with_end


def test_blank_pictures_share_one_key() -> None:
    prompt = maker(blank=EYE.blank((1, 2, 3))).question(record("What?", images=("a.png", "b.png")), 0)
    assert prompt.samples[0].images == (BLANK, BLANK)


def test_what_does_not_fit_is_refused_with_its_place_and_counts() -> None:
    length = maker().question(record("What?", images=("a.png",)), 0).length
    assert maker(context=length + 1).question(record("What?", images=("a.png",)), 0).length == length
    with pytest.raises(RecordError, match=rf"^record 3: takes {length} tokens \(5 of them for 1 images\)"):
        maker(context=length).question(record("What?", images=("a.png",)), 2)
    assert maker(context=None).question(record("fox " * 300), 0).length > 300
    with pytest.raises(RecordError, match="b.jsonl:4: has images"):
        maker(preparation=None).question(record("What?", images=("a.png",), source="b.jsonl", row=4), 0)
    with pytest.raises(RecordError, match="^record 1: "):
        maker().choices(record("What?"), 0, answers=[" "], with_end=False)


PROMPTS = hs.lists(
    hs.tuples(hs.integers(0, 4), hs.integers(1, 50), hs.integers(1, 3)), max_size=40
)  # picture (0: none), length, samples


@given(PROMPTS, hs.integers(1, 8))
def test_batches_hold_every_prompt_once_and_few_pictures_twice(rows: list[tuple[int, ...]], size: int) -> None:
    prompts = [
        Prompt(n, (Sample((1,), (True,)),) * count, {key: (Image("a.png"), "")} if key else {}, length)
        for n, (key, length, count) in enumerate(rows)
    ]
    plan = batches(prompts, size)
    assert sorted(p.number for batch in plan for p in batch) == list(range(len(prompts)))
    for batch in plan:
        assert batch and (sum(len(p.samples) for p in batch) <= size or len(batch) == 1)
    for key in {key for key, _, _ in rows if key}:
        whole = sum(count for k, _, count in rows if k == key)
        used = sum(any(key in p.pictures for p in batch) for batch in plan)
        assert used == 1 if whole <= size else used <= whole


def test_the_longest_come_first_and_a_batch_needs_a_size() -> None:
    prompts = [Prompt(n, (Sample((1,), (True,)),), {}, length) for n, length in enumerate([3, 9, 5, 7])]
    assert [[p.length for p in batch] for batch in batches(prompts, 2)] == [[9, 7], [5, 3]]
    with pytest.raises(ConfigError, match="batch_size is 0"):
        batches(prompts, 0)
