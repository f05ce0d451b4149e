"""Optuna's own samplers over a lattice, and blind draws."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler
from optuna.storages import InMemoryStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from adq.search.history import History
from adq.search.lattice import Indices, Lattice

SHADOW = "shadow"
Genetic = NSGAIISampler | NSGAIIISampler
Stock = Callable[[int], BaseSampler]
"""An Optuna sampler from its seed."""


class RandomSampler:
    """Every point of the space is as likely as any other."""

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice

    def propose(
        self, history: History, pending: Sequence[Indices], rng: np.random.Generator
    ) -> Indices:
        return self.lattice.random(rng, 1)[0]


class StockSampler:
    """What one of Optuna's samplers would try next, were the history its own study.

    It is asked in a shadow study in memory that holds the results in the order in which they were
    told, as finished or failed trials with their objectives and constraints, and then the pending
    points as running trials. The shadow is kept while the history only grows and built anew
    otherwise. Sampler objects are not kept: a new one for each proposal, seeded from `rng`, cannot
    remember anything.

    A group's weight bits and input bits are two parameters, as in the study's own storage, so that
    a sampler can learn of them one by one. Here they are whole numbers, the places of the bits
    among the group's choices: that 3 bits lie between 2 and 4 is what TPE's kernels and the
    Gaussian process's distances need to know, and crossover does not mind. Places, not bits: the
    loss changes about as much from 2 to 3 bits as from 4 to 8.
    """

    def __init__(self, lattice: Lattice, objectives: Sequence[str], stock: Stock) -> None:
        self.lattice, self.stock = lattice, stock
        self._columns = [lattice.names.index(name) for name in objectives]
        self._limited = np.flatnonzero(lattice.limits < np.iinfo(np.int64).max)
        self._inputs = np.array([len(group.act) for group in lattice.space.groups])
        # equal distributions are one object, which Optuna's copies of trials keep one
        whole: dict[int, BaseDistribution] = {}
        self._places: dict[str, tuple[int, int]] = {}  # parameter -> row, group of `_split`
        self._distributions: dict[str, BaseDistribution] = {}
        for g, group in enumerate(lattice.space.groups):
            for row, (kind, choices) in enumerate((("weight", group.weight), ("act", group.act))):
                count = len(choices)
                if count > 1:
                    name = f"{kind}:{group.name}"
                    self._places[name] = row, g
                    whole.setdefault(count, IntDistribution(0, count - 1))
                    self._distributions[name] = whole[count]
        self._forget()

    def propose(
        self, history: History, pending: Sequence[Indices], rng: np.random.Generator
    ) -> Indices:
        if not self._holds_start_of(history):
            self._forget()
        for i in range(len(self._held), len(history)):
            self._tell(history.points[i], float(history.metric[i]))
        sampler = _Within(self.stock(int(rng.integers(2**32))), self._distributions)
        study = self._study(sampler)
        for point in pending:
            study.add_trial(self._trial(point, TrialState.RUNNING))
        asked = study.ask(self._distributions)
        # neither is a result, and samplers pass over what failed
        for number in range(asked.number - len(pending), asked.number + 1):
            study.tell(number, state=TrialState.FAIL)
        return self._point(asked.params)

    def _study(self, sampler: BaseSampler | None = None) -> Study:
        """The shadow as if just loaded: a study object may remember trials as they were before."""
        return optuna.load_study(study_name=SHADOW, storage=self._storage, sampler=sampler)

    def _forget(self) -> None:
        self._storage = InMemoryStorage()
        directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * len(self._columns)
        self._storage.create_new_study(directions, SHADOW)
        self._held = History(len(self.lattice.sizes))

    def _holds_start_of(self, history: History) -> bool:
        held = self._held
        start = history.first(len(held))
        return (
            len(held) <= len(history)
            and np.array_equal(held.points, start.points)
            and np.array_equal(held.metric, start.metric, equal_nan=True)
        )

    def _tell(self, point: Indices, metric: float) -> None:
        self._held.add(point, metric)
        if np.isnan(metric):
            trial = self._trial(point, TrialState.FAIL)
        else:
            trial = self._trial(point, TrialState.COMPLETE, metric)
        self._study().add_trial(trial)

    def _trial(self, point: Indices, state: TrialState, metric: float | None = None) -> FrozenTrial:
        totals, limits = self.lattice.totals(point), self.lattice.limits
        split = np.divmod(point, self._inputs)  # `Choices.options` are a product
        return create_trial(
            state=state,
            values=None if metric is None else [metric, *map(float, totals[self._columns])],
            params={name: int(split[row][g]) for name, (row, g) in self._places.items()},
            distributions=self._distributions,
            constraints={
                self.lattice.names[i]: float(totals[i] - limits[i]) for i in self._limited
            },
        )

    def _point(self, params: Mapping[str, int]) -> Indices:
        split = np.zeros((2, len(self._inputs)), dtype=np.intp)
        for name, place in self._places.items():
            split[place] = params[name]
        return split[0] * self._inputs + split[1]


class GeneticSampler(StockSampler):
    """Optuna's NSGA-II or NSGA-III, whose first generation are the results told first.

    The k-th finished result is of generation k // `population`, whoever proposed it. So the seeds,
    which are told first, become parents; and a result's generation, like the survivors of one,
    follows from the told order alone.
    """

    def __init__(
        self, lattice: Lattice, objectives: Sequence[str], kind: type[Genetic], population: int
    ) -> None:
        def stock(seed: int) -> Genetic:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # NSGA-III is one
                return kind(population_size=population, seed=seed)

        self._genetic, self._population = stock, population
        self._key = kind._get_generation_key()  # else Optuna counts its own trials alone
        super().__init__(lattice, objectives, stock)

    def _forget(self) -> None:
        super()._forget()
        self._finished = 0

    def _tell(self, point: Indices, metric: float) -> None:
        super()._tell(point, metric)
        if np.isnan(metric):
            return
        self._finished += 1
        generation, rest = divmod(self._finished, self._population)
        if not rest:
            # Chosen now and remembered by the shadow: NSGA-III draws some of the survivors, which
            # must not depend on which proposal is the first to need them.
            sampler = self._genetic(generation)
            sampler.get_parent_population(self._study(sampler), generation)

    def _trial(self, point: Indices, state: TrialState, metric: float | None = None) -> FrozenTrial:
        trial = super()._trial(point, state, metric)
        if state == TrialState.COMPLETE:
            trial.system_attrs = {self._key: self._finished // self._population}
        return trial


class _Within(BaseSampler):
    """A sampler that is told the space: it would gather it from all trials again and again."""

    def __init__(self, sampler: BaseSampler, space: dict[str, BaseDistribution]) -> None:
        self.sampler, self.space = sampler, space

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)
