"""Proposals: the seeds first, then Optuna's multi-objective TPE, repaired to the budget."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from adq.proxies.costs import CostModel
from adq.search.seeds import Point, fits
from adq.search.space import Option, Space, act_order, option_terms

MUTATIONS = 100
VISITS = 100_000  # of a tree search that needs at most groups · (trials + 1) of them in practice


class BudgetSampler(BaseSampler):
    """An Optuna sampler that proposes new points within the budgets, and nothing else.

    Trial number k gets the k-th seed while there are seeds. Later ones get a TPE proposal, lowered
    to the budget where it exceeds it and mutated where it was proposed before. Seeds and repaired
    points are the trial's own parameters, not enqueued ones, so that a sampler learns from them
    like from any other.

    A proposal depends on the seed, the trial's number and the trials told before it, and on no
    state of this object: a resumed study proposes what the uninterrupted one would have.
    """

    def __init__(
        self,
        space: Space,
        costs: CostModel,
        limits: dict[str, int],
        scores: Sequence[npt.NDArray[np.float64]],
        seeds: Sequence[Point],
        seed: int,
    ) -> None:
        self.space, self.costs, self.limits = space, costs, limits
        self.seeds, self.seed = list(seeds), seed
        self._scores = [
            dict(zip(group.options, row.tolist(), strict=True))
            for group, row in zip(space.groups, scores, strict=True)
        ]
        self._terms = [
            dict(zip(group.options, row, strict=True))
            for group, row in zip(space.groups, option_terms(space, costs), strict=True)
        ]

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {**self.space.distributions()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number < len(self.seeds):
            return self.space.encode(self.seeds[trial.number])
        rng = np.random.default_rng([self.seed, trial.number])
        tpe = TPESampler(seed=int(rng.integers(2**31)), multivariate=True, n_startup_trials=1)
        params = tpe.sample_relative(study, trial, search_space)
        if set(params) == set(search_space):
            point = self.space.decode(params)
        else:  # nothing told yet to learn from
            point = [group.options[rng.integers(len(group.options))] for group in self.space.groups]
        taken = {
            _key(self.space.decode(other.params))
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and set(other.params) == set(search_space)
        }
        return self.space.encode(self.fresh(self.repair(point), taken, rng))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        raise AssertionError(f"{param_name} is not a parameter of this space")

    def repair(self, point: Point) -> Point:
        """The point itself if it fits, else lowered step by step until it does.

        Each step takes the one with the least loss increase per cost saved, the cost being each
        exceeded budget's, relative to its limit. The smallest point fits, so the steps end.
        """
        point = list(point)
        while not fits(self.space, self.costs, self.limits, point):
            totals = self.costs.totals(self.space.bit_vector(point))
            over = [name for name, limit in self.limits.items() if totals[name] > limit]
            steps = []
            for i, group in enumerate(self.space.groups):
                for lower in _lower(group.weight, group.act, point[i]):
                    saved = sum(
                        (self._terms[i][point[i]][name] - self._terms[i][lower][name])
                        / max(1, abs(self.limits[name]))
                        for name in over
                    )
                    lost = self._scores[i][lower] - self._scores[i][point[i]]
                    if saved > 0:
                        steps.append((lost / saved, i, lower))
            if not steps:  # an FP32 input takes no bytes: with fewer bits a group may grow
                found = self._any_fresh(set(), np.random.default_rng(self.seed))
                assert found is not None, "the smallest point was checked to fit"
                return found
            _, i, lower = min(steps)
            point[i] = lower
        return point

    def fresh(self, point: Point, taken: set[str], rng: np.random.Generator) -> Point:
        """A point within the budgets that is not taken, near `point` if mutations find one;
        `point` itself if there is none, which the study reads as "the space is exhausted"."""
        found = point
        for attempt in range(MUTATIONS):
            if _key(found) not in taken:
                return found
            mutated = list(point)
            changes = 1 + attempt * len(mutated) // MUTATIONS  # wider and wider
            for i in rng.choice(len(mutated), size=changes, replace=False):
                options = self.space.groups[i].options
                mutated[i] = options[rng.integers(len(options))]
            found = self.repair(mutated)
        return self._any_fresh(taken, rng) or point

    def _any_fresh(self, taken: set[str], rng: np.random.Generator) -> Point | None:
        """Some point within the budgets that is not taken, by depth-first search in random order.

        A branch is entered when its cheapest completion is within every limit.
        """
        least = [dict.fromkeys(self.limits, 0)]  # of the groups from i on
        for terms in reversed(self._terms):
            least.insert(
                0, {n: least[0][n] + min(t[n] for t in terms.values()) for n in self.limits}
            )
        stack: list[tuple[Point, dict[str, int]]] = [([], dict.fromkeys(self.limits, 0))]
        for _ in range(VISITS):
            if not stack:
                break
            chosen, totals = stack.pop()
            i = len(chosen)
            if i < len(self.space.groups):
                options = self.space.groups[i].options
                for option in (options[o] for o in rng.permutation(len(options))):
                    sums = {n: total + self._terms[i][option][n] for n, total in totals.items()}
                    if all(sums[n] + least[i + 1][n] <= limit for n, limit in self.limits.items()):
                        stack.append(([*chosen, option], sums))
            elif _key(chosen) not in taken:
                return chosen
        return None


def _lower(weight: tuple[int, ...], act: tuple[int, ...], option: Option) -> list[Option]:
    """The options one step down in weight bits or in input bits."""
    w, a = option
    fewer_w = [x for x in weight if x < w]
    fewer_a = [x for x in act if act_order(x) < act_order(a)]
    steps = [(max(fewer_w), a)] if fewer_w else []
    return steps + ([(w, max(fewer_a, key=act_order))] if fewer_a else [])


def _key(point: Sequence[Option]) -> str:
    return str(list(point))
