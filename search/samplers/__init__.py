"""What to try next.

base       the protocol, and the points of trials: seeds, repair to the budget, none twice
evolution  `adq`, the default: evolution around the front, ranked by a surrogate
surrogate  what it expects of points that were not tried
stock      Optuna's own samplers, and blind draws
"""

from collections.abc import Sequence
from functools import partial

from optuna.samplers import GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler

from adq.search.lattice import Lattice
from adq.search.samplers.base import Sampler
from adq.search.samplers.evolution import AdqSampler
from adq.search.samplers.stock import GeneticSampler, RandomSampler, StockSampler

STARTUP = 10
"""Blind draws before there is a model, and the smallest generation: Optuna's own number of
start-up trials."""


def make_sampler(name: str, lattice: Lattice, objectives: Sequence[str], seeds: int) -> Sampler:
    """One of `adq.search.config.SAMPLERS`.

    `objectives` are the costs that the study minimises beside maximising the metric, in its order.
    `seeds` says how many points the study starts with: they take the place of blind draws, and are
    NSGA's first generation, together with blind draws where they are fewer than STARTUP.
    """
    startup = seeds or STARTUP
    match name:
        case "adq":
            return AdqSampler(lattice, objectives)
        case "tpe":
            tpe = partial(TPESampler, n_startup_trials=startup, multivariate=True)
            return StockSampler(lattice, objectives, lambda seed: tpe(seed=seed))
        case "gp":
            gp = partial(GPSampler, n_startup_trials=startup)
            return StockSampler(lattice, objectives, lambda seed: gp(seed=seed))
        case "nsga2":
            return GeneticSampler(lattice, objectives, NSGAIISampler, max(seeds, STARTUP))
        case "nsga3":
            return GeneticSampler(lattice, objectives, NSGAIIISampler, max(seeds, STARTUP))
        case "random":
            return RandomSampler(lattice)
    raise ValueError(f"no sampler is called {name!r}")
