"""Seeds: the score of an option by a slow loop; seeds that fit, differ and are optimal; the order
in which a front takes shape, with every gain computed anew."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_space import (
    all_points,
    fits_by_hand,
    spread,
    totals_by_hand,
    toy_sensitivity,
    toy_space,
)

from adq.proxies.base import Interactions, Sensitivity, Table
from adq.search.pareto import hypervolume
from adq.search.seeds import (
    INPUT_WEIGHT,
    by_hypervolume,
    combined_scores,
    fits,
    make_seeds,
    option_scores,
)
from adq.search.space import Option, Space

SIZES = [(4, 3, 1), (5, 4, 6), (6, 5, 2), (3, 7, 1)]


def repaired(table: Table, layer: str, bits: int) -> float:
    """The largest score of these bits and of all higher ones, and at least zero."""
    row = table.score[table.layers.index(layer)]
    return max(0.0, *(s for s, b in zip(row, table.bits, strict=True) if b >= bits))


@pytest.mark.parametrize("act", [(8,), (4, 8), (2, 8, 0)])
def test_an_options_score_adds_its_weight_and_its_input(act: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    space, _ = toy_space(SIZES, (2, 3, 4), act, 8)
    act_bits = sorted({b for group in space.groups for b in group.act} - {0})
    found = toy_sensitivity(space, rng, act_bits=act_bits)
    scores = option_scores(space, found.weight, found.act)
    for group, row in zip(space.groups, scores, strict=True):
        assert row.shape == (len(group.options),)
        for (w, a), score in zip(group.options, row, strict=True):
            expected = repaired(found.weight, group.name, w)
            if a:
                assert found.act is not None
                expected += INPUT_WEIGHT * repaired(found.act, group.name, a)
            assert score == expected


def test_a_table_of_any_order_of_bits_is_read_by_its_bits() -> None:
    space, _ = toy_space(SIZES, (2, 3, 4))
    names = space.layers
    rows = np.arange(12.0).reshape(4, 3)
    table = Table(names[::-1], (4, 2, 3), rows, rows)
    scores = option_scores(space, table, None)
    for group, row in zip(space.groups, scores, strict=True):
        assert row.tolist() == [repaired(table, group.name, w) for w, _ in group.options]


def test_more_bits_never_score_worse_after_repair() -> None:
    space, _ = toy_space(SIZES, (2, 3, 4, 8))
    found = toy_sensitivity(space, np.random.default_rng(1))
    assert (np.diff(found.weight.score) > 0).any()  # the table itself says so somewhere
    for row in option_scores(space, found.weight, None):
        assert (np.diff(row) <= 0).all()
        assert (row >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_scores_combine_as_the_mean_of_proxies_of_one_size(scale: float) -> None:
    rng = np.random.default_rng(2)
    space, _ = toy_space(SIZES, (2, 3), (4, 8))
    first, second = toy_sensitivity(space, rng), toy_sensitivity(space, rng, act_bits=(4, 8))
    grown = Table(second.weight.layers, second.weight.bits, scale * second.weight.score,
                  second.weight.stderr)  # fmt: skip
    assert second.act is not None
    act = Table(second.act.layers, second.act.bits, scale * second.act.score, second.act.stderr)
    second = replace(second, weight=grown, act=act)
    row = combined_scores(space, [first, second])
    sizes = [sum(repaired(s.weight, name, 2) for name in space.layers) for s in (first, second)]
    common = math.sqrt(sizes[0] * sizes[1])
    for group, scores in zip(space.groups, row, strict=True):
        for (w, a), score in zip(group.options, scores, strict=True):
            of_weights = [
                repaired(s.weight, group.name, w) * common / size
                for s, size in zip((first, second), sizes, strict=True)
            ]
            of_input = INPUT_WEIGHT * repaired(act, group.name, a) * common / sizes[1]
            assert score == pytest.approx(sum(of_weights) / 2 + of_input)


def test_pairs_of_layers_change_what_is_chosen_and_one_that_gains_is_taken() -> None:
    space, costs = toy_space(SIZES, (2, 4))
    names = space.layers
    flat = Table(names, (2, 4), np.tile([1.0, 0.0], (len(names), 1)), np.zeros((len(names), 2)))
    alone = Sensitivity("loss", flat, None, 2, 0.0)
    value = np.zeros((len(names), 2) * 2)
    value[0, 0, 1, 0] = value[1, 0, 0, 0] = -1.5  # both at 2 bits cost half of what one does
    pairs = Interactions(names, (2, 4), value, np.zeros_like(value))
    points = list(all_points(space))

    def loss(point: list[Option], both: bool) -> float:
        at_two = [w == 2 for w, _ in point]
        return sum(at_two) - 1.5 * (both and at_two[0] and at_two[1])

    for s, both in ((alone, False), (replace(alone, pairs=pairs), True)):
        for point in points[:: max(1, len(points) // 8)]:
            limits = {"average_bits": totals_by_hand(SIZES, point)["average_bits"]}
            best = min(
                loss(p, both)
                for p in points
                if totals_by_hand(SIZES, p)["average_bits"] <= limits["average_bits"]
            )
            seeds = make_seeds(space, costs, limits, [s], 1)
            assert loss(seeds[0], both) == pytest.approx(best)


def some_limits(space_points: list[list[Option]], rng: np.random.Generator) -> dict[str, int]:
    names = ["average_bits", "size_bytes", "bops"][: rng.integers(1, 4)]
    reached = totals_by_hand(SIZES, space_points[rng.integers(len(space_points))])
    return {name: reached[name] for name in names}


@pytest.mark.parametrize("seed", range(8))
def test_seeds_fit_differ_and_are_no_more_than_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = [(2, 3, 4), (4, 6), (2, 8)][seed % 3]
    space, costs = toy_space(SIZES, bits, [(8,), (4, 8)][seed % 2], [0, 8, 5, 2][seed % 4])
    points = list(all_points(space))
    limits = some_limits(points, rng)
    found = [toy_sensitivity(space, rng, act_bits=(2, 4, 5, 8)), toy_sensitivity(space, rng)]
    for count in (1, 2, 9):
        seeds = make_seeds(space, costs, limits, found, count)
        assert 1 <= len(seeds) <= count
        assert len({str(s) for s in seeds}) == len(seeds)
        assert all(s in points for s in seeds)
        assert all(fits_by_hand(SIZES, limits, s) for s in seeds)


def loss_by(scores: list[np.ndarray], space: Space, point: list[Option]) -> float:
    parts = zip(space.groups, scores, point, strict=True)
    return sum(float(row[group.options.index(o)]) for group, row, o in parts)


@pytest.mark.parametrize("proxies", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_seed_is_the_best_of_all_points_by_the_mean_of_the_proxies(
    seed: int, proxies: int
) -> None:
    rng = np.random.default_rng(seed)
    space, costs = toy_space(SIZES, (2, 3, 4), (4, 8), 0)
    points = list(all_points(space))
    limits = some_limits(points, rng)
    found = [toy_sensitivity(space, rng, act_bits=(4, 8)) for _ in range(proxies)]
    scores = combined_scores(space, found)
    best = min(loss_by(scores, space, p) for p in points if fits_by_hand(SIZES, limits, p))
    (first,) = make_seeds(space, costs, limits, found, 1)
    assert loss_by(scores, space, first) == pytest.approx(best, abs=1e-8)


def test_the_mean_comes_first_though_a_proxy_knows_pairs() -> None:
    """By the mean the last two layers need 4 bits most, by what they add as a pair least."""
    space, costs = toy_space([(5, 4, 1)] * 4, (2, 4))
    names = space.layers
    rows = np.array([[1.0, 0.0], [1.1, 0.0], [1.2, 0.0], [1.3, 0.0]])
    steep = Table(names, (2, 4), rows, np.zeros_like(rows))
    mild = Table(names, (2, 4), 1e-3 * rows, np.zeros_like(rows))
    value = np.zeros((4, 2) * 2)
    value[2, 0, 3, 0] = value[3, 0, 2, 0] = -5.0
    pairs = Interactions(names, (2, 4), value, np.zeros_like(value))
    found = [
        Sensitivity("with", mild, None, 2, 0.0, pairs=pairs),
        *[Sensitivity("without", steep, None, 2, 0.0)] * 2,
    ]
    limits = {"average_bits": 20 * (2 * 2 + 2 * 4)}
    seeds = make_seeds(space, costs, limits, found, 8)
    assert seeds[0] == [(2, 8), (2, 8), (4, 8), (4, 8)]
    (alone, *_) = make_seeds(
        space, costs, limits, [replace(found[0], weight=steep, pairs=pairs)], 8
    )
    assert alone == [(4, 8), (4, 8), (2, 8), (2, 8)]


@pytest.mark.parametrize("first_last", [0, 8, 5, 2])
def test_uniform_vectors_that_fit_are_among_the_seeds_and_others_are_not(first_last: int) -> None:
    rng = np.random.default_rng(3)
    space, costs = toy_space(SIZES, (4, 3, 6), (8,), first_last)
    limits = {"average_bits": totals_by_hand(SIZES, space.uniform(4))["average_bits"]}
    seeds = make_seeds(space, costs, limits, [toy_sensitivity(space, rng)], 40)
    assert space.uniform(3) in seeds
    assert space.uniform(4) in seeds
    assert space.uniform(6) not in seeds


@pytest.mark.parametrize("name", ["average_bits", "size_bytes", "bops"])
def test_a_point_fits_up_to_its_exact_cost(name: str) -> None:
    space, costs = toy_space(SIZES, (2, 3), (4, 0))
    for point in list(all_points(space))[::17]:
        cost = totals_by_hand(SIZES, point)[name]
        assert fits(space, costs, {name: cost}, point)
        assert not fits(space, costs, {name: cost - 1}, point)


TIES = [("l0", "l2"), ("l1", "l3")]


@pytest.mark.parametrize("tie", [*TIES, ("l0", "l1", "l3")])
def test_a_tied_options_score_is_the_sum_over_its_layers(tie: tuple[str, ...]) -> None:
    space, _ = toy_space(SIZES, (2, 3, 4), (4, 8, 0), ties=[tie])
    found = toy_sensitivity(space, np.random.default_rng(4), act_bits=(4, 8))
    scores = option_scores(space, found.weight, found.act)
    assert len(scores) == len(SIZES) - len(tie) + 1
    assert found.act is not None
    for group, row in zip(space.groups, scores, strict=True):
        names = tie if group.name == tie[0] else (group.name,)
        for (w, a), score in zip(group.options, row, strict=True):
            expected = sum(repaired(found.weight, name, w) for name in names)
            if a:
                expected += INPUT_WEIGHT * sum(repaired(found.act, name, a) for name in names)
            assert score == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [TIES[:1], TIES, [("l0", "l2", "l3")]])
def test_the_first_seed_of_a_tied_space_is_the_best_of_all_its_points(
    ties: list[tuple[str, ...]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    space, costs = toy_space(SIZES, (2, 3, 4), (4, 8), ties=ties)
    found = toy_sensitivity(space, rng, act_bits=(4, 8))
    assert found.act is not None
    vectors = [spread(space, point) for point in all_points(space)]
    limits = some_limits(vectors, rng)

    def loss(options: list[Option]) -> float:
        total = 0.0
        for i, (w, a) in enumerate(options):
            total += repaired(found.weight, f"l{i}", w)
            total += INPUT_WEIGHT * repaired(found.act, f"l{i}", a)
        return total

    best = min(loss(v) for v in vectors if fits_by_hand(SIZES, limits, v))
    seeds = [spread(space, point) for point in make_seeds(space, costs, limits, [found], 6)]
    assert loss(seeds[0]) == pytest.approx(best, abs=1e-8)
    for options in seeds:
        assert fits_by_hand(SIZES, limits, options)
        assert all(len({options[int(name[1:])] for name in tie}) == 1 for tie in ties)


bit_lists = st.sets(st.sampled_from([2, 3, 4, 6, 8]), min_size=1, max_size=3).map(sorted)
layer_sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_seed_exceeds_a_budget_and_the_full_budget_is_met_where_any_point_meets_it(
    data: st.DataObject,
) -> None:
    """Spaces of up to 4 layers; scores of every scale; budgets within reach, but of no particular
    point; what points there are is enumerated."""
    sizes = data.draw(st.lists(layer_sizes, min_size=3, max_size=4))
    act = data.draw(st.sampled_from([(8,), (4, 8), (0, 4)]))
    ties = data.draw(st.sampled_from([(), [("l0", "l2")], [("l1", "l2")]]))
    text = data.draw(st.sampled_from([None, "l1=2+5", "l[12]=3+7/8", "l0=4"]))
    space, costs = toy_space(
        sizes, data.draw(bit_lists), act, data.draw(st.sampled_from([0, 8])), ties, text or ""
    )
    vectors = [spread(space, point) for point in all_points(space)]
    reached = [totals_by_hand(sizes, v) for v in vectors]
    named = st.sampled_from(["average_bits", "size_bytes", "bops"])
    names = sorted(data.draw(st.sets(named, min_size=1, max_size=3)))
    corner = data.draw(st.sampled_from(reached))
    limits = {name: corner[name] + data.draw(st.integers(0, 40)) for name in names}
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    scale = data.draw(st.sampled_from([1e-12, 1.0, 1e12]))
    found = toy_sensitivity(space, rng, act_bits=(4, 5, 8))
    assert found.act is not None
    weight, inputs = (replace(t, score=scale * t.score) for t in (found.weight, found.act))
    scaled = replace(found, weight=weight, act=inputs)

    points = make_seeds(space, costs, limits, [scaled], 5)
    seeds = [spread(space, point) for point in points]
    assert seeds
    assert all(fits_by_hand(sizes, limits, s) for s in seeds)
    fitting = [v for v in vectors if fits_by_hand(sizes, limits, v)]

    def loss(options: list[Option]) -> float:
        total = 0.0
        for i, (w, a) in enumerate(options):
            total += repaired(weight, f"l{i}", w)
            total += INPUT_WEIGHT * repaired(inputs, f"l{i}", a) if a else 0.0
        return total

    assert loss(seeds[0]) == pytest.approx(min(map(loss, fitting)), rel=1e-7, abs=1e-8 * scale)
    margins = {n: 0.002 * (max(r[n] for r in reached) - min(r[n] for r in reached)) for n in names}
    margins["average_bits"] = 0.01 * sum(out * into for out, into, _ in sizes)
    for name, limit in limits.items():

        def meets(v: list[Option], name: str = name, limit: int = limit) -> bool:
            return limit - totals_by_hand(sizes, v)[name] <= margins[name]

        there = [v for v in fitting if meets(v)]
        if there:
            best = min(map(loss, there))
            among = [loss(s) for s in seeds[: 1 + len(limits)] if meets(s)]
            assert among  # seeds that use up this budget come first
            assert min(among) == pytest.approx(best, rel=1e-7, abs=1e-8 * scale)


def test_swept_seeds_are_the_best_within_their_costs_and_have_input_bits_of_all_kinds() -> None:
    """Only weights have a budget, and bit operations are swept all the same. Weights leave no room
    for the second seed, so that all but the uniform vectors come from sweeps."""
    space, costs = toy_space(SIZES, (2, 4), (2, 4, 8))
    found = toy_sensitivity(space, np.random.default_rng(5), act_bits=(2, 4, 8))
    limits = {"average_bits": totals_by_hand(SIZES, space.uniform(4))["average_bits"]}
    seeds = make_seeds(space, costs, limits, [found], 12)
    scores = option_scores(space, found.weight, found.act)
    points = list(all_points(space))
    loss = np.array([loss_by(scores, space, p) for p in points])
    spent = np.array(
        [[totals_by_hand(SIZES, p)[n] for n in ("average_bits", "bops")] for p in points]
    )
    swept = [s for s in seeds if s not in (space.uniform(2), space.uniform(4))]
    assert len(swept) >= 8
    for point in swept:
        i = points.index(point)
        assert loss[i] == pytest.approx(loss[(spent <= spent[i]).all(axis=1)].min(), abs=1e-8)
    assert {a for point in swept for _, a in point} == {2, 4, 8}
    bops = [totals_by_hand(SIZES, point)["bops"] for point in seeds]
    ends = [totals_by_hand(SIZES, space.uniform(4))["bops"], spent[:, 1].min()]
    inside = [b for b in bops if ends[1] < b < ends[0] / 2]
    assert len(inside) >= 3  # not the two ends alone
    assert min(bops) == ends[1]


def test_the_budget_is_used_up_though_more_bits_score_worse_by_an_interaction() -> None:
    """The best point leaves room; the next one takes it."""
    space, costs = toy_space(SIZES, (2, 4))
    names = space.layers
    flat = Table(names, (2, 4), np.zeros((len(names), 2)), np.zeros((len(names), 2)))
    value = np.zeros((len(names), 2) * 2)
    value[0, 1, 1, 1] = value[1, 1, 0, 1] = 1.0
    pairs = Interactions(names, (2, 4), value, np.zeros_like(value))
    limits = {"average_bits": totals_by_hand(SIZES, space.uniform(4))["average_bits"]}
    first, second, *_ = make_seeds(
        space, costs, limits, [Sensitivity("loss", flat, None, 2, 0.0, pairs=pairs)], 4
    )
    assert first in ([(2, 8), *[(4, 8)] * 3], [(4, 8), (2, 8), (4, 8), (4, 8)])
    assert second == [(4, 8)] * 4


def scaled_by_hand(values: np.ndarray) -> list[list[float]]:
    """The root of the first column; each from 0 to 1 (or 0 where all rows are alike)."""
    columns = []
    for i, column in enumerate(values.T.tolist()):
        shape = [math.sqrt(max(0.0, v)) if i == 0 else float(v) for v in column]
        low, high = min(shape), max(shape)
        columns.append([(v - low) / (high - low) if high > low else 0.0 for v in shape])
    return [list(row) for row in zip(*columns, strict=True)]


tables = st.integers(1, 3).flatmap(
    lambda costs: st.lists(
        st.tuples(st.floats(-0.5, 9.0), *[st.integers(0, 9)] * costs), min_size=1, max_size=10
    )
)


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(0, 4))
def test_always_the_row_comes_next_that_adds_most_hypervolume(
    table: list[tuple[float, ...]], first: int
) -> None:
    """Each gain is computed anew. Any of those that add as much may come."""
    values = np.array(table)
    order = by_hypervolume(values, first)
    assert sorted(order) == list(range(len(values)))
    kept = min(first, len(values))
    assert order[:kept] == list(range(kept))
    rows = scaled_by_hand(values)
    corner = [1.05] * len(rows[0])

    def volume(chosen: list[int]) -> float:
        return hypervolume([rows[i] for i in chosen], corner)

    for place in range(kept, len(order)):
        before = order[:place]
        gains = {i: volume([*before, i]) - volume(before) for i in order[place:]}
        assert gains[order[place]] == pytest.approx(max(gains.values()), abs=1e-9)


def test_the_unit_of_a_column_does_not_matter_to_the_order() -> None:
    values = np.random.default_rng(0).random((20, 3))
    order = by_hypervolume(values, 2)
    assert by_hypervolume(values * [1e-9, 1e6, 1e12], 2) == order
