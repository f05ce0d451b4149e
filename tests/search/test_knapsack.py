"""The knapsack solver against an enumeration of every choice."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from adq.search.knapsack import solve, sweep

Scores = list[npt.NDArray[np.float64]]
Terms = list[list[dict[str, int]]]


def total(terms: Terms, choice: Sequence[int], name: str) -> int:
    return sum(terms[layer][option][name] for layer, option in enumerate(choice))


def within(terms: Terms, limits: Mapping[str, int], choice: Sequence[int]) -> bool:
    return all(total(terms, choice, name) <= limit for name, limit in limits.items())


def value(scores: Scores, choice: Sequence[int]) -> float:
    return sum(float(scores[layer][option]) for layer, option in enumerate(choice))


def best_value(scores: Scores, terms: Terms, limits: Mapping[str, int]) -> float | None:
    choices = product(*(range(len(s)) for s in scores))
    return min((value(scores, c) for c in choices if within(terms, limits, c)), default=None)


def instance(seed: int) -> tuple[Scores, Terms, dict[str, int]]:
    """Up to 6 layers of up to 4 options, 1 to 3 costs of up to 10^9, limits that some choice meets
    exactly. In every other instance the costs lie within 4 of each other, which is far less than
    the solver's tolerance of a millionth."""
    rng = np.random.default_rng(seed)
    names = "abc"[: rng.integers(1, 4)]
    sizes = rng.integers(1, 5, size=rng.integers(1, 7))
    largest = int(10 ** rng.integers(0, 10))

    def cost() -> int:
        return largest + int(rng.integers(5)) if seed % 2 else int(rng.integers(0, largest + 1))

    terms = [[{name: cost() for name in names} for _ in range(size)] for size in sizes]
    scores = [rng.normal(size=size) for size in sizes]
    reached = [int(rng.integers(size)) for size in sizes]
    return scores, terms, {name: total(terms, reached, name) for name in names}


@pytest.mark.parametrize("seed", range(150))
def test_a_solution_is_the_best_of_all_choices_and_within_the_limits(seed: int) -> None:
    scores, terms, limits = instance(seed)
    chosen = solve(scores, terms, limits)
    assert chosen is not None  # some choice meets the limits exactly
    assert within(terms, limits, chosen)
    best = best_value(scores, terms, limits)
    # the solver stops at 1e-6 of an objective scaled to 1e4
    assert value(scores, chosen) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_unit_of_the_scores_does_not_matter(seed: int) -> None:
    scores, terms, limits = instance(seed)
    solutions = [solve([s * u for s in scores], terms, limits) for u in (1e-12, 1.0, 1e12)]
    assert solutions[0] == solutions[1] == solutions[2]


@pytest.mark.parametrize("seed", range(20))
def test_a_constant_added_to_a_layers_scores_changes_nothing(seed: int) -> None:
    scores, terms, limits = instance(seed)
    shifted = [s - 7.0 * layer for layer, s in enumerate(scores)]
    assert solve(shifted, terms, limits) == solve(scores, terms, limits)


@pytest.mark.parametrize("size", [1, 10**3, 10**9])
def test_a_budget_is_met_exactly_and_never_by_one_too_much(size: int) -> None:
    """Two options, the dear one better: it is taken at its cost, and not at one less."""
    scores = [np.array([1.0, 0.0]), np.array([1.0, 0.0])]
    terms = [[{"c": 0}, {"c": size}], [{"c": 0}, {"c": size}]]
    assert solve(scores, terms, {"c": 2 * size}) == [1, 1]
    assert solve(scores, terms, {"c": 2 * size - 1}) in ([0, 1], [1, 0])
    assert solve(scores, terms, {"c": size - 1}) == [0, 0]


def test_no_solution_is_none() -> None:
    terms = [[{"c": 10**9}, {"c": 10**9 + 1}], [{"c": 3}]]
    scores = [np.zeros(2), np.zeros(1)]
    assert solve(scores, terms, {"c": 10**9 + 2}) is None
    assert solve(scores, terms, {"c": 10**9 + 3}) == [0, 0]


def test_without_limits_the_best_of_each_layer_is_taken() -> None:
    assert solve([np.array([3.0, -1.0, 2.0]), np.array([0.0, 1.0])], [[{}] * 3, [{}] * 2], {}) == [
        1,
        0,
    ]


def test_equal_scores_give_some_choice_within_the_limits() -> None:
    terms = [[{"c": 1}, {"c": 2}, {"c": 3}] for _ in range(4)]
    chosen = solve([np.full(3, 5.0)] * 4, terms, {"c": 7})
    assert chosen is not None
    assert within(terms, {"c": 7}, chosen)


@pytest.mark.parametrize("seed", range(25))
def test_a_sweep_holds_the_optimum_of_each_of_its_limits(seed: int) -> None:
    scores, terms, limits = instance(seed)
    smallest = {name: sum(min(o[name] for o in layer) for layer in terms) for name in limits}
    points = 5
    found = sweep(scores, terms, limits, smallest, points)
    assert len({tuple(choice) for choice in found}) == len(found) <= points
    assert all(within(terms, limits, choice) for choice in found)
    optima = []
    for i in range(points, 0, -1):
        at = {
            name: smallest[name] + (limit - smallest[name]) * i // points
            for name, limit in limits.items()
        }
        best = best_value(scores, terms, at)
        if best is not None:  # several costs may have no common smallest choice
            optima.append(best)
            # the first that is as good: two limits may share a solution
            assert any(
                within(terms, at, c) and value(scores, c) == pytest.approx(best, abs=1e-9)
                for c in found
            )
    assert value(scores, found[0]) == pytest.approx(optima[0], abs=1e-9)
    assert [value(scores, c) for c in found] == sorted(value(scores, c) for c in found)


def test_a_sweep_finds_the_point_in_a_dent_of_the_front() -> None:
    """Costs 0, 5, 10 at losses 10, 6, 0: the middle lies above the line between the ends, where
    no weighted sum of cost and loss has its minimum."""
    terms = [[{"c": 0}, {"c": 5}, {"c": 10}]]
    found = sweep([np.array([10.0, 6.0, 0.0])], terms, {"c": 10}, {"c": 0}, 5)
    assert found == [[2], [1], [0]]
