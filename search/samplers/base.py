"""Proposals: the seeds, then a sampler's, repaired to the budgets and never twice the same."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from adq.search.history import History
from adq.search.lattice import Indices, Lattice, key, keys
from adq.search.seeds import Point

MUTATIONS = 100


class Sampler(Protocol):
    """What proposes points from results. It keeps no state that changes what it proposes."""

    def propose(
        self, history: History, pending: Sequence[Indices], rng: np.random.Generator
    ) -> Indices:
        """A point (option indices, one a group) that may break limits or be known already.

        `pending` are points that are being tried and have no result yet.
        """


class Proposals:
    """The point of each trial of a study.

    Trial number k gets the k-th seed while there are seeds, and then what the sampler proposes,
    lowered to the budget where it exceeds it and mutated where it was proposed before.

    A proposal depends on the seed of the study, the trial's number, the results told before it in
    the order in which they were told, and the points that were pending: a resumed study proposes
    what the uninterrupted one would have.
    """

    def __init__(
        self, lattice: Lattice, seeds: Sequence[Point], sampler: Sampler, seed: int
    ) -> None:
        self.lattice, self.sampler, self.seed = lattice, sampler, seed
        self.seeds = [lattice.encode(point) for point in seeds]

    def propose(
        self,
        number: int,
        history: History,
        pending: Sequence[Indices],
        beside: Sequence[Indices] = (),
    ) -> Indices | None:
        """The point of trial `number`; None where no point within the limits is found
        that is not taken, see `Lattice.any_fresh`.

        `beside` are points that are pending as well, of which the sampler does not hear: it may
        answer for several trials in a row what it has worked out for the first.
        """
        others = np.array([*pending, *beside], dtype=np.intp).reshape(-1, len(self.lattice.sizes))
        taken = {*keys(history.points), *keys(others)}
        if number < len(self.seeds) and key(self.seeds[number]) not in taken:
            return self.seeds[number]
        rng = np.random.default_rng([self.seed, number])
        point = self.lattice.repair(self.sampler.propose(history, pending, rng))
        found = point
        for attempt in range(MUTATIONS):
            if key(found) not in taken:
                return found
            mutated = point.copy()
            changes = 1 + attempt * len(point) // MUTATIONS  # wider and wider
            places = rng.choice(len(point), size=changes, replace=False)
            mutated[places] = rng.integers(self.lattice.sizes[places])
            found = self.lattice.repair(mutated)
        return self.lattice.any_fresh(taken, rng)
