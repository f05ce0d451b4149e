"""The knapsack solver against an enumeration of every choice."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq.search.knapsack import budgets, solve, sweep, topped_up

Scores = list[npt.NDArray[np.float64]]
Terms = list[list[dict[str, int]]]
Pairs = dict[tuple[int, int], npt.NDArray[np.float64]]


def total(terms: Terms, choice: Sequence[int], name: str) -> int:
    return sum(terms[layer][option][name] for layer, option in enumerate(choice))


def within(terms: Terms, limits: Mapping[str, int], choice: Sequence[int]) -> bool:
    return all(total(terms, choice, name) <= limit for name, limit in limits.items())


def value(scores: Scores, choice: Sequence[int], pairs: Pairs | None = None) -> float:
    own = sum(float(scores[layer][option]) for layer, option in enumerate(choice))
    return own + sum(float(q[choice[i], choice[j]]) for (i, j), q in (pairs or {}).items())


def best_value(
    scores: Scores, terms: Terms, limits: Mapping[str, int], pairs: Pairs | None = None
) -> float | None:
    choices = product(*(range(len(s)) for s in scores))
    return min((value(scores, c, pairs) for c in choices if within(terms, limits, c)), default=None)


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


def smallest_of(terms: Terms, names: Sequence[str]) -> dict[str, int]:
    return {name: sum(min(o[name] for o in layer) for layer in terms) for name in names}


@pytest.mark.parametrize("seed", range(25))
def test_a_sweep_holds_the_optimum_of_each_of_its_limits(seed: int) -> None:
    scores, terms, limits = instance(seed)
    wanted = [limits, *budgets(limits, limits, smallest_of(terms, list(limits)), 4)]
    found = sweep(scores, terms, wanted)
    assert len({tuple(choice) for choice in found}) == len(found) <= len(wanted)
    assert all(within(terms, limits, choice) for choice in found)
    for at in wanted:
        best = best_value(scores, terms, at)
        if best is not None:  # several costs may have no common smallest choice
            assert any(
                within(terms, at, c) and value(scores, c) == pytest.approx(best, abs=1e-9)
                for c in found
            )
    best = best_value(scores, terms, limits)
    assert value(scores, found[0]) == pytest.approx(best, abs=1e-9)


def test_budgets_go_down_for_each_cost_alone_and_for_all_together() -> None:
    one = budgets({"a": 110}, {"a": 110}, {"a": 10}, 4)
    assert one == [{"a": 85}, {"a": 60}, {"a": 35}]
    two = budgets({"a": 110, "b": 8}, {"a": 110, "b": 8}, {"a": 10, "b": 4}, 2)
    assert two == [{"a": 60, "b": 8}, {"a": 110, "b": 6}, {"a": 60, "b": 6}]
    unlimited = budgets({"a": 110}, {"a": 110, "b": 8}, {"a": 10, "b": 4}, 2)
    assert unlimited == [{"a": 60}, {"a": 110, "b": 6}, {"a": 60, "b": 6}]
    assert budgets({"a": 110}, {"a": 110}, {"a": 10}, 1) == []


def test_a_sweep_finds_the_point_in_a_dent_of_the_front() -> None:
    """Costs 0, 5, 10 at losses 10, 6, 0: the middle lies above the line between the ends, where
    no weighted sum of cost and loss has its minimum."""
    terms = [[{"c": 0}, {"c": 5}, {"c": 10}]]
    wanted = [{"c": 10}, *budgets({"c": 10}, {"c": 10}, {"c": 0}, 5)]
    assert sweep([np.array([10.0, 6.0, 0.0])], terms, wanted) == [[2], [1], [0]]


small = st.integers(0, 6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.tuples(small, small), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 30),
    st.sampled_from([1e-12, 0.1, 1.0, 1e12]),
)
def test_one_cost_with_many_ties_is_solved_exactly(
    layers: list[list[tuple[int, int]]], limit: int, unit: float
) -> None:
    scores = [np.array([unit * s for s, _ in layer]) for layer in layers]
    terms = [[{"c": c} for _, c in layer] for layer in layers]
    chosen, best = solve(scores, terms, {"c": limit}), best_value(scores, terms, {"c": limit})
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert within(terms, {"c": limit}, chosen)
        assert value(scores, chosen) == pytest.approx(best, rel=1e-9, abs=1e-9 * unit)


@pytest.mark.parametrize("seed", range(60))
def test_scores_in_proportion_to_costs_fill_the_budget_as_well_as_can_be(seed: int) -> None:
    """Subset sums: the relaxation is the same for every choice and rules none out."""
    rng = np.random.default_rng(seed)
    terms = [[{"c": int(n * b)} for b in (2, 3, 5)] for n in rng.integers(1, 10**6, 8)]
    scores = [np.array([-1e-7 * option["c"] for option in layer]) for layer in terms]
    least, most = (sum(end(o["c"] for o in la) for la in terms) for end in (min, max))
    limit = int(rng.integers(least, most))
    chosen = solve(scores, terms, {"c": limit})
    assert chosen is not None
    assert within(terms, {"c": limit}, chosen)
    best = best_value(scores, terms, {"c": limit})
    assert value(scores, chosen) == pytest.approx(best, abs=1e-8)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("coupled", [False, True])
def test_floors_are_reached_by_the_best_choice_that_does(seed: int, coupled: bool) -> None:
    scores, terms, limits, pairs = coupled_instance(seed)
    floors = {name: int(0.8 * limit) for name, limit in limits.items()}
    choices = [
        c
        for c in product(range(3), repeat=len(terms))
        if within(terms, limits, c)
        and all(total(terms, c, name) >= floor for name, floor in floors.items())
    ]
    used = pairs if coupled else None
    chosen = solve(scores, terms, limits, used, floors=floors)
    assert (chosen is not None) == bool(choices)
    if chosen is not None:
        assert tuple(chosen) in choices
        best = min(value(scores, c, used) for c in choices)
        assert value(scores, chosen, used) == pytest.approx(best, abs=1e-8)


def test_a_floor_is_met_to_the_unit_whatever_the_costs() -> None:
    terms = [[{"c": 0}, {"c": 10**9}, {"c": 10**9 + 1}]]
    scores = [np.array([0.0, 1.0, 2.0])]
    assert solve(scores, terms, {"c": 2 * 10**9}, floors={"c": 10**9}) == [1]
    assert solve(scores, terms, {"c": 2 * 10**9}, floors={"c": 10**9 + 1}) == [2]
    assert solve(scores, terms, {"c": 2 * 10**9}, floors={"c": 10**9 + 2}) is None


@pytest.mark.parametrize("seed", range(10))
def test_without_time_a_solution_is_within_the_limits_and_pairs_make_none_worse(seed: int) -> None:
    scores, terms, limits, pairs = coupled_instance(seed)
    limits = {"a": limits["a"]}
    linear = solve(scores, terms, limits, seconds=0.0)
    assert (linear is None) == (best_value(scores, terms, limits) is None)
    hurried = solve(scores, terms, limits, pairs, seconds=0.0)
    assert (linear is None) == (hurried is None)
    if linear is not None and hurried is not None:
        assert within(terms, limits, linear)
        assert within(terms, limits, hurried)
        assert value(scores, hurried, pairs) <= value(scores, linear, pairs)
    in_time = solve(scores, terms, limits, pairs, seconds=60.0)
    assert in_time == solve(scores, terms, limits, pairs)


@pytest.mark.parametrize("seed", range(40))
def test_topping_up_ends_where_no_exchange_is_left(seed: int) -> None:
    scores, terms, limits, pairs = coupled_instance(seed)
    scores = [np.round(s) for s in scores]  # ties
    start = solve(scores, terms, limits)
    if start is None:
        return
    for used in (None, pairs):
        end = topped_up(scores, terms, limits, start, used)
        assert within(terms, limits, end)
        assert value(scores, end, used) <= value(scores, start, used) + 1e-12
        for name in limits:
            assert total(terms, end, name) >= total(terms, start, name)
        for i, o in product(range(len(terms)), range(3)):
            other = [*end[:i], o, *end[i + 1 :]]
            more = [total(terms, other, n) - total(terms, end, n) for n in limits]
            if within(terms, limits, other) and min(more) >= 0 and max(more) > 0:
                assert value(scores, other, used) > value(scores, end, used) - 1e-12


def coupled_instance(seed: int) -> tuple[Scores, Terms, dict[str, int], Pairs]:
    """4 or 5 layers of 3 options, 1 or 2 costs, limits that may be out of reach; about two thirds
    of the pairs add something of either sign, as large as the scores or a tenth of them."""
    rng = np.random.default_rng(seed)
    layers, names = int(rng.integers(4, 6)), "ab"[: rng.integers(1, 3)]
    terms = [
        [{name: int(rng.integers(1, 1000)) for name in names} for _ in range(3)]
        for _ in range(layers)
    ]
    pairs = {
        pair: rng.normal(size=(3, 3)) * rng.choice([0, 0.1, 1])
        for pair in combinations(range(layers), 2)
    }
    limits = {name: int(layers * rng.integers(100, 800)) for name in names}
    return [rng.normal(size=3) for _ in range(layers)], terms, limits, pairs


@pytest.mark.parametrize("seed", range(60))
def test_a_solution_with_pairs_is_the_best_of_all_choices(seed: int) -> None:
    scores, terms, limits, pairs = coupled_instance(seed)
    chosen, best = solve(scores, terms, limits, pairs), best_value(scores, terms, limits, pairs)
    assert (chosen is None) == (best is None)  # about half of them
    if chosen is not None:
        assert within(terms, limits, chosen)
        assert value(scores, chosen, pairs) == pytest.approx(best, abs=1e-8)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("unit", [1e-12, 3e-7, 1e12])
def test_the_unit_of_scores_and_pairs_does_not_matter(seed: int, unit: float) -> None:
    """Every other instance in tenths, where different choices often tie: 3e-7 · 0.1 + 3e-7 · 0.2
    is not 3e-7 · 0.3, but a tie still breaks the same way."""
    scores, terms, limits, pairs = coupled_instance(seed)
    if seed % 2:
        scores = [np.round(s, 1) for s in scores]
        pairs = {pair: np.round(q, 1) for pair, q in pairs.items()}
    scaled = solve(
        [s * unit for s in scores], terms, limits, {pair: q * unit for pair, q in pairs.items()}
    )
    assert scaled == solve(scores, terms, limits, pairs)


def test_pairs_change_the_choice() -> None:
    """One of three layers may get many bits. By themselves the middle one, which loses most; but
    errors of the outer two add up, and those of the middle one make up for either."""
    scores = [np.array([3.0, 0.0]), np.array([3.5, 0.0]), np.array([3.1, 0.0])]
    terms = [[{"c": 1}, {"c": 2}]] * 3
    both_low = np.array([[1.0, 0.0], [0.0, 0.0]])
    pairs = {(0, 1): -both_low, (0, 2): both_low, (1, 2): -both_low}
    assert solve(scores, terms, {"c": 4}) == [0, 1, 0]  # 6.1; 7.1 with pairs
    assert solve(scores, terms, {"c": 4}, pairs) == [0, 0, 1]  # 6.5 − 1


@pytest.mark.parametrize("constant", [0.0, -3.0])
def test_pairs_that_prefer_nothing_change_nothing(constant: float) -> None:
    scores, terms, limits = instance(0)
    pairs = {
        (i, j): np.full((len(scores[i]), len(scores[j])), constant)
        for i, j in combinations(range(len(scores)), 2)
    }
    assert solve(scores, terms, limits, pairs) == solve(scores, terms, limits)


def test_a_sweep_holds_the_quadratic_optimum_of_each_of_its_limits() -> None:
    scores, terms, limits, pairs = coupled_instance(41)
    wanted = [limits, *budgets(limits, limits, smallest_of(terms, list(limits)), 3)]
    found = sweep(scores, terms, wanted, pairs)
    for at in wanted:
        best = best_value(scores, terms, at, pairs)
        assert best is None or any(
            within(terms, at, c) and value(scores, c, pairs) == pytest.approx(best, abs=1e-8)
            for c in found
        )


def best_by_states(scores: Scores, terms: Terms, limit: int) -> float:
    """Layer by layer, all (cost, score) that no cheaper choice of the layers so far beats."""
    cheapest = [min(o["c"] for o in layer) for layer in terms]
    to_come = list(accumulate(cheapest[::-1], initial=0))[-2::-1]
    states = [(0, 0.0)]
    for row, layer, rest in zip(scores, terms, to_come, strict=True):
        reached = sorted(
            (cost + option["c"], score + float(s))
            for cost, score in states
            for s, option in zip(row, layer, strict=True)
            if cost + option["c"] + rest <= limit
        )
        states, least = [], np.inf
        for cost, score in reached:
            if score < least:
                states.append((cost, score))
                least = score
    return states[-1][1]


@pytest.mark.parametrize("spread", [1, 5])
@pytest.mark.parametrize("average_bits", [2.5, 4.0, 5.5])
def test_the_best_of_20_layers_of_tiny_scores_fills_the_budget(
    spread: int, average_bits: float
) -> None:
    """Scores of a billionth and, over `spread` decades, below; costs in bits of 100 to 3000
    weights. With that many layers some choice comes close to any budget, and the best one does."""
    rng = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 5, 6, 8])
    weights = rng.integers(100, 3000, 20)
    terms = [[{"c": int(b * n)} for b in bits] for n in weights]
    scores = [1e-9 * 10 ** rng.uniform(-spread, 0) * 4.0**-bits for _ in weights]
    limit = int(average_bits * weights.sum())
    chosen = solve(scores, terms, {"c": limit})
    assert chosen is not None
    assert limit - 0.01 * weights.sum() < total(terms, chosen, "c") <= limit
    best = best_by_states(scores, terms, limit)
    assert value(scores, chosen) == pytest.approx(best, rel=1e-6, abs=0)
