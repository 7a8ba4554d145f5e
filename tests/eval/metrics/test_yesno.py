"""POPE, MME and NLVR2: parsing, the numbers of the table, and where the profiles differ."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.errors import MmitError
from mmit.eval.metrics import METRICS, wilson
from mmit.eval.metrics.score import by_cluster
from mmit.eval.metrics.yesno import MME, MME_COGNITION, MME_PERCEPTION

answers = st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1)


def read(profile, text):
    return METRICS[f"pope:{profile}"]([text], ["yes"]).details["parsed"][0]


@pytest.mark.parametrize(
    ("text", "official", "lmms", "vlmeval"),
    [
        ("yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no"),
        ("NO", "yes", "no", "no"),
        ("Yes.", "yes", "other", "yes"),
        ("Unknown", "yes", "other", "other"),
        ("yes or no", "no", "other", "other"),
        ("There is not any", "no", "other", "other"),
        ("no\tdog", "yes", "other", "no"),
    ],
)
def test_pope_parsing(text, official, lmms, vlmeval):
    assert (read("official", text), read("lmms", text), read("vlmeval", text)) == (official, lmms, vlmeval)


@given(answers)
def test_pope_profiles_agree_on_plain_answers(pairs):
    said, gold = zip(*pairs, strict=True)
    scores = [METRICS[f"pope:{p}"](said, gold) for p in ("official", "lmms", "vlmeval")]
    for key in ("accuracy", "precision", "recall", "f1", "predicted_yes_ratio", "f1_ci95"):
        assert scores[0].details[key] == scores[1].details[key] == scores[2].details[key]
    assert scores[0].details["yes_ratio"] == scores[0].details["predicted_yes_ratio"]


def test_pope_numbers():
    said = ["yes"] * 4 + ["no"] * 2 + ["yes"] * 1 + ["no"] * 3
    gold = ["yes"] * 6 + ["no"] * 4
    score = METRICS["pope:official"](said, gold, groups=["random"] * 5 + ["popular"] * 5)
    d = score.details
    assert score.value == d["accuracy"] == 0.7 and score.ci95 == wilson(7, 10)
    assert (d["precision"], d["recall"]) == (4 / 5, 4 / 6)
    assert d["f1"] == pytest.approx(8 / 11) and d["yes_ratio"] == 0.5
    assert d["f1_ci95"][0] < d["f1"] < d["f1_ci95"][1]
    assert score.by_group["random"].details["recall"] == 4 / 5
    assert score.by_group["popular"].details["precision"] == 0.0


def test_pope_lmms_quirks():
    score = METRICS["pope:lmms"](["yes", "Yes.", "maybe", "no"], ["yes", "yes", "yes", "no"])
    # Unread answers miss from recall, and the ratio is that of the references.
    assert score.details["recall"] == 1.0 and score.details["yes_ratio"] == 0.75
    assert score.details["predicted_yes_ratio"] == 0.25 and score.unparsed_rate == 0.5
    assert METRICS["pope:vlmeval"](["maybe", "yes"], ["yes", "yes"]).details["recall"] == 0.5


def test_pope_reports_vague_answers_even_where_they_count_as_yes():
    score = METRICS["pope:official"](["Unknown", "yes"], ["yes", "yes"])
    assert score.value == 1.0 and score.unparsed_rate == 0.5


def test_pope_refuses_other_references():
    with pytest.raises(MmitError, match="question 1.*'maybe'"):
        METRICS["pope:official"](["yes", "no"], ["yes", "maybe"])


@pytest.mark.parametrize(
    ("text", "lmms", "official"),
    [
        ("There is no", "other", "other"),
        ("nothing", "no", "no"),
        (" yes", "yes", "yes"),
        ("y", "yes", "other"),
        ("a.yes", "yes", "other"),
        ("YES", "yes", "yes"),
    ],
)
def test_mme_parsing(text, lmms, official):
    assert (MME["lmms"](text), MME["official"](text)) == (lmms, official)


@given(st.text("yesno aYN", min_size=2, max_size=8).map(str.strip).filter(lambda t: len(t) != 1))
def test_mme_profiles_agree_without_periods_spaces_and_lone_letters(text):
    assert MME["lmms"](text) == MME["official"](text)


def question(answer, category="color", image=0):
    return {"answer": answer, "category": category, "image": image}


def test_mme_points():
    references = [question("Yes"), question("No"), question("Yes", image=1), question("No", image=1)]
    score = METRICS["mme:lmms"](["yes", "no", "yes", "yes"], references)
    assert score.details["categories"]["color"] == {"accuracy": 75.0, "accuracy_plus": 50.0, "score": 125.0}
    assert score.value == score.details["perception"] == 125.0 and score.details["cognition"] == 0
    assert len(score.details["missing_categories"]) == 13
    assert score.ci95[0] <= 125 <= score.ci95[1] and score.n == 4


def test_mme_sums_over_all_categories():
    names = (*MME_PERCEPTION, *MME_COGNITION)
    references = [question(a, c, i) for c in names for i in range(3) for a in ("yes", "no")]
    score = METRICS["mme:lmms"]([r["answer"] for r in references], references)
    assert (score.value, score.details["perception"], score.details["cognition"]) == (2800, 2000, 800)
    assert score.details["missing_categories"] == [] and score.ci95 == (2800, 2800)
    rng = random.Random(0)
    guess = METRICS["mme:lmms"]([rng.choice(["yes", "no"]) for _ in references], references)
    assert guess.value == pytest.approx(sum(c["score"] for c in guess.details["categories"].values()))
    assert guess.ci95[0] < guess.value < guess.ci95[1]


def test_mme_refuses_half_an_image():
    with pytest.raises(MmitError, match="image 1 of category 'color' has 1 questions"):
        METRICS["mme:lmms"](["yes"] * 3, [question("yes"), question("no"), question("yes", image=1)])


def test_nlvr_consistency_is_per_sentence_over_its_positions_and_permutations():
    ids = ["72-0-0", "72-0-1", "72-1-0", "80-0-0", "80-0-1"]
    references = [{"label": label, "identifier": i} for i, label in zip(ids, "ttfff", strict=True)]
    references = [r | {"label": {"t": "true", "f": "false"}[r["label"]]} for r in references]
    score = METRICS["nlvr:official"](["True", "true", "true", "False", "false"], references)
    assert (score.value, score.details["consistency"], score.details["sentences"]) == (0.8, 0.5, 2)


def test_nlvr2_consistency():
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-2-0-0", "dev-2-1-0"]
    references = [{"label": "True", "identifier": i} for i in ids]
    score = METRICS["nlvr2:official"](["true", "True", "true", "false"], references)
    assert (score.value, score.details["consistency"], score.details["sentences"]) == (0.75, 0.5, 2)
    said = ["Yes, both.", "true", "No.", "the left one"]
    assert METRICS["nlvr2:words"](said, references).details["parsed"] == ["true", "true", "false", "other"]
    assert METRICS["nlvr2:official"](said, references).unparsed_rate == 0.75


@pytest.mark.parametrize("profile", ["official", "vlmeval"])
def test_the_interval_of_f1_counts_images(profile):
    said = ["yes", "no", "yes", "yes", "no", "yes", "no", "yes"] * 3
    gold = ["yes", "yes", "no", "yes", "no", "yes", "no", "no"] * 3
    groups = ["random", "popular"] * 12
    alone = [str(number) for number in range(24)]
    once = METRICS[f"pope:{profile}"](said, gold, groups=groups, seed=1)
    assert by_cluster(once, alone, groups=groups, seed=1).details["f1_ci95"] == once.details["f1_ci95"]

    def ends(score):
        return np.array(score.details["f1_ci95"])

    # The same question asked five times says no more than once; an interval over answers believes it does.
    many, images = METRICS[f"pope:{profile}"](said * 5, gold * 5, groups=groups * 5, seed=1), alone * 5
    found = by_cluster(many, images, groups=groups * 5, seed=1)
    assert np.ptp(ends(many)) < 0.6 * np.ptp(ends(once))
    assert np.abs(ends(found) - ends(once)).max() < 0.04
    part = found.by_group["random"]
    assert np.ptp(ends(part)) > 1.5 * np.ptp(ends(many.by_group["random"]))
    assert found.details["interval_by_image"] == 24 and (profile == "official" or found.ci95 == tuple(ends(found)))
    one = by_cluster(many, ["a"] * 120, seed=1)
    assert list(ends(one)) == [0, 1]
