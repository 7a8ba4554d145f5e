"""The METRICS table as a whole: one contract for every metric, and speed."""

import json
import time

import pytest

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS, Score, get_metric

LETTER = {"answer": "A", "options": ["cat", "dog"]}
MATHS = {"question_type": "multi_choice", "answer_type": "text", "choices": ["1", "2"], "answer": "1"}
# One (answer, right reference) per metric family.
SAMPLES = {
    "vqa": ("red", ["red"] * 10),
    "exact": ("red", "red"),
    "gqa": ("red", "red"),
    "ai2d": ("A", "A"),
    "anls": ("red car", ["red car"]),
    "relaxed": ("5", "5"),
    "iou": ("[1, 2, 30, 40]", "(1,2),(30,40)"),
    "rouge_l": ("a red car", ["a red car"]),
    "ocrbench": ("STOP", {"answers": ["stop"], "dataset": "x"}),
    "gsm8k": ("#### 5", "so #### 5"),
    "pope": ("yes", "yes"),
    "mme": ("yes", None),
    "nlvr": ("true", {"label": "true", "identifier": "72-0-0"}),
    "nlvr2": ("true", {"label": "True", "identifier": "dev-0-0-0"}),
    "choice": ("A", LETTER),
    "seed": ("A", "A"),
    "scienceqa": ("A", "A"),
    "realworldqa": ("A", "A"),
    "mmbench": ("A", None),
    "mmmu": ("A", {**LETTER, "question_type": "multiple-choice"}),
    "mathvista": ("A", MATHS),
    "ifeval": ("[x]", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}),
}
NAMES = [n for n in METRICS if not n.startswith("captions") and not n.endswith("nltk")]


def columns(name, n):
    answer, reference = SAMPLES[name.split(":")[0]]
    if name.startswith("mme:"):
        references = [{"answer": "yes", "category": "count", "image": i // 2} for i in range(n)]
    elif name.startswith("mmbench"):
        references = [{**LETTER, "index": i} for i in range(n)]
    else:
        references = [reference] * n
    return [answer] * n, references


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_gives_a_full_score(name):
    score = METRICS[name](*columns(name, 4), groups=["a", "a", "b", "b"], seed=3)
    assert isinstance(score, Score) and score.n == 4 and score.unparsed_rate == 0
    assert score.value == pytest.approx(200.0 if name.startswith("mme:") else 1.0)
    assert score.ci95[0] <= score.value + 1e-12 and score.value <= score.ci95[1] + 1e-12
    assert set(score.by_group) == {"a", "b"} and all(s.n == 2 for s in score.by_group.values())
    assert len(score.details["values"]) == len(score.details["parsed"]) == 4
    assert json.loads(json.dumps(score.to_json(per_answer=True)))["n"] == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_counts_an_empty_answer_as_unparsed(name):
    predictions, references = columns(name, 2)
    score = METRICS[name](["", ""], references)
    assert score.unparsed_rate == 1.0
    # These three make an answer out of nothing, by their references' rules.
    if name not in ("mmmu:random", "pope:official", "mathvista:extracted"):
        assert score.value == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_refuses_columns_of_different_length(name):
    predictions, references = columns(name, 4)
    with pytest.raises(MmitError, match="4 predictions but 3"):
        METRICS[name](predictions, references[:3])
    with pytest.raises(MmitError, match="nothing to score"):
        METRICS[name]([], [])


@pytest.mark.parametrize("name", NAMES)
def test_twenty_thousand_repeated_answers_are_quick(name):
    predictions, references = columns(name, 20_000)
    start = time.perf_counter()
    METRICS[name](predictions, references)
    # 60 s for a million would be 1.2 s.
    assert time.perf_counter() - start < 1.2


def test_unknown_metric_gets_the_nearest_name():
    assert get_metric("exact") is METRICS["exact"]
    with pytest.raises(MmitError, match="did you mean 'vqa:official'"):
        get_metric("vqa:oficial")
