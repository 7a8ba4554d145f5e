"""A surface over mixes orders mixes that it has not seen, in worlds that are not of its form."""

from __future__ import annotations

import numpy as np
import pytest

from mmit.analysis.mixture import fit, left_out, proposal, spearman

SIZE, TASKS = 2000, ("a", "b", "c", "d")


class World:
    """The score of a mix: the mean over tasks of saturating curves, with noise of the seeds."""

    def __init__(self, seed: int, *, noise: float = 0.01) -> None:
        self.rng = np.random.default_rng(seed)
        self.need = self.rng.uniform(100, 1500, len(TASKS))  # records at which a task is half learned
        self.noise = noise

    def true(self, mix) -> float:
        n = SIZE * np.array([mix.get(task, 0.0) for task in TASKS])
        return float(np.mean(0.25 + 0.7 * n / (n + self.need)))

    def run(self, mix) -> float:
        return self.true(mix) + float(self.rng.normal(0, self.noise))

    def mixes(self, count: int):
        shares = self.rng.dirichlet([1.5] * len(TASKS), count) * 0.8 + 0.05
        return [dict(zip(TASKS, row, strict=True)) for row in shares]


@pytest.mark.parametrize("noise, least", [(0.003, 0.8), (0.02, 0.3)])
def test_unseen_mixes_are_ordered_and_intervals_hold(noise, least):
    # Mixes differ by about 0.02. Where seeds differ as much, the order is hard to tell, and the intervals know.
    order, held = [], []
    for seed in range(40):
        world = World(seed, noise=noise)
        mixes = [mix for mix in world.mixes(10) for _ in range(2)]
        surface = fit(mixes, [world.run(mix) for mix in mixes], size=SIZE)
        unseen = world.mixes(5)
        order.append(spearman([surface.predict(mix)[0] for mix in unseen], [world.true(mix) for mix in unseen]))
        for mix in unseen:
            _, low, high = surface.predict(mix)
            held.append(low <= world.run(mix) <= high)
    assert np.mean(order) >= least and np.mean(held) >= 0.9


def test_the_proposal_is_no_worse_than_the_best_mix_that_was_run():
    better = []
    for seed in range(30):
        world = World(seed)
        mixes = {str(n): mix for n, mix in enumerate(world.mixes(10))}
        found = proposal(mixes, {name: {s: world.run(mix) for s in range(2)} for name, mix in mixes.items()}, size=SIZE)
        assert sum(found["proposed"].values()) == pytest.approx(1)
        better.append(world.true(found["proposed"]) - world.true(mixes[found["best_run"]]))
    assert np.mean(better) > 0


def test_a_source_that_does_harm_stays_at_the_least_that_was_run():
    rng = np.random.default_rng(0)
    mixes = [dict(zip("ab", (s, 1 - s), strict=True)) for s in np.linspace(0.1, 0.9, 9)]
    scores = [0.5 + 0.1 * np.log1p(SIZE * mix["a"]) - 0.1 * np.log1p(SIZE * mix["b"]) for mix in mixes]
    surface = fit(mixes, scores + rng.normal(0, 1e-3, 9), size=SIZE)
    assert surface.best(least=0.1) == {"a": 0.9, "b": 0.1}


def test_too_few_mixes_give_no_surface():
    assert fit([{"a": 0.5, "b": 0.5}] * 6, [0.5] * 6, size=SIZE) is None
    mixes = {"x": {"a": 0.5, "b": 0.5}, "y": {"a": 0.2, "b": 0.8}, "z": {"a": 0.8, "b": 0.2}}
    assert proposal({"x": mixes["x"]}, {"x": {0: 0.5}}, size=SIZE) is None
    assert left_out(mixes, {name: [0.5] for name in mixes}, size=SIZE) is None
