"""The space as arrays, against bit vectors and enumeration."""

import numpy as np
import pytest
import tiny_task
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_lattice import Case, cases
from toy_space import all_points, smallest

from adq.search.config import StudyConfig
from adq.search.lattice import Lattice, key
from adq.search.problem import make_problem
from adq.search.space import act_order, option_terms


@settings(max_examples=25, deadline=None)
@given(cases)
def test_sums_and_limits_are_those_of_bit_vectors(case: Case) -> None:
    lattice, points = case.lattice, list(all_points(case.space))
    encoded = np.stack([lattice.encode(point) for point in points])
    assert [lattice.decode(row) for row in encoded] == points
    assert len({key(row) for row in encoded}) == len(points)
    totals, fits, expected = (
        lattice.totals(encoded),
        lattice.fits(encoded),
        lattice.expected(encoded),
    )
    assert totals.dtype == np.int64
    for i, point in enumerate(points):
        by_bits = case.costs.totals(case.space.bit_vector(point))
        assert dict(zip(lattice.names, totals[i].tolist(), strict=True)) == by_bits
        assert fits[i] == all(by_bits[name] <= limit for name, limit in case.limits.items())
        rows = zip(case.scores, case.space.groups, point, strict=True)
        slow = sum(float(row[group.options.index(option)]) for row, group, option in rows)
        assert expected[i] == pytest.approx(slow, rel=1e-12, abs=1e-12)
    one = encoded[-1]  # a single point's are numbers
    assert lattice.totals(one).tolist() == totals[-1].tolist()
    assert lattice.fits(one) == fits[-1]
    assert lattice.expected(one) == expected[-1]


@settings(max_examples=25, deadline=None)
@given(cases)
def test_repair_leaves_a_fitting_point_alone_and_never_raises_bits(case: Case) -> None:
    for point in all_points(case.space):
        encoded = case.lattice.encode(point)
        repaired = case.lattice.decode(case.lattice.repair(encoded))
        assert case.lattice.decode(encoded) == point  # a copy was repaired
        assert case.fits(repaired)
        if case.fits(point):
            assert repaired == point
        for (w, a), (new_w, new_a) in zip(point, repaired, strict=True):
            assert new_w <= w
            assert act_order(new_a) <= act_order(a)


def repaired(case: Case, scores: list[list[float]]) -> list[tuple[int, int]]:
    """The point of the most bits, repaired with these scores."""
    rows = [np.array(row) for row in scores]
    lattice = Lattice(case.space, case.costs, case.limits, rows)
    return lattice.decode(lattice.repair(lattice.sizes - 1))


def test_repair_takes_the_step_with_the_least_loss_per_cost_saved() -> None:
    """Two layers of 12 weights; 1 bit too much. Lowering the first costs a loss of 3, the second
    of 1, so the second goes; with the losses swapped, the first."""
    limits = {"average_bits": 12 * 3 + 12 * 2 + 3}
    case = Case([(4, 3, 1), (3, 4, 1), (1, 1, 1)], (2, 3), limits=limits)
    assert repaired(case, [[3, 0], [1, 0], [9, 0]]) == [(3, 8), (2, 8), (3, 8)]
    assert repaired(case, [[1, 0], [3, 0], [9, 0]]) == [(2, 8), (3, 8), (3, 8)]


def test_costs_over_their_limits_count_in_parts_of_those_limits() -> None:
    """24 bits of 80 and 192 bit operations of 3470 are more than 3 bits and 960 operations."""
    limits = {"average_bits": 80, "bops": 3470}
    case = Case([(4, 6, 1), (3, 1, 40), (1, 1, 1)], (2, 3), limits=limits)
    assert repaired(case, [[1, 0], [1, 0], [9, 0]]) == [(2, 8), (3, 8), (3, 8)]


