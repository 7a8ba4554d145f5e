"""Answers and likelihoods for harnesses, against transformers run one request at a time."""

from __future__ import annotations

import pytest
import torch

from mmit.data.chat import encode
from mmit.errors import ConfigError, RecordError
from mmit.eval.harness.requests import Generation, question
from mmit.eval.harness.scoring import batch_of, by_settings, continue_tokens, score_answers, score_tokens, write
from mmit.generate import Model
from mmit.records import Text, Turn
from tests.test_generate import CHAT, PICTURES, TOKENIZER, build


@pytest.fixture(scope="module")
def model() -> Model:
    return build()


@torch.inference_mode()
def alone(model: Model, begin: list[int], end: list[int]) -> tuple[float, bool]:
    """The loss torch has for `end` after `begin`, and whether each of its tokens is the likeliest."""
    logits = model.vlm.llm(input_ids=torch.tensor([begin + end])).logits[0, len(begin) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(end), reduction="sum")
    return -float(loss), bool((logits.argmax(-1) == torch.tensor(end)).all())


def test_likelihoods_of_tokens_equal_cross_entropy(model: Model) -> None:
    begin, other = [5, 6, 7], [8]
    greedy: list[int] = []
    for _ in range(3):
        with torch.inference_mode():
            greedy.append(int(model.vlm.llm(input_ids=torch.tensor([begin + greedy])).logits[0, -1].argmax()))
    pairs = [(begin, [9, 10]), (begin, greedy), (begin, []), (other, [11, 12, 13]), (begin, [9])]
    for batch_size in (1, 2, 32):
        found = score_tokens(model, pairs, batch_size=batch_size)
        for one, (start, end) in zip(found, pairs, strict=True):
            assert one.tokens == len(end)
            expected = alone(model, start, end) if end else (0.0, True)
            assert one.log_probability == pytest.approx(expected[0], abs=1e-4) and one.greedy == expected[1]
    assert [one.greedy for one in found] == [False, True, True, False, False]


def test_likelihoods_of_answers_equal_cross_entropy(model: Model) -> None:
    record = question("Which is it?", None, name="t")
    shown = question("Which is it?", [PICTURES[0].source], name="t")
    asked = [(record, " a cat"), (record, "dog"), (shown, " a cat")]
    found = score_answers(model, asked, batch_size=8)
    begin = list(encode(record.turns, CHAT, TOKENIZER, generate=True).ids)
    for one, (_, answer) in zip(found[:2], asked, strict=False):
        turns = (*record.turns, Turn("assistant", (Text(answer.strip()),)))
        whole = encode(turns, CHAT, TOKENIZER)
        end = [i for i, origin in zip(whole.ids, whole.origin, strict=True) if origin == "content"][-one.tokens :]
        assert one.log_probability == pytest.approx(alone(model, begin, end)[0], abs=1e-4)
    assert found[0].log_probability != pytest.approx(found[2].log_probability, abs=1e-3)
    assert [one.log_probability for one in found[:2]] == pytest.approx(
        model.score([record], [["a cat", "dog"]])[0], abs=1e-5
    )
    with pytest.raises(RecordError, match="without text"):
        score_answers(model, [(record, " ")], batch_size=8)


@torch.inference_mode()
def test_continued_texts_keep_their_whitespace_and_end_at_stops(model: Model) -> None:
    beginnings = [list(TOKENIZER(text)["input_ids"]) for text in ("The quick", "brown fox jumps", "Hello")]
    said = continue_tokens(model, beginnings, Generation((), 24), batch_size=2)
    for begin, text in zip(beginnings, said, strict=True):
        out = model.vlm.llm.generate(
            input_ids=torch.tensor([begin]), max_new_tokens=24, do_sample=False, eos_token_id=list(model.end_ids)
        )
        assert text == TOKENIZER.decode(out[0, len(begin) :], skip_special_tokens=True)
    stop = said[0][5:7]
    cut = continue_tokens(model, beginnings[:1], Generation((stop,), 24), batch_size=2)
    assert cut == [said[0][: said[0].index(stop)]]


def test_what_does_not_fit_is_refused(model: Model) -> None:
    assert len(score_tokens(model, [([5] * 399, [6, 7])], batch_size=1)) == 1  # 400 tokens run
    with pytest.raises(RecordError, match="401 tokens do not fit the model's context of 400"):
        score_tokens(model, [([5] * 400, [6, 7])], batch_size=1)
    with pytest.raises(RecordError, match="nothing stands before"):
        score_tokens(model, [([], [6, 7])], batch_size=1)
    with pytest.raises(RecordError, match="do not fit"):
        continue_tokens(model, [[5] * 400], Generation(), batch_size=1)


def test_requests_of_equal_settings_run_together_and_keep_their_places() -> None:
    parts = list(by_settings("abcdef", [1, 2, 1, 1, 2, 1], batch_size=32))
    assert parts == [([0, 2, 3, 5], list("acdf")), ([1, 4], list("be"))]
    assert [places for places, _ in by_settings(range(20), [0] * 20, batch_size=1)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]


def test_answers_are_those_of_generate(model: Model) -> None:
    records = [question(f"What is {n}?", [PICTURES[n].source], name="t") for n in range(3)]
    stop = model.generate(records[:1], max_new_tokens=20)[0][2:4]
    how = Generation((stop,), 20)
    assert write(model, records, how, batch_size=2) == model.generate(records, max_new_tokens=20, stop=[stop])


def test_batch_sizes() -> None:
    assert batch_of("16") == batch_of(16) == 16
    for given in ("auto", "0", "-1", 1.5):
        with pytest.raises(ConfigError, match="--batch_size"):
            batch_of(given)
