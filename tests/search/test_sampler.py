"""The sampler under Optuna in memory: every proposal recomputed by hand."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import optuna
import pytest
import tiny_task
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from toy_space import (
    Sizes,
    all_points,
    fits_by_hand,
    smallest,
    spread,
    totals_by_hand,
    toy_sensitivity,
    toy_space,
)

from adq.search.config import StudyConfig
from adq.search.problem import make_problem
from adq.search.sampler import BudgetSampler
from adq.search.seeds import Point, make_seeds, option_scores
from adq.search.space import act_order, option_terms

SIZES = [(4, 3, 1), (5, 4, 6), (6, 5, 2), (3, 7, 1)]

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Case:
    """A space, limits that one of its points meets exactly, and samplers for it."""

    def __init__(
        self,
        sizes: Sizes,
        bits: Sequence[int],
        act: Sequence[int],
        costs: Sequence[str],
        seed: int = 0,
        seeds: int = 3,
        ties: Sequence[Sequence[str]] = (),
    ) -> None:
        rng = np.random.default_rng(seed)
        self.sizes, self.seed = sizes, seed
        self.space, self.costs = toy_space(sizes, bits, act, first_last_bits=0, ties=ties)
        reached = [group.options[rng.integers(len(group.options))] for group in self.space.groups]
        # the smallest point always fits: a study checks that before it starts
        ends = [self.totals(point) for point in (reached, smallest(self.space))]
        self.limits = {name: max(end[name] for end in ends) for name in costs}
        found = toy_sensitivity(self.space, rng, act_bits=[b for b in act if b])
        self.scores = option_scores(self.space, found.weight, found.act)
        self.seeds: list[Point] = []
        if seeds:
            self.seeds = make_seeds(self.space, self.costs, self.limits, [found], seeds)

    def sampler(self, seed: int | None = None) -> BudgetSampler:
        seed = self.seed if seed is None else seed
        return BudgetSampler(self.space, self.costs, self.limits, self.scores, self.seeds, seed)

    def totals(self, point: Point) -> dict[str, int]:
        return totals_by_hand(self.sizes, spread(self.space, point))

    def fits(self, point: Point) -> bool:
        return fits_by_hand(self.sizes, self.limits, spread(self.space, point))

    def fitting(self) -> list[Point]:
        return [p for p in all_points(self.space) if self.fits(p)]

    def ask(self, study: optuna.Study) -> tuple[optuna.Trial, Point]:
        trial = study.ask()
        for name, distribution in self.space.distributions().items():
            trial.suggest_categorical(name, distribution.choices)
        return trial, self.space.decode(trial.params)

    def tell(self, study: optuna.Study, trial: optuna.Trial, point: Point) -> None:
        """More bits are better, with a little noise that follows from the point."""
        noise = hash(tuple(point)) % 97 / 970
        total = self.totals(point)["average_bits"]
        study.tell(trial, [sum(w for w, _ in point) + noise, float(total)])

    def proposals(
        self, count: int, sampler: Callable[[], BudgetSampler] | None = None
    ) -> list[Point]:
        """What `count` trials propose; with `sampler`, a new one for each trial."""
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=self.sampler())
        points = []
        for _ in range(count):
            if sampler is not None:
                study.sampler = sampler()
            trial, point = self.ask(study)
            self.tell(study, trial, point)
            points.append(point)
        return points


layer_sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
bit_choices = st.lists(st.integers(2, 8), min_size=2, max_size=3, unique=True)
act_choices = st.lists(st.sampled_from([0, 2, 4, 8]), min_size=1, max_size=2, unique=True)
cost_names = st.lists(
    st.sampled_from(["average_bits", "size_bytes", "bops"]), min_size=1, max_size=3, unique=True
)
cases = st.builds(
    Case,
    st.lists(layer_sizes, min_size=3, max_size=4),
    bit_choices,
    act_choices,
    cost_names,
    st.integers(0, 1000),
    st.integers(0, 4),
    st.sampled_from([(), [("l0", "l2")], [("l0", "l1", "l2")]]),
)


@settings(max_examples=25, deadline=None)
@given(cases)
def test_seeds_come_first_and_every_proposal_fits_and_is_new(case: Case) -> None:
    fitting = case.fitting()
    points = case.proposals(min(len(fitting), len(case.seeds) + 8))
    assert points[: len(case.seeds)] == case.seeds[: len(points)]
    assert all(point in fitting for point in points)
    assert len({str(p) for p in points}) == len(points)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_every_fitting_point_is_proposed_once_and_then_one_again(seed: int, seeds: int) -> None:
    bits, act = ((2, 3, 8), (8,)) if seed % 2 else ((2, 8), (4, 8))
    case = Case(SIZES[:3], bits, act, ["size_bytes"], seed, seeds)
    fitting = case.fitting()
    points = case.proposals(len(fitting) + 1)
    assert sorted(map(str, points[:-1])) == sorted(map(str, fitting))
    assert points[-1] in fitting


def test_tied_layers_have_the_same_bits_in_every_proposal() -> None:
    ties = [("l0", "l3"), ("l1", "l2")]
    case = Case(SIZES, (2, 3, 4), (4, 8), ["average_bits", "bops"], seed=2, ties=ties)
    fitting = case.fitting()
    assert 10 < len(fitting) < 6 * 6
    points = case.proposals(len(fitting))  # seeds, TPE, repaired and mutated ones, the last left
    assert sorted(map(str, points)) == sorted(map(str, fitting))
    for vector in map(case.space.bit_vector, points):
        for one, other in ties:
            assert vector.weight[one] == vector.weight[other]
            assert vector.act[one] == vector.act[other]


def test_the_only_points_of_a_tight_budget_in_a_large_space_are_all_found() -> None:
    """Of 4^12 points 13 fit: the smallest, and one step up in any one layer."""
    case = Case([(3, 2, 1)] * 12, (2, 3, 4, 8), (8,), ["average_bits"], seeds=0)
    case.limits = {"average_bits": 12 * 6 * 2 + 6}
    points = case.proposals(13)
    steps = [[(3 if i == up else 2, 8) for i in range(12)] for up in range(13)]
    assert sorted(map(str, points)) == sorted(map(str, steps))


def test_the_last_point_of_a_tight_budget_is_found_among_a_great_many_that_do_not_fit() -> None:
    """Of 4^24 points 25 fit, and 24 are taken."""
    case = Case([(3, 2, 1)] * 24, (2, 3, 4, 8), (8,), ["average_bits"], seeds=0)
    case.limits = {"average_bits": 24 * 6 * 2 + 6}
    steps = [[(3 if i == up else 2, 8) for i in range(24)] for up in range(25)]
    taken = {str(step) for step in steps if step != steps[17]}
    found = case.sampler().fresh(steps[3], taken, np.random.default_rng(0))
    assert found == steps[17]


@pytest.mark.parametrize("seed", range(3))
def test_proposals_follow_from_seed_number_and_history_alone(seed: int) -> None:
    case = Case(SIZES, (2, 3, 4), (4, 8), ["average_bits", "bops"], seed)
    kept = case.proposals(14)
    assert case.proposals(14, sampler=case.sampler) == kept

    # a study that is put together anew from the told trials goes on in the same way
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=case.sampler())
    for point in kept[:9]:
        trial, proposed = case.ask(study)
        assert proposed == point
        case.tell(study, trial, point)
    copy = optuna.create_study(directions=["maximize", "minimize"], sampler=case.sampler())
    copy.add_trials(study.get_trials())
    for point in kept[9:]:
        trial, proposed = case.ask(copy)
        assert proposed == point
        case.tell(copy, trial, point)


def test_another_history_gives_other_proposals() -> None:
    case = Case(SIZES, (2, 3, 4, 6, 8), (8,), ["average_bits"], seed=5)
    kept = case.proposals(16)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=case.sampler())
    points = []
    for _ in range(16):
        trial, point = case.ask(study)
        study.tell(trial, [-sum(w for w, _ in point), 0.0])  # now fewer bits are better
        points.append(point)
    assert points[: len(case.seeds)] == kept[: len(case.seeds)]
    assert points != kept


def test_another_seed_gives_other_proposals() -> None:
    case = Case(SIZES, (2, 3, 4, 6, 8), (8,), ["average_bits"], seed=5)
    one = case.proposals(12)
    other = case.proposals(12, sampler=lambda: case.sampler(seed=6))
    assert one[: len(case.seeds)] == other[: len(case.seeds)]
    assert one[len(case.seeds) :] != other[len(case.seeds) :]


def test_later_proposals_learn_from_the_told_ones() -> None:
    """Only the second layer's bits matter to the metric: proposals come to give it more than the
    4.6 bits of blind draws, with a standard deviation of 2.2 / sqrt(40) for the mean of forty."""
    case = Case([(2, 3, 1)] * 6, (2, 3, 4, 6, 8), (8,), ["average_bits"], seeds=0)
    case.limits = {"average_bits": 6 * 6 * 8}
    study = optuna.create_study(directions=["maximize"], sampler=case.sampler())
    seconds = []
    for _ in range(60):
        trial, point = case.ask(study)
        seconds.append(point[1][0])
        study.tell(trial, float(point[1][0]))
    assert np.mean(seconds[20:]) > 4.6 + 5 * 2.2 / 40**0.5


def test_failed_trials_do_not_stop_the_proposals() -> None:
    case = Case(SIZES, (2, 3, 4), (8,), ["average_bits"], seed=1)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=case.sampler())
    points = []
    for _ in range(12):
        trial, point = case.ask(study)
        study.tell(trial, state=TrialState.FAIL)
        points.append(point)
    assert len({str(p) for p in points}) == 12
    assert all(fits_by_hand(SIZES, case.limits, p) for p in points)


def test_draws_without_knowledge_are_independent() -> None:
    """With nothing told, two draws of 5 options agree in a fifth of 20 layers: 16 ± 1.8 differ."""
    case = Case([(2, 3, 1)] * 20, (2, 3, 4, 6, 8), (8,), ["average_bits"], seeds=0)
    case.limits = {"average_bits": 20 * 6 * 8}
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=case.sampler())
    points = []
    for _ in range(10):
        trial, point = case.ask(study)
        study.tell(trial, state=TrialState.FAIL)
        points.append(point)
    for one, other in pairwise(points):
        assert sum(a != b for a, b in zip(one, other, strict=True)) > 16 - 4 * 1.8


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(0, 10**6))
def test_repair_leaves_a_fitting_point_alone_and_never_raises_bits(case: Case, pick: int) -> None:
    points = list(all_points(case.space))
    point = points[pick % len(points)]
    repaired = case.sampler().repair(point)
    assert case.fits(repaired)
    if case.fits(point):
        assert repaired == point
    for (w, a), (new_w, new_a) in zip(point, repaired, strict=True):
        assert new_w <= w
        assert act_order(new_a) <= act_order(a)


def test_repair_takes_the_step_with_the_least_loss_per_cost_saved() -> None:
    """Two layers of 12 weights; 1 bit too much. Lowering the first costs a loss of 3, the second
    of 1, so the second goes; with the losses swapped, the first."""
    sizes = [(4, 3, 1), (3, 4, 1), (1, 1, 1)]
    case = Case(sizes, (2, 3), (8,), ["average_bits"], seeds=0)
    case.limits = {"average_bits": 12 * 3 + 12 * 2 + 3}
    case.scores = [np.array([3.0, 0.0]), np.array([1.0, 0.0]), np.array([9.0, 0.0])]
    full = [(3, 8)] * 3
    assert case.sampler().repair(full) == [(3, 8), (2, 8), (3, 8)]
    case.scores = case.scores[1::-1] + case.scores[2:]
    assert case.sampler().repair(full) == [(2, 8), (3, 8), (3, 8)]


def test_costs_over_their_limits_count_in_parts_of_those_limits() -> None:
    """24 bits of 80 and 192 bit operations of 3470 are more than 3 bits and 960 operations."""
    sizes = [(4, 6, 1), (3, 1, 40), (1, 1, 1)]
    case = Case(sizes, (2, 3), (8,), ["average_bits", "bops"], seeds=0)
    case.limits = {"average_bits": 80, "bops": 3470}
    case.scores = [np.array([1.0, 0.0]), np.array([1.0, 0.0]), np.array([9.0, 0.0])]
    assert case.sampler().repair([(3, 8)] * 3) == [(2, 8), (3, 8), (3, 8)]


def test_a_parameter_of_another_space_is_refused() -> None:
    case = Case(SIZES, (2, 3), (8,), ["average_bits"])
    study = optuna.create_study(sampler=case.sampler())
    with pytest.raises(AssertionError, match="extra is not a parameter of this space"):
        study.ask().suggest_float("extra", 0, 1)


def test_a_size_limit_is_met_where_an_fp32_input_takes_fewer_bytes_than_a_quantized_one() -> None:
    # repairing (2, 8) finds no lower bits to go to: only the FP32 input is smaller
    task = tiny_task.make_task()
    config = StudyConfig(task="t", budget_bits=4.0, bits=(2, 4), act_bits=(0, 8))
    problem = make_problem(config, task)
    least = sum(
        min(terms["size_bytes"] for terms in group)
        for group in option_terms(problem.space, problem.costs)
    )
    limits = {"size_bytes": least}
    scores = [np.zeros(len(group.options)) for group in problem.space.groups]
    sampler = BudgetSampler(problem.space, problem.costs, limits, scores, [], 0)
    found = sampler.repair(smallest(problem.space))
    assert problem.costs.totals(problem.space.bit_vector(found))["size_bytes"] == least
