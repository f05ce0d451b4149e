"""Seeds: the score of an option by a slow loop, and seeds that fit, differ and are optimal."""

import numpy as np
import pytest
from toy_space import all_points, fits_by_hand, totals_by_hand, toy_sensitivity, toy_space

from adq.proxies.base import Table
from adq.search.seeds import combined_scores, fits, make_seeds, option_scores
from adq.search.space import Option

SIZES = [(4, 3, 1), (5, 4, 6), (6, 5, 2), (3, 7, 1)]


def repaired(table: Table, layer: str, bits: int) -> float:
    """The largest score of these bits and of all higher ones, and at least zero."""
    row = table.score[table.layers.index(layer)]
    return max(0.0, *(s for s, b in zip(row, table.bits, strict=True) if b >= bits))


@pytest.mark.parametrize("act", [(8,), (4, 8), (2, 8, 0)])
def test_an_options_score_adds_its_weight_and_its_input(act: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    space, _ = toy_space(SIZES, (2, 3, 4), act, 8)
    act_bits = sorted({b for layer in space.layers for b in layer.act} - {0})
    found = toy_sensitivity(space, rng, act_bits=act_bits)
    scores = option_scores(space, found.weight, found.act)
    for layer, row in zip(space.layers, scores, strict=True):
        assert row.shape == (len(layer.options),)
        for (w, a), score in zip(layer.options, row, strict=True):
            expected = repaired(found.weight, layer.name, w)
            if a:
                assert found.act is not None
                expected += repaired(found.act, layer.name, a)
            assert score == expected


def test_a_table_of_any_order_of_bits_is_read_by_its_bits() -> None:
    space, _ = toy_space(SIZES, (2, 3, 4))
    names = tuple(layer.name for layer in space.layers)
    rows = np.arange(12.0).reshape(4, 3)
    table = Table(names[::-1], (4, 2, 3), rows, rows)
    scores = option_scores(space, table, None)
    for layer, row in zip(space.layers, scores, strict=True):
        assert row.tolist() == [repaired(table, layer.name, w) for w, _ in layer.options]


def test_more_bits_never_score_worse_after_repair() -> None:
    space, _ = toy_space(SIZES, (2, 3, 4, 8))
    found = toy_sensitivity(space, np.random.default_rng(1))
    assert (np.diff(found.weight.score) > 0).any()  # the table itself says so somewhere
    for row in option_scores(space, found.weight, None):
        assert (np.diff(row) <= 0).all()
        assert (row >= 0).all()


def test_scores_combine_as_the_mean_of_the_proxies_with_one_table_of_inputs() -> None:
    rng = np.random.default_rng(2)
    space, _ = toy_space(SIZES, (2, 3), (4, 8))
    first, second = toy_sensitivity(space, rng), toy_sensitivity(space, rng, act_bits=(4, 8))
    combined = combined_scores(space, [first, second])
    for layer, row in zip(space.layers, combined, strict=True):
        for (w, a), score in zip(layer.options, row, strict=True):
            weights = (
                repaired(first.weight, layer.name, w) + repaired(second.weight, layer.name, w)
            ) / 2
            assert second.act is not None
            assert score == pytest.approx(weights + repaired(second.act, layer.name, a))


def some_limits(space_points: list[list[Option]], rng: np.random.Generator) -> dict[str, int]:
    names = ["average_bits", "size_bytes", "bops"][: rng.integers(1, 4)]
    reached = totals_by_hand(SIZES, space_points[rng.integers(len(space_points))])
    return {name: reached[name] for name in names}


@pytest.mark.parametrize("seed", range(12))
def test_seeds_fit_differ_and_are_no_more_than_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = [(2, 3, 4), (4, 6), (2, 8)][seed % 3]
    space, costs = toy_space(SIZES, bits, [(8,), (4, 8)][seed % 2], [0, 8, 5, 2][seed % 4])
    points = list(all_points(space))
    limits = some_limits(points, rng)
    found = [toy_sensitivity(space, rng, act_bits=(2, 4, 5, 8)), toy_sensitivity(space, rng)]
    for count in (1, 2, 5, 30):
        seeds = make_seeds(space, costs, limits, found, count)
        assert 1 <= len(seeds) <= count
        assert len({str(s) for s in seeds}) == len(seeds)
        assert all(s in points for s in seeds)
        assert all(fits_by_hand(SIZES, limits, s) for s in seeds)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_seed_is_the_best_of_all_points_by_its_proxy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space, costs = toy_space(SIZES, (2, 3, 4), (4, 8), 0)
    points = list(all_points(space))
    limits = some_limits(points, rng)
    found = toy_sensitivity(space, rng, act_bits=(4, 8))
    scores = option_scores(space, found.weight, found.act)

    def loss(point: list[Option]) -> float:
        parts = zip(space.layers, scores, point, strict=True)
        return sum(float(row[layer.options.index(o)]) for layer, row, o in parts)

    best = min(loss(p) for p in points if fits_by_hand(SIZES, limits, p))
    first = make_seeds(space, costs, limits, [found], 4)[0]
    assert loss(first) == pytest.approx(best, abs=1e-8)


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
