"""The space as arrays: a point is one option index a group, and costs are sums of a table."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from adq.proxies.costs import CostModel
from adq.search.knapsack import solve
from adq.search.space import Option, Space, option_terms

Indices = npt.NDArray[np.intp]
"""(groups,) or (points, groups): option i of a group is `Choices.options[i]`."""
Floats = npt.NDArray[np.float64]

DEAD_ENDS, RANDOM = 5_000, 500
"""Visits that a tree search may waste where several limits together rule out what none does."""


class Lattice:
    """What each option costs and is expected to lose, and which points are within the limits.

    sizes   (groups,) number of options
    terms   (groups, options, costs) whole numbers; a column beyond a group's options is padding
    scores  (groups, options) expected loss increase
    limits  (costs,) the study's limits in whole units; the largest integer where there is none

    Costs are `names`, in the order of the arrays' last dimension.
    """

    def __init__(
        self,
        space: Space,
        costs: CostModel,
        limits: Mapping[str, int],
        scores: Sequence[Floats],
    ) -> None:
        self.space, self.names = space, tuple(costs.names)
        self.options = [group.options for group in space.groups]
        self._rows, self._limits = option_terms(space, costs), dict(limits)
        self.sizes = np.array([len(options) for options in self.options])
        shape = (len(self.options), int(self.sizes.max()))
        self.terms = np.zeros((*shape, len(self.names)), dtype=np.int64)
        self.scores = np.zeros(shape)
        for g, (rows, row) in enumerate(zip(self._rows, scores, strict=True)):
            self.terms[g, : len(rows)] = [[term[name] for name in self.names] for term in rows]
            self.scores[g, : len(rows)] = row
        largest = np.iinfo(np.int64).max
        self.limits = np.array([limits.get(name, largest) for name in self.names], dtype=np.int64)
        self._groups = np.arange(len(self.options))
        self._place = [{option: i for i, option in enumerate(row)} for row in self.options]
        self._down = self._steps_down()

    def encode(self, point: Sequence[Option]) -> Indices:
        return np.array([place[o] for place, o in zip(self._place, point, strict=True)])

    def decode(self, point: Indices) -> list[Option]:
        return [options[i] for options, i in zip(self.options, point, strict=True)]

    def totals(self, points: Indices) -> npt.NDArray[np.int64]:
        """(..., groups) -> (..., costs)."""
        return np.asarray(self.terms[self._groups, points].sum(axis=-2))

    def expected(self, points: Indices) -> Floats:
        """(..., groups) -> (...): the summed scores."""
        return np.asarray(self.scores[self._groups, points].sum(axis=-1))

    def fits(self, points: Indices) -> npt.NDArray[np.bool_]:
        return np.asarray((self.totals(points) <= self.limits).all(axis=-1))

    def random(self, rng: np.random.Generator, count: int) -> Indices:
        return rng.integers(self.sizes, size=(count, len(self.sizes)))

    def repair(self, points: Indices) -> Indices:
        """(..., groups) -> the same: each point itself if it fits, else lowered until it does.

        Each step takes the one with the least loss increase per cost saved, the cost being each
        exceeded budget's, relative to its limit. Where no step saves anything (an FP32 input takes
        no bytes: with fewer bits a group may grow), `anchor` with the point's options wherever
        they fit.
        """
        points = points.copy()
        rows, groups = points.reshape(-1, points.shape[-1]), self._groups  # rows is a view
        totals = self.totals(rows)
        while len(left := np.flatnonzero((over := totals > self.limits).any(axis=1))):
            weight = over[left] / np.maximum(1, np.abs(self.limits))
            lower = self._down[groups, rows[left]]  # (points, groups, steps), -1 for none
            here = self.terms[groups, rows[left]]
            after = self.terms[groups[:, None], lower]
            saved = ((here[:, :, None] - after) * weight[:, None, None]).sum(axis=-1)
            lost = self.scores[groups[:, None], lower]
            lost = lost - self.scores[groups, rows[left]][..., None]
            usable = (lower >= 0) & (saved > 0)
            price = np.where(usable, lost / np.where(usable, saved, 1.0), np.inf)
            best = price.reshape(len(left), -1).argmin(axis=1)
            for n, row in enumerate(left):
                g, step = divmod(int(best[n]), lower.shape[-1])
                if usable[n, g, step]:
                    totals[row] += after[n, g, step] - here[n, g]
                    rows[row, g] = lower[n, g, step]
                else:
                    rows[row] = self._towards(rows[row])
                    totals[row] = self.totals(rows[row])
        return points

    @cached_property
    def anchor(self) -> Indices:
        """A point within the limits: the fewest bits, or what integer programming finds.

        Raises ValueError where there is none.
        """
        fewest = np.zeros(len(self.sizes), dtype=np.intp)
        if self.fits(fewest):
            return fewest
        indifferent = [np.zeros(len(rows)) for rows in self._rows]
        found = solve(indifferent, self._rows, self._limits)
        if found is None:
            raise ValueError("no point is within the limits")
        return np.array(found)

    def _towards(self, point: Indices) -> Indices:
        found = self.anchor.copy()
        totals = self.totals(found)
        for g, option in enumerate(point):
            changed = totals + self.terms[g, option] - self.terms[g, found[g]]
            if (changed <= self.limits).all():
                found[g], totals = option, changed
        return found

    def any_fresh(self, taken: set[bytes], rng: np.random.Generator) -> Indices | None:
        """Some point within the limits that is not taken; None where none is found.

        By depth-first search in random order: a branch is entered when its cheapest completion is
        within every limit. With one limit such a branch has a point, so that None means that all
        are taken. With several it may have none: after DEAD_ENDS of them, random points are
        repaired instead, RANDOM times at most.
        """
        groups = len(self.sizes)
        least = np.zeros((groups + 1, len(self.names)), dtype=np.int64)  # of groups from i on
        for g in reversed(range(groups)):
            least[g] = least[g + 1] + self.terms[g, : self.sizes[g]].min(axis=0)
        stack = [(np.zeros(0, dtype=np.intp), np.zeros(len(self.names), dtype=np.int64))]
        for _ in range(DEAD_ENDS + (groups + 1) * (len(taken) + 1)):
            if not stack:
                return None
            chosen, totals = stack.pop()
            g = len(chosen)
            if g < groups:
                for option in rng.permutation(self.sizes[g]):
                    sums = totals + self.terms[g, option]
                    if (sums + least[g + 1] <= self.limits).all():
                        stack.append((np.append(chosen, option), sums))
            elif key(chosen) not in taken:
                return chosen
        for point in self.random(rng, RANDOM):
            found = self._towards(point)
            if key(found) not in taken:
                return found
        return None

    def _steps_down(self) -> Indices:
        """(groups, options, 2): the option with one step fewer weight bits, and input bits."""
        down = np.full((*self.scores.shape, 2), -1)
        for g, group in enumerate(self.space.groups):
            for i in range(len(self.options[g])):
                w, a = divmod(i, len(group.act))  # `options` are a product, fewest bits first
                if w > 0:
                    down[g, i, 0] = i - len(group.act)
                if a > 0:
                    down[g, i, 1] = i - 1
        return down


def key(point: Indices) -> bytes:
    """What tells points apart in a set."""
    return point.astype(np.int64).tobytes()


def keys(points: Indices) -> list[bytes]:
    """The `key` of each of many points."""
    rows = points.astype(np.int64)
    content, width = rows.tobytes(), rows.shape[1] * rows.itemsize
    return [content[i : i + width] for i in range(0, len(content), width)]
