"""The two-way model holds what it says, by simulation and against a table worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmit.analysis.statistics import Contrast, Estimate, contrast, estimate, judged
from mmit.errors import MmitError
from mmit.eval.metrics.intervals import clustered, wilson

P, K = 100, 10
IMAGES = [str(image) for image in range(P) for _ in range(K)]


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class World:
    """Answers right or wrong by seed, image and chance: sd of seeds and of images in logits."""

    def __init__(self, *, sd_seed: float, sd_image: float = 1.0, sd_rest: float = 0.3, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.sd_seed, self.sd_image, self.sd_rest = sd_seed, sd_image, sd_rest

    def images(self) -> np.ndarray:
        return self.rng.normal(0, self.sd_image, (1, P, 1))

    def arm(self, seeds: int, images: np.ndarray, *, shift: float = 0.0) -> np.ndarray:
        """(seeds, P * K) answers of models that see `images`."""
        logit = 0.5 + shift + self.rng.normal(0, self.sd_seed, (seeds, 1, 1)) + images
        logit = logit + self.rng.normal(0, self.sd_rest, (seeds, P, 1))
        return (self.rng.random((seeds, P, K)) < logistic(logit)).astype(float).reshape(seeds, P * K)

    def mean(self, shift: float = 0.0) -> float:
        """The true score, over all seeds and images."""
        sd = np.sqrt(self.sd_seed**2 + self.sd_image**2 + self.sd_rest**2)
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        return float((weights * logistic(0.5 + shift + sd * nodes)).sum() / weights.sum())


def coverage(world: World, seeds: int, studies: int) -> tuple[float, float, float]:
    """Shares of studies whose interval holds the truth: two-way model, over questions, over images."""
    truth = world.mean()
    hits = np.zeros(3)
    for _ in range(studies):
        scores = world.arm(seeds, world.images())
        one = scores[0]
        intervals = (
            estimate(scores, IMAGES).ci95,
            wilson(int(scores.sum()), scores.size),
            clustered(one, IMAGES),  # of one model: what `mmit eval` says, which knows nothing of seeds
        )
        hits += [low <= truth <= high for low, high in intervals]
    return tuple(hits / studies)


def test_the_interval_holds_the_truth_as_often_as_it_says_and_one_over_questions_does_not():
    two_way, questions, images = coverage(World(sd_seed=0.3), 3, 300)
    assert 0.90 <= two_way <= 0.98  # 300 studies: three standard errors are 0.04
    assert questions < 0.6 and images < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("sd_seed", [0.1, 0.3])
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_coverage_and_errors_of_2000_studies(sd_seed, seeds):
    world = World(sd_seed=sd_seed, seed=seeds)
    two_way, questions, _ = coverage(world, seeds, 2000)
    assert 0.92 <= two_way <= 0.97 and questions < 0.75
    shift = _shift(world, 0.05)
    found, equal = 0, 0
    for _ in range(2000):
        images = world.images()
        base, same, better = (world.arm(seeds, images, shift=s) for s in (0.0, 0.0, shift))
        scores = {name: dict(enumerate(rows)) for name, rows in (("base", base), ("same", same), ("better", better))}
        found += judged([contrast("same", "base", scores, IMAGES, margin=0.05)])[0].verdict in ("higher", "lower")
        p = contrast("better", "base", scores, IMAGES, margin=0.05).equal_p
        equal += p is not None and p < 0.05
    assert found / 2000 <= 0.07, "an effect that is not there"
    assert equal / 2000 <= 0.06, "no effect, where one of the margin's size is there"


def _shift(world: World, difference: float) -> float:
    """The shift in logits that raises the true score by `difference`."""
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if world.mean(middle) - world.mean() < difference else (low, middle)
    return low


def test_the_detectable_difference_is_found_with_a_power_of_80_percent():
    world = World(sd_seed=0.1, seed=4)
    sizes = []
    for _ in range(40):
        images = world.images()
        scores = {"a": dict(enumerate(world.arm(5, images))), "b": dict(enumerate(world.arm(5, images)))}
        sizes.append(contrast("a", "b", scores, IMAGES, margin=0.05).difference.detectable)
    shift = _shift(world, float(np.mean(sizes)))
    hits = 0
    for _ in range(200):
        images = world.images()
        scores = {"a": dict(enumerate(world.arm(5, images, shift=shift))), "b": dict(enumerate(world.arm(5, images)))}
        p = contrast("a", "b", scores, IMAGES, margin=0.05).p
        hits += p is not None and p < 0.05
    assert 0.65 <= hits / 200 <= 0.92


def test_mean_squares_of_a_small_table_by_hand():
    # Seeds differ by 0.5, images by 0.5, one cell by a rest: worked out with pen and paper.
    scores = np.array([[1.0, 1.0], [1.0, 0.0]])
    found = estimate(scores, ["x", "y"])
    # cells minus mean: .25 .25 / .25 -.75; seed means .25, -.25; image means .25, -.25; rest +-.25
    # MS seed = 2 * (.0625 * 2) / 1 = .25, MS image = .25, MS rest = 4 * .0625 / 1 = .25; variance = .25 / 4
    assert found.mean == 0.75 and found.error == pytest.approx(0.25) and found.df == pytest.approx(1.0)
    assert found.by_seed == (1.0, 0.5)


def test_images_with_many_questions_count_as_one():
    rng = np.random.default_rng(0)
    cells = rng.random((4, 30)) < 0.6
    alone = estimate(cells.astype(float), [str(i) for i in range(30)])
    repeated = estimate(np.repeat(cells, 7, axis=1).astype(float), [str(i) for i in range(30) for _ in range(7)])
    assert repeated.ci95 == pytest.approx(alone.ci95) and repeated.questions == 210


def test_one_seed_has_no_interval():
    found = estimate(np.array([[1.0, 0.0, 1.0]]), ["a", "b", "c"])
    assert found.mean == pytest.approx(2 / 3) and found.ci95 is None and found.detectable is None
    scores = {"a": {0: np.ones(3)}, "b": {0: np.zeros(3)}}
    verdict = judged([contrast("a", "b", scores, ["x", "y", "z"], margin=0.05)])[0]
    assert verdict.verdict == "no interval" and verdict.difference.mean == 1.0


def test_scores_that_do_not_vary_claim_no_certainty():
    none_right = estimate(np.zeros((3, 12)), [str(i) for i in range(12)])
    assert none_right.ci95 == wilson(0, 12) and none_right.error is None
    scores = {"a": {s: np.zeros(12) for s in range(3)}, "b": {s: np.zeros(12) for s in range(3)}}
    few = judged([contrast("a", "b", scores, [str(i) for i in range(12)], margin=0.05)])[0]
    assert few.verdict == "undecided"
    scores = {arm: {s: np.tile([0.0, 1.0], 200) for s in range(3)} for arm in "ab"}
    many = judged([contrast("a", "b", scores, [str(i) for i in range(400)], margin=0.05)])[0]
    assert many.verdict == "equal" and many.difference.ci95 == pytest.approx((-0.0095, 0.0095), abs=1e-3)


def _with_p(p: float, mean: float = 0.1) -> Contrast:
    return Contrast("a", "b", Estimate(mean, 3, 10, 10), 0.05, p, 1.0)


def test_holm_by_hand():
    found = judged([_with_p(0.01), _with_p(0.04), _with_p(0.03)])
    assert [c.holm for c in found] == pytest.approx([0.03, 0.06, 0.06])
    assert [c.verdict for c in found] == ["higher", "undecided", "undecided"]


def test_contrasts_use_the_seeds_that_both_arms_have():
    scores = {"a": {0: np.ones(4), 1: np.zeros(4), 2: np.ones(4)}, "b": {1: np.zeros(4), 2: np.zeros(4)}}
    assert contrast("a", "b", scores, list("wxyz"), margin=0.05).difference.seeds == 2
    with pytest.raises(MmitError, match="no seed in common"):
        contrast("a", "b", {"a": {0: np.ones(4)}, "b": {1: np.ones(4)}}, list("wxyz"), margin=0.05)


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.zeros(3), np.zeros((2, 4)), np.array([[0.0, np.nan, 1.0]])])
def test_scores_that_cannot_be_used(scores):
    with pytest.raises(MmitError):
        estimate(scores, ["a", "b", "c"])