def test_a_size_limit_is_met_where_an_fp32_input_takes_fewer_bytes_than_a_quantized_one() -> None:
    # repairing (2, 8) finds no lower bits to go to: only the FP32 input is smaller
    task = tiny_task.make_task()
    config = StudyConfig(task="t", budget_bits=4.0, bits=(2, 4), act_bits=(0, 8))
    problem = make_problem(config, task)
    least = sum(
        min(terms["size_bytes"] for terms in group)
        for group in option_terms(problem.space, problem.costs)
    )
    scores = [np.zeros(len(group.options)) for group in problem.space.groups]
    lattice = Lattice(problem.space, problem.costs, {"size_bytes": least}, scores)
    found = lattice.decode(lattice.repair(lattice.encode(smallest(problem.space))))
    assert problem.costs.totals(problem.space.bit_vector(found))["size_bytes"] == least


@settings(max_examples=25, deadline=None)
@given(cases, st.integers(0, 1000))
def test_a_fresh_point_is_found_as_long_as_there_is_one(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fitting = case.fitting()
    taken: set[bytes] = set()
    found = []
    for _ in fitting:
        point = case.lattice.any_fresh(taken, rng)
        assert point is not None
        taken.add(key(point))
        found.append(case.lattice.decode(point))
    assert sorted(map(str, found)) == sorted(map(str, fitting))
    assert case.lattice.any_fresh(taken, rng) is None


def test_the_last_point_of_a_tight_budget_is_found_among_a_great_many_that_do_not_fit() -> None:
    """Of 4^24 points 25 fit, and 24 are taken."""
    limits = {"average_bits": 24 * 6 * 2 + 6}
    case = Case([(3, 2, 1)] * 24, (2, 3, 4, 8), limits=limits)
    steps = np.concatenate([np.eye(24, dtype=np.intp), np.zeros((1, 24), dtype=np.intp)])
    assert case.lattice.fits(steps).all()
    taken = {key(step) for i, step in enumerate(steps) if i != 17}
    found = case.lattice.any_fresh(taken, np.random.default_rng(0))
    assert found is not None
    np.testing.assert_array_equal(found, steps[17])


@pytest.mark.parametrize("seed", range(8))
def test_two_limits_that_pull_apart_are_both_met(seed: int) -> None:
    """FP32 inputs take no bytes and the most bit operations: what one limit wants lowered the other
    wants raised. The limits are what one point of 6^24 takes, and a tenth more."""
    layers = [(40 + 7 * i, 3, 50 + 90 * (i % 5)) for i in range(24)]
    drawn = Case(layers, (2, 4, 8), (8, 0), limits={})
    point = drawn.lattice.random(np.random.default_rng(seed), 1)[0]
    totals = dict(zip(drawn.lattice.names, drawn.lattice.totals(point).tolist(), strict=True))
    limits = {name: totals[name] * 11 // 10 for name in ("size_bytes", "bops")}
    lattice = Case(layers, (2, 4, 8), (8, 0), limits=limits).lattice
    assert lattice.fits(lattice.anchor)
    repaired = [lattice.repair(p) for p in lattice.random(np.random.default_rng(1), 40)]
    assert lattice.fits(np.stack(repaired)).all()
    assert len({key(p) for p in repaired}) > 30
    taken = {key(p) for p in repaired}
    for _ in range(5):
        fresh = lattice.any_fresh(taken, np.random.default_rng(2))
        assert fresh is not None
        assert lattice.fits(fresh)
        assert key(fresh) not in taken
        taken.add(key(fresh))


def test_a_lattice_without_a_point_says_so() -> None:
    lattice = Case([(4, 3, 1)] * 3, (2, 4), limits={"average_bits": 1}).lattice
    with pytest.raises(ValueError, match="no point"):
        lattice.repair(np.ones(3, dtype=np.intp))


def test_blind_draws_take_every_option_equally_often() -> None:
    """3 options in a tied group, 1 in a pinned one: 3000 draws give 1000 ± 26 of each."""
    case = Case([(2, 3, 1)] * 4, (2, 3, 4), ties=[("l1", "l2")], first_last=8)
    points = case.lattice.random(np.random.default_rng(0), 3000)
    assert points.shape == (3000, 3)
    for group, size in enumerate(case.lattice.sizes):
        counts = np.bincount(points[:, group])
        assert len(counts) == size
        assert np.abs(counts - 3000 / size).max() < 4 * 26
