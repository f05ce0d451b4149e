"""Lattices over made-up layers, with limits that bind, and results made up for their points."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from toy_space import Sizes, all_points, smallest, spread, totals_by_hand, toy_space

from adq.search.history import History
from adq.search.lattice import Floats, Indices, Lattice
from adq.search.space import Option


class Case:
    """A space, limits that one of its points meets exactly, scores of no order, and seeds."""

    def __init__(
        self,
        sizes: Sizes,
        bits: Sequence[int] = (2, 3, 4),
        act: Sequence[int] = (8,),
        limited: Sequence[str] = ("average_bits",),
        seed: int = 0,
        seeds: int = 0,
        ties: Sequence[Sequence[str]] = (),
        first_last: int = 0,
        limits: dict[str, int] | None = None,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.sizes, self.seed = sizes, seed
        self.space, self.costs = toy_space(sizes, bits, act, first_last, ties)
        if limits is None:
            groups = self.space.groups
            reached = [g.options[self.rng.integers(len(g.options))] for g in groups]
            # the smallest point always fits: a study checks that before it starts
            ends = [self.totals(point) for point in (reached, smallest(self.space))]
            limits = {name: max(end[name] for end in ends) for name in limited}
        self.limits = limits
        self.scores: list[Floats] = [
            self.rng.normal(size=len(group.options)) for group in self.space.groups
        ]
        self.lattice = Lattice(self.space, self.costs, self.limits, self.scores)
        self.seeds: list[list[Option]] = []
        if seeds:
            fitting = self.fitting()
            chosen = self.rng.permutation(len(fitting))[:seeds]
            self.seeds = [fitting[i] for i in chosen]

    def totals(self, point: Sequence[Option]) -> dict[str, int]:
        return totals_by_hand(self.sizes, spread(self.space, point))

    def fits(self, point: Sequence[Option]) -> bool:
        totals = self.totals(point)
        return all(totals[name] <= limit for name, limit in self.limits.items())

    def fitting(self) -> list[list[Option]]:
        return [point for point in all_points(self.space) if self.fits(point)]

    def metric(self, point: Indices) -> float:
        """More bits are better, with noise that follows from the point; some points fail."""
        noise = np.random.default_rng([*point.tolist(), self.seed]).random()
        return float("nan") if noise < 0.1 else float(point.sum() + noise)

    def history(self, count: int, seed: int = 0) -> History:
        """That many different points, within the limits or not."""
        history = History(len(self.lattice.sizes))
        points = list(all_points(self.space))
        for i in np.random.default_rng(seed).permutation(len(points))[:count]:
            point = self.lattice.encode(points[i])
            history.add(point, self.metric(point))
        return history


layer_sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
cost_names = st.lists(
    st.sampled_from(["average_bits", "size_bytes", "bops"]), min_size=1, max_size=3, unique=True
)
cases = st.builds(
    Case,
    st.lists(layer_sizes, min_size=3, max_size=4),
    st.lists(st.integers(2, 8), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([0, 2, 4, 8]), min_size=1, max_size=2, unique=True),
    cost_names,
    st.integers(0, 1000),
    st.integers(0, 4),
    st.sampled_from([(), [("l0", "l2")], [("l0", "l1", "l2")]]),
    st.sampled_from([0, 0, 8]),
)
