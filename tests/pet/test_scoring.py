"""Scores of labels are sums of log-probabilities, one by one or together; what models say together in closed form."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest
import torch

from mmit.data.chat import encode
from mmit.errors import ConfigError
from mmit.generate import Model
from mmit.pet import Example, accuracy, patterns_of, scores, soft_labels
from mmit.records import Image
from tests.test_generate import build

LABELS = ["red", "dark blue", "no colour"]
ASKED = {"id": "what", "input": "{{ image }}What colour is it?"}


@pytest.fixture(scope="module")
def model() -> Model:
    return build()


def picture(n: int) -> Image:
    noise = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    return Image(PIL.Image.fromarray(noise.numpy()))


ROWS = [Example({"image": picture(n)}, label, "rows", n) for n, label in enumerate(LABELS, 1)]


def pattern(labels: list[str] = LABELS, **changes: str):
    return patterns_of({"task": "colour", "labels": labels, "patterns": [ASKED | changes]}).patterns[0]


def test_a_score_is_the_sum_over_the_answers_tokens_and_its_end(model: Model) -> None:
    found = scores(model, pattern(), ROWS)
    for row, of_row in zip(ROWS, found, strict=True):
        for label, score in zip(LABELS, of_row, strict=True):
            record = pattern().record(row.fields, label)
            encoded = encode(record, model.chat_format, model.tokenizer)
            logits = model.logits(encoded.ids, [row.fields["image"]])
            # The slot of the picture is widened before every answer token, which are counted from the end.
            targets = [(n - len(encoded.ids), ids) for n, ids in enumerate(encoded.ids) if encoded.weights[n]]
            alone = sum(float(logits[n - 1].double().log_softmax(-1)[token]) for n, token in targets)
            assert score == pytest.approx(alone, abs=1e-4)


def test_siblings_together_equal_each_alone_and_the_order_of_labels_changes_nothing(model: Model) -> None:
    found = scores(model, pattern(), ROWS)
    record = pattern().record(ROWS[0].fields)
    alone = [model.score([record], [text], with_end=True)[0][0] for text in LABELS]
    assert np.abs(found[0] - alone).max() <= 1e-6 * np.abs(found).max()
    turned = scores(model, pattern(LABELS[::-1]), ROWS)
    assert np.abs(turned[:, ::-1] - found).max() <= 1e-6 * np.abs(found).max()


def test_calibration_takes_off_what_a_blank_picture_says(model: Model) -> None:
    found, calibrated = scores(model, pattern(), ROWS), scores(model, pattern(), ROWS, calibrate=True)
    blank = model.score([pattern().record(ROWS[0].fields)], LABELS, with_end=True, blank_images=True)[0]
    assert calibrated == pytest.approx(found - np.array(blank), abs=1e-6)


def test_models_together_in_closed_form() -> None:
    one, two = np.array([[0.0, 1.0]]), np.array([[3.0, 0.0]])
    assert soft_labels([one, two], temperature=1.0)[0, 0] == pytest.approx(1 / (1 + math.exp(-1.0)))  # mean 1.5, 0.5
    weighed = soft_labels([one, two], weights=[0.75, 0.25], temperature=2.0)  # 0.75, 0.75
    assert weighed[0] == pytest.approx([0.5, 0.5])
    assert np.array_equal(soft_labels([one, two], weights=[0, 0]), soft_labels([one, two]))
    assert soft_labels([one], temperature=1e9)[0] == pytest.approx([0.5, 0.5])
    shifted = soft_labels([one + 100, two - 5])
    assert shifted == pytest.approx(soft_labels([one, two]))


def test_ensembles_that_cannot_be_formed() -> None:
    one = np.zeros((2, 2))
    for given, options, problem in (
        ([], {}, "scored no rows"),
        ([one, np.zeros((3, 2))], {}, "different ones"),
        ([one], {"weights": [1.0, 2.0]}, "2 weights for 1 models"),
        ([one], {"weights": [-1.0]}, "below 0"),
        ([one], {"temperature": 0.0}, "is 0.0"),
    ):
        with pytest.raises(ConfigError, match=problem):
            soft_labels(given, **options)


def test_accuracy_counts_rows_whose_label_is_likeliest() -> None:
    found = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert accuracy(found, ROWS, LABELS) == pytest.approx(2 / 3)
