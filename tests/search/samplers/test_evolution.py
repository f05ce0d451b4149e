"""The expected hypervolume improvement against chance, and proposals against all there are."""

import numpy as np
import pytest
from toy_lattice import Case
from toy_space import all_points

from adq.search.history import History
from adq.search.pareto import hypervolume
from adq.search.samplers.evolution import AdqSampler, Reached

SIZES = [(40, 3, 1), (50, 4, 6), (60, 5, 2), (30, 7, 1)]
DRAWS = 20_000


@pytest.mark.parametrize("std", [0.3, 1e-9])
def test_the_gain_in_one_cost_is_the_mean_hypervolume_added(std: float) -> None:
    """The metric is drawn at random, the hypervolume computed with and without the point."""
    rng = np.random.default_rng(0)
    costs, metric = rng.integers(20, 80, size=(12, 1)).astype(float), rng.random(12)
    dearest = np.array([90.0])
    reached = Reached(costs, metric, dearest, rng)
    corner = (-metric.min(), 90.0)
    asked = np.array([[5.0], [20.0], [33.3], [50.0], [89.0], [90.0]])
    means = np.array([0.2, 0.4, 0.9, 0.5, 1.1, 2.0])
    before = np.column_stack([-metric, costs])
    base = hypervolume(before, corner)
    for cost, mean, found in zip(
        asked, means, reached.gain(asked, means, np.full(6, std)), strict=True
    ):
        draws = rng.normal(mean, std, DRAWS if std > 1e-6 else 1)
        # the hypervolume is linear between the metrics told: a grid of them is exact enough
        grid = np.linspace(draws.min() - 1e-9, draws.max() + 1e-9, 2000)
        added = [hypervolume(np.vstack([before, [-m, cost[0]]]), corner) - base for m in grid]
        values = np.interp(draws, grid, added)
        error = values.std() / np.sqrt(len(values))
        assert found == pytest.approx(values.mean(), abs=4 * error + 2e-4 * base)


def test_the_gain_in_two_costs_is_the_hypervolume_added() -> None:
    rng = np.random.default_rng(0)
    costs, metric = rng.random((15, 2)), rng.random(15)
    reached = Reached(costs, metric, np.ones(2), rng)
    corner = (-metric.min(), *np.maximum(1.0, costs.max(axis=0)))
    before = np.column_stack([-metric, costs])
    # places are drawn above the least costs told: nothing is asked below them
    asked = costs.min(axis=0) + 0.5 * rng.random((20, 2))
    means = 0.8 + rng.random(20)
    found = reached.gain(asked, means, np.zeros(20))
    exact = [
        hypervolume(np.vstack([before, [-m, *c]]), corner) - hypervolume(before, corner)
        for m, c in zip(means, asked, strict=True)
    ]
    assert found == pytest.approx(exact, rel=0.06, abs=0.01)


@pytest.mark.parametrize("objectives", [("average_bits",), ("size_bytes", "bops")])
def test_a_proposal_is_among_the_best_of_all_points(objectives: tuple[str, ...]) -> None:
    """Every point of a space of 1,296 is rated; the proposal must be close to the best of them."""
    case = Case(SIZES, bits=(2, 3, 4), act=(4, 8), limited=objectives, limits={})
    everything = np.array([case.lattice.encode(point) for point in all_points(case.space)])
    rng = np.random.default_rng(3)
    history = History(4)
    for point in case.lattice.random(rng, 24):
        history.add(point, float(point.sum() + rng.random()))
    sampler = AdqSampler(case.lattice, objectives)
    ratios = []
    for seed in range(5):
        point = sampler.propose(history, [], np.random.default_rng(seed))
        draw = np.random.default_rng(seed)
        reached = sampler.reached(history.points, history.metric, draw)
        surrogate = sampler.surrogate(history.points, history.metric, reached, draw)
        taken = (everything[:, None] == history.points[None]).all(axis=-1).any(axis=1)
        fresh = everything[~taken]
        gains = reached.gain(sampler.costs(fresh), *surrogate.predict(fresh))
        own = gains[(fresh == point).all(axis=1)]
        ratios.append(own[0] / gains.max())
    assert min(ratios) > 0.9


def test_pending_points_are_believed_and_not_proposed_again() -> None:
    case = Case(SIZES, bits=(2, 3, 4), act=(4, 8), limits={})
    sampler = AdqSampler(case.lattice, ["average_bits"])
    history = History(4)
    for point in case.lattice.random(np.random.default_rng(3), 24):
        history.add(point, float(point.sum()))
    pending: list[np.ndarray] = []
    for _ in range(6):
        pending.append(sampler.propose(history, pending, np.random.default_rng(0)))
    assert len({tuple(point) for point in pending}) == 6
    totals = sampler.costs(np.stack(pending))[:, 0]
    assert len(set(totals)) > 3  # spread along the front, not around one place of it


def test_before_there_are_results_a_proposal_is_what_scores_make_of_costs() -> None:
    """Cheapest Lagrangian for scores a little off: with one layer that matters it gets most."""
    case = Case(SIZES, bits=(2, 3, 4), act=(8,), limits={})
    case.lattice.scores[:] = 0.0
    case.lattice.scores[2] = [9.0, 3.0, 0.0]
    sampler = AdqSampler(case.lattice, ["average_bits"])
    points = [sampler.propose(History(4), [], np.random.default_rng(s)) for s in range(60)]
    assert {tuple(p[[0, 1, 3]]) for p in points} == {(0, 0, 0)}
    assert {int(p[2]) for p in points} == {0, 1, 2}
