"""Fronts, levels, hypervolume and knee against their definitions and another library."""

import itertools
import math

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq.search.pareto import hypervolume, knee, levels, non_dominated

Row = tuple[int, ...]


def dominates(a: Row, b: Row) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def tables(columns: int) -> st.SearchStrategy[list[Row]]:
    """Few values, so that ties are everywhere."""
    return st.lists(st.tuples(*[st.integers(0, 3)] * columns), min_size=1, max_size=14)


def some_rows(columns: int, kind: str, count: int = 200) -> np.ndarray:
    """Random rows in a cube, on a sphere around (1, ..., 1) (all non-dominated), or on a grid."""
    rows = np.random.default_rng(columns).random((count, columns))
    if kind == "sphere":
        return 1 - rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.round(1) if kind == "grid" else rows


@given(st.integers(1, 4).flatmap(tables))
def test_what_stays_is_what_nothing_dominates_and_of_equal_rows_the_first(rows: list[Row]) -> None:
    expected = [
        i
        for i, row in enumerate(rows)
        if not any(dominates(other, row) for other in rows) and row not in rows[:i]
    ]
    assert non_dominated(rows) == expected


def test_a_staircase_stays_whole_and_a_chain_keeps_its_end() -> None:
    assert non_dominated([(i, 9 - i) for i in range(10)]) == list(range(10))
    assert non_dominated([(i, i) for i in range(9, -1, -1)]) == [9]


def test_large_integers_are_told_apart() -> None:
    """Bit operations reach 10^12, which float64 holds exactly."""
    assert non_dominated([(10**12 + 1, 0), (10**12, 0)]) == [1]


def test_no_rows_give_nothing() -> None:
    assert non_dominated([]) == []
    assert levels([]).tolist() == []
    assert hypervolume([], (1, 1)) == 0


def test_infinite_values_are_ordered() -> None:
    assert non_dominated([(math.inf, 0), (math.inf, 1), (0, math.inf)]) == [0, 2]


@given(st.integers(1, 4).flatmap(tables))
def test_levels_are_peeled_off_one_after_the_other(rows: list[Row]) -> None:
    expected, level, left = {}, 0, set(rows)
    while left:
        front = {row for row in left if not any(dominates(other, row) for other in left)}
        expected |= dict.fromkeys(front, level)
        level, left = level + 1, left - front
    assert levels(rows).tolist() == [expected[row] for row in rows]


@given(st.integers(1, 4).flatmap(tables))
def test_hypervolume_is_the_number_of_cells_that_a_row_dominates(rows: list[Row]) -> None:
    """With whole numbers up to the reference 3, whose own row and column add nothing."""
    cells = itertools.product(range(3), repeat=len(rows[0]))
    expected = sum(any(all(np.less_equal(row, cell)) for row in rows) for cell in cells)
    assert hypervolume(rows, [3] * len(rows[0])) == expected


@given(
    st.lists(st.tuples(*[st.floats(-2, 2)] * 3), min_size=1, max_size=6),
    st.tuples(*[st.floats(-1, 2)] * 3),
)
def test_hypervolume_is_what_inclusion_and_exclusion_give(
    rows: list[tuple[float, ...]], reference: tuple[float, ...]
) -> None:
    total = 0.0
    for count in range(1, len(rows) + 1):
        for some in itertools.combinations(rows, count):
            sides = np.subtract(reference, np.max(some, axis=0)).clip(min=0)
            total -= (-1) ** count * sides.prod()
    assert hypervolume(rows, reference) == pytest.approx(total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["cube", "sphere", "grid"])
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_another_library_agrees(columns: int, kind: str) -> None:
    rows = some_rows(columns, kind)
    kept = np.flatnonzero(moocore.is_nondominated(rows, keep_weakly=False))
    assert non_dominated(rows) == kept.tolist()
    assert levels(rows).tolist() == moocore.pareto_rank(rows).tolist()
    few, reference = rows[:40], [0.9] * columns
    expected = moocore.hypervolume(few, ref=reference)
    assert hypervolume(few, reference) == pytest.approx(expected, rel=1e-12)


def test_the_knee_is_farthest_from_the_chord_whatever_the_units() -> None:
    front = np.array([(0, 10), (1, 6), (2, 3), (5, 1), (9, 0)], dtype=float)
    (x0, y0), (x1, y1) = front[0], front[-1]
    distances = [
        ((x1 - x0) * (y0 - y) - (x0 - x) * (y1 - y0)) / math.hypot(x1 - x0, y1 - y0)
        for x, y in front
    ]
    assert knee(front) == int(np.argmax(distances)) == 2
    assert knee(front[::-1]) == 2
    assert knee(front * [1e12, 1e-3] + [5, -7]) == 2


@pytest.mark.parametrize(
    "front",
    [
        [],
        [(1, 2)],
        [(1, 2), (2, 1)],
        [(i / 7, 1 - i / 7) for i in range(8)],  # a straight line
        [(0, 3), (2, 2), (3, 0)],  # bends the other way
        [(1, 5), (1, 5), (1, 5)],
    ],
)
def test_a_front_that_does_not_bend_has_no_knee(front: list[tuple[float, ...]]) -> None:
    assert knee(front) is None
