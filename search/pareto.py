"""Non-dominated sets."""

from collections.abc import Sequence

import numpy as np


def non_dominated(values: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the rows that no other row dominates; every column is to be minimised.

    Row a dominates row b when it is nowhere larger and somewhere smaller. Of rows that are equal
    in every column the first one stays. O(n²) time, O(n) memory per row.
    """
    rows = np.asarray(values, dtype=np.float64)
    kept = []
    for i, row in enumerate(rows):
        no_worse = (rows <= row).all(axis=1)
        dominated = (no_worse & (rows < row).any(axis=1)).any()
        repeated = (rows[:i] == row).all(axis=1).any()
        if not dominated and not repeated:
            kept.append(i)
    return kept
