"""Non-dominated sets against the definition, pair by pair."""

from hypothesis import given
from hypothesis import strategies as st

from adq.search.pareto import non_dominated

Row = tuple[int, ...]


def dominates(a: Row, b: Row) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def tables(columns: int) -> st.SearchStrategy[list[Row]]:
    """Few values, so that ties are everywhere."""
    return st.lists(st.tuples(*[st.integers(0, 3)] * columns), min_size=1, max_size=14)


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


def test_no_rows_give_no_indices() -> None:
    assert non_dominated([]) == []
