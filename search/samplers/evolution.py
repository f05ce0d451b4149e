"""ADQ's own sampler: evolution around the front, ranked by a surrogate.

Many proposals by mutation and crossover of the models on the front so far; the one that is
expected to add most hypervolume is tried. Costs are known exactly, so only the metric is guessed:
with a normal guess N(μ, σ²) of it, the expected improvement over what is reached at each cost so
far has a closed form (Jones et al., J. Global Optim. 13, 1998, eq. 15), and its mean over the
costs that a point is within is the expected hypervolume improvement (Emmerich et al., 2006).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import ndtr
from scipy.stats import qmc
from threadpoolctl import ThreadpoolController

from adq.search.history import History
from adq.search.lattice import Floats, Indices, Lattice, keys
from adq.search.pareto import non_dominated
from adq.search.samplers.surrogate import Features, Surrogate

PROPOSALS = 384
REFINED = 12
"""Of the best proposals, neighbours are proposed as well, ROUNDS times."""
ROUNDS = 2
REPAIRED = 32
"""Of proposals that break a limit so many are repaired each time; the others are left out."""
FITTED = 224
"""The surrogate sees so many results at most, those nearest to the front first."""
PLACES = 512
"""Combinations of costs over which an improvement is averaged, where there are several costs."""
FEW = 8
"""With fewer results than that there is nothing to fit a surrogate to."""


class AdqSampler:
    """Proposes the point that is expected to add most hypervolume to the front.

    `objectives`: the costs that are minimised beside maximising the metric.
    """

    def __init__(self, lattice: Lattice, objectives: Sequence[str]) -> None:
        self.lattice = lattice
        self.features = Features(lattice)
        self._columns = [lattice.names.index(name) for name in objectives]
        dearest = np.minimum(lattice.terms.max(axis=1).sum(axis=0), lattice.limits)
        self._dearest = dearest[self._columns].astype(np.float64)
        self._question: tuple[bytes, ...] = ()
        self._answer: tuple[Reached, Surrogate, Indices]

    def propose(
        self, history: History, pending: Sequence[Indices], rng: np.random.Generator
    ) -> Indices:
        # on matrices this small threads wait for each other
        with _thread_pools().limit(limits=1):
            return self._propose(history, pending, rng)

    def _propose(
        self, history: History, pending: Sequence[Indices], rng: np.random.Generator
    ) -> Indices:
        if np.count_nonzero(np.isfinite(history.metric)) < FEW:
            return self._cheap(rng, 1)[0]
        reached, surrogate, front = self._known(history, pending)
        taken = {*keys(history.points), *keys(self._stacked(pending))}
        pool = np.concatenate([self._offspring(front, rng), self._cheap(rng)])
        best = pool[:0]
        for _ in range(1 + ROUNDS):
            pool = self._fresh(np.concatenate([best, pool]), taken)
            if not len(pool):
                break
            gain = reached.gain(self.costs(pool), *surrogate.predict(pool))
            best = pool[np.argsort(-gain, kind="stable")[:REFINED]]
            pool = self._neighbours(best, rng)
        return best[0] if len(best) else self.lattice.random(rng, 1)[0]

    def _known(
        self, history: History, pending: Sequence[Indices]
    ) -> tuple["Reached", Surrogate, Indices]:
        """What is reached, the surrogate, and the points on the front, with pending points believed
        to turn out as expected, so that others are proposed beside them.

        The last answer is remembered: it depends on the question alone.
        """
        known = np.isfinite(history.metric)
        points, metric = history.points[known], history.metric[known]
        waiting = self._stacked(pending)
        question = points.tobytes(), metric.tobytes(), waiting.tobytes()
        if question != self._question:
            rng = np.random.default_rng([len(points), len(waiting)])
            reached = self.reached(points, metric, rng)
            surrogate = self.surrogate(points, metric, reached, rng)
            if pending:
                points = np.concatenate([points, waiting])
                metric = np.concatenate([metric, surrogate.predict(waiting)[0]])
                reached = self.reached(points, metric, rng)
                surrogate = self.surrogate(points, metric, reached, rng)
            front = points[non_dominated(np.column_stack([-metric, self.costs(points)]))]
            self._question, self._answer = question, (reached, surrogate, front)
        return self._answer

    def _stacked(self, points: Sequence[Indices]) -> Indices:
        return np.array(points, dtype=np.intp).reshape(-1, len(self.lattice.sizes))

    def reached(self, points: Indices, metric: Floats, rng: np.random.Generator) -> "Reached":
        return Reached(self.costs(points), metric, self._dearest, rng)

    def costs(self, points: Indices) -> Floats:
        return self.lattice.totals(points)[:, self._columns].astype(np.float64)

    def surrogate(
        self, points: Indices, metric: Floats, reached: "Reached", rng: np.random.Generator
    ) -> Surrogate:
        """Fitted to at most FITTED results: those nearest below the front, and a quarter of any."""
        chosen = np.arange(len(points))
        if len(points) > FITTED:
            order = np.argsort(reached.at(self.costs(points)) - metric, kind="stable")
            near = FITTED * 3 // 4
            chosen = np.append(order[:near], rng.choice(order[near:], FITTED - near, replace=False))
        return Surrogate(self.features, points[chosen], metric[chosen])

    def _offspring(self, front: Indices, rng: np.random.Generator) -> Indices:
        """Children of the front: of two parents in half of the cases, with a change or more."""
        groups = len(self.lattice.sizes)
        mothers, fathers = front[rng.integers(len(front), size=(2, PROPOSALS))]
        crossed = (rng.random((PROPOSALS, groups)) < 0.5) & (rng.random((PROPOSALS, 1)) < 0.5)
        children = np.where(crossed, fathers, mothers)
        rates = rng.choice([1, 2, 4], size=(PROPOSALS, 1)) / groups
        changed = rng.random((PROPOSALS, groups)) < rates
        changed[np.arange(PROPOSALS), rng.integers(groups, size=PROPOSALS)] = True
        return np.where(changed, self.lattice.random(rng, PROPOSALS), children)

    def _cheap(self, rng: np.random.Generator, count: int = PROPOSALS // 4) -> Indices:
        """Least Lagrangians Σ score + λ·cost at random λ, scores being off by random factors: what
        a knapsack would choose if the proxies erred like that."""
        lattice = self.lattice
        within = np.arange(lattice.scores.shape[1]) < lattice.sizes[:, None]
        costs = lattice.terms[..., self._columns].astype(np.float64)
        low = np.where(within[..., None], costs, np.inf).min(axis=1, keepdims=True)
        costs = np.where(within[..., None], costs - low, 0.0)
        scale = np.maximum(costs.max(axis=1).sum(axis=0), 1.0)
        scores = lattice.scores - np.where(within, lattice.scores, np.inf).min(1, keepdims=True)
        total = max(float(np.where(within, scores, 0.0).max(axis=1).sum()), 1e-300)
        weights = rng.dirichlet(np.ones(len(self._columns)), size=count)
        prices = np.exp(rng.uniform(np.log(1e-3), np.log(30), size=(count, 1))) * weights
        factors = np.exp(0.5 * rng.standard_normal((count, len(lattice.sizes), 1)))
        value = scores / total * factors + np.einsum("goc,nc->ngo", costs / scale, prices)
        return np.where(within, value, np.inf).argmin(axis=-1)

    def _neighbours(self, points: Indices, rng: np.random.Generator) -> Indices:
        """Points that differ from one of `points` in the options of one group or two."""
        groups = len(self.lattice.sizes)
        parents = points[rng.integers(len(points), size=PROPOSALS)]
        changed = np.zeros((PROPOSALS, groups), dtype=bool)
        for _ in range(2):
            changed[np.arange(PROPOSALS), rng.integers(groups, size=PROPOSALS)] = True
        return np.where(changed, self.lattice.random(rng, PROPOSALS), parents)

    def _fresh(self, points: Indices, taken: set[bytes]) -> Indices:
        """The points within the limits and a few others, repaired; none twice, none taken."""
        fits = self.lattice.fits(points)
        repaired = self.lattice.repair(points[~fits][:REPAIRED])
        points = np.concatenate([points[fits], repaired])
        found: dict[bytes, int] = {}
        for place, name in enumerate(keys(points)):
            if name not in taken:
                found.setdefault(name, place)
        return points[list(found.values())]


class Reached:
    """The best metric among the results within given costs, and what a new one would add to it.

    The hypervolume under a front is ∫ max(M(c) − M₀, 0) dc over the costs c, M(c) being the best
    metric of all results with costs of at most c in every objective, M₀ the worst one. The
    integral is taken up to the costs `dearest`: exactly, from corner to corner, for one cost; over
    PLACES quasi-random places above the least costs told for several.
    """

    def __init__(
        self, costs: Floats, metric: Floats, dearest: Floats, rng: np.random.Generator
    ) -> None:
        front = non_dominated(np.column_stack([-metric, costs]))
        self.costs, self.metric, self.worst = costs[front], metric[front], float(metric.min())
        low, high = costs.min(axis=0), np.maximum(dearest, costs.max(axis=0))
        if costs.shape[1] == 1:
            self.places = np.append(np.sort(self.costs[:, 0]), high)[:, None]
            self.weights = np.diff(self.places[:, 0], append=high)
        else:
            sobol = qmc.Sobol(costs.shape[1], seed=rng)
            self.places = low + sobol.random(PLACES) * (high - low)
            self.weights = np.full(PLACES, np.prod(high - low) / PLACES)
        self.best = self.at(self.places)

    def at(self, costs: Floats) -> Floats:
        """(places, costs) -> M."""
        within = (self.costs[None] <= costs[:, None]).all(axis=-1)
        return np.asarray(np.where(within, self.metric, self.worst).max(axis=1))

    def gain(self, costs: Floats, mean: Floats, std: Floats) -> Floats:
        """(points, costs), (points,), (points,) -> the hypervolume that each is expected to add."""
        within = (costs[:, None] <= self.places[None]).all(axis=-1)
        total = (within * self.weights * _improvement(mean[:, None], std[:, None], self.best)).sum(
            axis=1
        )
        if costs.shape[1] == 1:  # and from the point's own cost to the next corner
            corners = self.places[:, 0]
            after = np.searchsorted(corners, costs[:, 0])
            inside = after < len(corners)
            room = corners[np.where(inside, after, 0)] - costs[:, 0]
            total += np.where(inside, room, 0.0) * _improvement(mean, std, self.at(costs))
        return np.asarray(total)


@cache
def _thread_pools() -> ThreadpoolController:
    """Those of the libraries that are loaded; to look for them takes longer than to limit them."""
    return ThreadpoolController()


def _improvement(mean: Floats, std: Floats, best: Floats) -> Floats:
    """E[max(m − best, 0)] for m of N(mean, std²)."""
    std = np.maximum(std, 1e-12)
    above = (mean - best) / std
    density = np.exp(-0.5 * above**2) / np.sqrt(2 * np.pi)
    return np.asarray(std * (above * ndtr(above) + density))
