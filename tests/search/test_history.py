"""Results in the order in which they were told."""

import numpy as np

from adq.search.history import History


def test_results_stay_in_order_however_many_there_are() -> None:
    history = History(3)
    points = np.random.default_rng(0).integers(9, size=(200, 3))
    for i, point in enumerate(points):
        history.add(point, None if i % 7 == 0 else i / 2)
        assert len(history) == i + 1
        assert history.points.shape == (i + 1, 3)
    np.testing.assert_array_equal(history.points, points)
    expected = [np.nan if i % 7 == 0 else i / 2 for i in range(200)]
    np.testing.assert_array_equal(history.metric, expected)


def test_what_is_added_is_copied() -> None:
    history, point = History(2), np.array([1, 2])
    history.add(point, 0.5)
    point[:] = 0
    np.testing.assert_array_equal(history.points, [[1, 2]])


def test_the_first_results_are_those_of_a_shorter_history() -> None:
    short, long = History(1), History(1)
    for i in range(100):
        long.add(np.array([i]), float(i))
        if i < 63:
            short.add(np.array([i]), float(i))
    part = long.first(63)
    assert len(part) == len(short) == 63
    np.testing.assert_array_equal(part.points, short.points)
    np.testing.assert_array_equal(part.metric, short.metric)
    assert len(long.first(0)) == 0
