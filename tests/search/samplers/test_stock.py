"""Optuna's samplers in their shadow studies, against studies of Optuna's own."""

import warnings
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler
from optuna.trial import TrialState, create_trial
from toy_lattice import Case

from adq.search.history import History
from adq.search.samplers import make_sampler
from adq.search.samplers.stock import GeneticSampler

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_the_shadow_is_the_study_that_the_sampler_would_have_run(name: str) -> None:
    case = Case([(2, 3, 1), (4, 2, 1), (3, 3, 1)], (2, 3, 4, 6), limited=["average_bits"])
    history = case.history(14)
    (pending,) = case.lattice.random(np.random.default_rng(1), 1)
    sampler = make_sampler(name, case.lattice, ["average_bits"], seeds=4)
    found = sampler.propose(history, [pending], np.random.default_rng(7))

    seed = int(np.random.default_rng(7).integers(2**32))
    stock = {"tpe": TPESampler, "gp": GPSampler}[name]
    options: dict[str, Any] = {"multivariate": True} if name == "tpe" else {}
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=stock(seed=seed, n_startup_trials=4, **options),
    )
    space = {f"weight:l{i}": IntDistribution(0, 3) for i in range(3)}  # all inputs have 8 bits
    told = [*zip(history.points, history.metric, strict=True), (pending, None)]
    for point, metric in told:
        bits = case.totals(case.lattice.decode(point))["average_bits"]
        state = TrialState.COMPLETE
        if metric is None:
            state = TrialState.RUNNING
        elif np.isnan(metric):
            state = TrialState.FAIL
        study.add_trial(
            create_trial(
                state=state,
                values=[metric, float(bits)] if state == TrialState.COMPLETE else None,
                params={f"weight:l{i}": int(place) for i, place in enumerate(point)},
                distributions=space,
                constraints={"average_bits": float(bits - case.limits["average_bits"])},
            )
        )
    assert np.isnan(history.metric).any()
    asked = study.ask(space)
    assert [asked.params[name] for name in space] == found.tolist()


class NSGA2(NSGAIISampler):
    def __init__(self, **options: Any) -> None:
        super().__init__(mutation_prob=0.0, **options)


class NSGA3(NSGAIIISampler):
    def __init__(self, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(mutation_prob=0.0, **options)


@pytest.mark.parametrize("kind", [NSGA2, NSGA3])
def test_children_descend_from_the_seeds_and_then_from_the_best(
    kind: type[NSGAIISampler] | type[NSGAIIISampler],
) -> None:
    """Without mutation every gene of a child is some parent's at that place."""
    case = Case([(2, 3, 1)] * 8, (2, 3, 4, 6, 8), limits={})
    sampler = GeneticSampler(case.lattice, [], kind, population=6)
    rng = np.random.default_rng(0)
    seeds = rng.integers(1, 3, size=(6, 8))
    history = History(8)
    for i, seed in enumerate(seeds):
        history.add(seed, 10.0 + i)
        history.add(seed, None)  # failed ones are of no generation
    # the next generation: three better than all seeds, three worse
    told = rng.integers(2, 5, size=(6, 8))
    for i, point in enumerate(told):
        child = sampler.propose(history, [], np.random.default_rng(i))
        assert (child == seeds).any(axis=0).all()
        history.add(point, 100.0 + i if i % 2 else float(i))
    best = np.concatenate([told[1::2], seeds[-3:]])
    children = [sampler.propose(history, [], np.random.default_rng(i)) for i in range(20)]
    assert all((child == best).any(axis=0).all() for child in children)
    assert len({child.tobytes() for child in children}) > 10


def test_generations_are_as_large_as_the_number_of_seeds() -> None:
    """With 14 seeds, thirteen results make no generation yet: draws are blind. Fourteen do."""
    case = Case([(2, 3, 1)] * 30, (2, 3, 4, 6, 8), limits={})
    history = History(30)
    for i in range(14):
        history.add(np.zeros(30, dtype=np.intp), float(i))
    rng = np.random.default_rng(0)
    for name in ("nsga2", "nsga3"):
        sampler = make_sampler(name, case.lattice, [], seeds=14)
        blind = sampler.propose(history.first(13), [], rng)
        child = sampler.propose(history, [], rng)
        assert np.count_nonzero(blind) > 15  # 24 ± 2.2
        assert np.count_nonzero(child) < 10  # one mutation, more or less
