"""Non-dominated sets and their levels, hypervolume, knee; every column is to be minimised.

Row a dominates row b when it is nowhere larger and somewhere smaller. Values may be infinite, not
nan.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ranks = NDArray[np.intp]


def non_dominated(values: ArrayLike) -> list[int]:
    """Indices of the rows of `values`, (rows, columns), that no other row dominates, ascending.

    Of rows that are equal in every column the first one stays.
    """
    rows = _table(values)
    if not len(rows):
        return []
    different, first = np.unique(rows, axis=0, return_index=True)
    if rows.shape[1] == 2:
        return sorted(first[_ranks(different) == 0].tolist())
    kept, left = [], np.arange(len(different))
    while len(left):  # in lexicographic order nothing later dominates the first one
        kept.append(int(first[left[0]]))
        left = left[(different[left] < different[left[0]]).any(axis=1)]
    return sorted(kept)


def levels(values: ArrayLike) -> Ranks:
    """The level of each row of `values`, (rows, columns) -> (rows,).

    Level 0 is not dominated, level k + 1 is dominated by rows of level k but by none above it
    (the fronts of non-dominated sorting, Deb et al. 2002). Equal rows share a level.
    """
    rows = _table(values)
    if not len(rows):
        return np.zeros(0, dtype=np.intp)
    different, inverse = np.unique(rows, axis=0, return_inverse=True)
    return _ranks(different)[inverse]


def hypervolume(values: ArrayLike, reference: Sequence[float]) -> float:
    """Volume of what the rows of `values` dominate, up to the point `reference`.

    Exact, for any number of columns: sorted by the last column, the volume is a sum of slices,
    each as deep as the step to the next row and as large as the hypervolume of the rows so far in
    the other columns (dimension sweep: While et al., IEEE Trans. Evol. Comput. 10(1), 2006). A row
    that is not smaller than the reference in every column adds nothing. O(n log n) for two
    columns, a factor n more for each further one.
    """
    rows = _table(values)
    corner = np.asarray(reference, dtype=np.float64)
    if not len(rows):
        return 0.0
    boxes = corner - rows[(rows < corner).all(axis=1)]
    return _union(boxes[non_dominated(-boxes)]) if len(boxes) else 0.0


def knee(values: ArrayLike) -> int | None:
    """The index of the row where a front of two columns bends most; None where it does not bend.

    With each column scaled to 0 (its least value in the front) to 1 (its largest), the knee is the
    row farthest from the chord between the two ends of the front, on the side of the ideal point
    (Das, Structural Optimization 18, 1999): (1 - x - y) / √2 is largest. `values` are mutually
    non-dominated rows, (rows, 2). Of rows that are equally far the first one is the knee. Fewer
    than three rows, or rows that all lie on the chord or beyond it, have no knee.
    """
    rows = _table(values)
    if len(rows) < 3 or not np.ptp(rows, axis=0).all():
        return None
    distance = 1.0 - ((rows - rows.min(axis=0)) / np.ptp(rows, axis=0)).sum(axis=1)
    best = int(distance.argmax())
    return best if distance[best] > ROUNDING else None


ROUNDING = 1e-12
"""Distances below this are what binary fractions leave of points on a straight line."""


def _table(values: ArrayLike) -> Floats:
    rows = np.asarray(values, dtype=np.float64)
    return rows if rows.ndim == 2 else rows.reshape(len(rows), -1 if len(rows) else 0)


def _ranks(rows: Floats) -> Ranks:
    """Levels of rows that are all different and in lexicographic order.

    Only an earlier row can dominate a later one, so that a level is the length of the longest
    chain of rows that ends here. With two columns the earlier rows' second columns decide: one
    binary search a row (Jensen, IEEE Trans. Evol. Comput. 7(5), 2003). Otherwise O(n²).
    """
    ranks = np.zeros(len(rows), dtype=np.intp)
    if rows.shape[1] == 2:
        least: list[float] = []  # of each level so far, the smallest second column; ascending
        for i, value in enumerate(rows[:, 1].tolist()):
            ranks[i] = level = bisect_right(least, value)
            least[level : level + 1] = [value]
        return ranks
    for i, row in enumerate(rows):
        above = ranks[:i][(rows[:i] <= row).all(axis=1)]
        ranks[i] = above.max(initial=-1) + 1
    return ranks


def _union(boxes: Floats) -> float:
    """Volume of the union of boxes between the origin and each row, all positive."""
    if boxes.shape[1] == 1:
        return float(boxes.max())
    boxes = boxes[np.argsort(-boxes[:, -1], kind="stable")]
    depth = boxes[:, -1] - np.append(boxes[1:, -1], 0.0)
    if boxes.shape[1] == 2:
        return float(depth @ np.maximum.accumulate(boxes[:, 0]))
    return sum(depth[i] * _union(boxes[: i + 1, :-1]) for i in np.flatnonzero(depth))
