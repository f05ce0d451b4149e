"""What a sampler knows: results in the order in which they were told."""

import numpy as np

from adq.search.lattice import Floats, Indices


class History:
    """Points and what came of them.

    points  (results, groups) option indices, see `lattice`
    metric  (results,) the validation metric, higher is better; nan where there is none (training
            failed, or the candidate was not worth it)
    """

    def __init__(self, groups: int) -> None:
        self._points = np.zeros((64, groups), dtype=np.intp)
        self._metric = np.zeros(64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def points(self) -> Indices:
        return self._points[: self._count]

    @property
    def metric(self) -> Floats:
        return self._metric[: self._count]

    def add(self, point: Indices, metric: float | None) -> None:
        if self._count == len(self._metric):
            self._points = np.concatenate([self._points, np.zeros_like(self._points)])
            self._metric = np.concatenate([self._metric, np.zeros_like(self._metric)])
        self._points[self._count] = point
        self._metric[self._count] = np.nan if metric is None else metric
        self._count += 1

    def first(self, count: int) -> "History":
        """The first `count` results, as a view."""
        part = History.__new__(History)
        part._points, part._metric, part._count = self._points, self._metric, count
        return part
