"""How many trained models does a search need to come close to the true front?

    python studies/benchmarks/tabular/run.py [--fashion FOLDER] [--repeats 30] [--workers 2]

Every bit vector of the space was trained (`table.py`, table.csv), so the true front is known and
a search is replayed in milliseconds. Writes results.json (mean and spread of the share of the true
front's hypervolume after each evaluation, for each method), summary.json, front.png, curves.png and
the tables of README.md. Optuna's Gaussian process takes most of the half hour on one core.
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import altair as alt
import numpy as np
import optuna
import torch
from ground import HERE, SPACE, Net
from grounds.fashion import FOLDER
from grounds.report import table, write_between
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from scipy.stats import spearmanr
from scores import scores
from table import POINTS, SEEDS, TABLE
from warm import ROWS as WARM
from warm import gain

from adq.proxies.base import Sensitivity, aligned
from adq.proxies.costs import CostModel
from adq.quant.files import atomic_path, write_json
from adq.quant.layers import trace_layers
from adq.search.history import History
from adq.search.knapsack import budgets, sweep
from adq.search.ladder import Ladder, Result, band_of
from adq.search.lattice import Lattice
from adq.search.pareto import hypervolume, non_dominated
from adq.search.run import SEEDS as STUDY_SEEDS
from adq.search.samplers.base import Proposals
from adq.search.samplers.evolution import AdqSampler
from adq.search.seeds import combined_scores, make_seeds, option_scores
from adq.search.space import cost_range, option_terms

COST = "bops"
RESULTS = HERE / "results.json"
Curves = dict[str, dict[str, Any]]
"""Method -> `repeats`, and `mean` and `std` of the share of the hypervolume by evaluations."""
SWEEP = 64
"""Budgets of a knapsack sweep."""
REPEATS = 30
MOST = {"Optuna GP": 60, "Optuna GP, categories": 60}
MOST |= dict.fromkeys(("adq", "adq, no seeds", "adq, ladder"), 104)
OTHERS = 400
"""Evaluations of a method; OTHERS where MOST has none."""
SHARES = (0.98, 0.99)
STOCK: dict[str, tuple[Callable[[int], BaseSampler], bool]] = {
    "Optuna TPE": (lambda seed: TPESampler(seed=seed), False),
    "Optuna TPE, multivariate": (lambda seed: TPESampler(seed=seed, multivariate=True), False),
    "Optuna NSGA-II": (lambda seed: NSGAIISampler(seed=seed), False),
    "Optuna NSGA-II, population 20": (
        lambda seed: NSGAIISampler(seed=seed, population_size=20),
        False,
    ),
    "Optuna GP": (lambda seed: GPSampler(seed=seed), True),
    "Optuna GP, categories": (lambda seed: GPSampler(seed=seed), False),
}
"""Name -> Optuna's sampler by its seed, and whether it is given the bits as places in their order
or as categories."""


@dataclass(frozen=True)
class Ground:
    """The table, ready for replay: `metric` (the mean over SEEDS) and `cost` of every point, by its
    number; `of_seed` (seeds, points) is the metric under each, `untrained` that after calibration
    alone; `found` is what proxies say."""

    lattice: Lattice
    costs: CostModel
    metric: np.ndarray
    of_seed: np.ndarray
    untrained: np.ndarray
    cost: np.ndarray
    found: tuple[Sensitivity, ...]

    def number(self, point: np.ndarray) -> int:
        """The inverse of POINTS."""
        return int(np.ravel_multi_index(tuple(point), tuple(self.lattice.sizes)))

    @cached_property
    def front(self) -> list[int]:
        return non_dominated(np.column_stack([-self.metric, self.cost]))

    @cached_property
    def reference(self) -> tuple[float, float]:
        """Of the hypervolume: the worst metric on the true front, and the largest cost."""
        return -float(self.metric[self.front].min()), float(self.cost.max())

    def volume(self, numbers: Sequence[int]) -> float:
        chosen = list(numbers)
        values = np.column_stack([-self.metric[chosen], self.cost[chosen]])
        return hypervolume(values, self.reference)

    def shares(self, numbers: Sequence[int], most: int) -> np.ndarray:
        """The share of the true front's hypervolume after 1, 2, ... `most` evaluations; a method
        that has no more to propose stays where it is."""
        total = self.volume(self.front)
        found = np.zeros(most)
        for n in range(most):
            seen = numbers[: n + 1]
            same = n > 0 and (n >= len(numbers) or numbers[n] in numbers[:n])
            found[n] = found[n - 1] if same else self.volume(seen) / total
        return found


@cache
def ground(folder: Path) -> Ground:
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    model = Net().eval()
    side = 14
    layers = trace_layers(model, torch.zeros(2, 1, side, side))
    costs = CostModel(model, layers, SPACE.searched)
    found = tuple(scores(folder))

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    of_seed = np.stack([column(f"accuracy_seed{seed}") for seed in SEEDS])
    cost = column(COST)
    return Ground(
        Lattice(SPACE, costs, {COST: int(cost.max())}, combined_scores(SPACE, found)),
        costs,
        of_seed.mean(axis=0),
        of_seed,
        column("accuracy_untrained"),
        cost,
        found,
    )


def proposals(here: Ground, seed: int, seeds: int = STUDY_SEEDS) -> Proposals:
    """Those of a study: its seeds, then our own sampler."""
    limits = {COST: int(here.cost.max())}
    points = make_seeds(SPACE, here.costs, limits, here.found, seeds) if seeds else []
    return Proposals(here.lattice, points, AdqSampler(here.lattice, [COST]), seed)


def adq(here: Ground, proposals: Proposals, most: int) -> list[int]:
    """Every candidate is trained."""
    history = History(len(here.lattice.sizes))
    numbers: list[int] = []
    for trial in range(most):
        point = proposals.propose(trial, history, [])
        assert point is not None
        numbers.append(here.number(point))
        history.add(point, here.metric[numbers[-1]])
    return numbers


def adq_ladder(here: Ground, proposals: Proposals, most: int) -> list[int]:
    """Candidates are calibrated, and a third of them, by rank within its cost band, trained: the
    trained ones, as with `--rungs 0 --reduction 3`."""
    history, ladder = History(len(here.lattice.sizes)), Ladder((0, 1), 3)
    least, most_of_all = int(here.cost.min()), int(here.cost.max())
    points: list[np.ndarray] = []  # by candidate
    trained: dict[int, int] = {}  # candidate -> number
    while len(trained) < most:
        candidate, rung = ladder.promotion() or (len(points), 0)
        if rung == 0:
            waiting = [point for c, point in enumerate(points) if c not in trained]
            point = proposals.propose(candidate, history, waiting)
            if point is None:
                break
            points.append(point)
        number = here.number(points[candidate])
        cost = here.cost[number]
        ladder.start(candidate, rung, band_of(int(cost), least, most_of_all))
        metric = (here.metric if rung else here.untrained)[number]
        ladder.finish(candidate, Result(metric, -metric, (float(cost),)))
        if rung:
            trained[candidate] = number
            history.add(points[candidate], metric)
    return list(trained.values())


def stock(here: Ground, name: str, seed: int, most: int) -> list[int]:
    """One of Optuna's samplers, left alone with the space."""
    make, places = STOCK[name]
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(seed))
    distributions: dict[str, BaseDistribution] = {}
    for group in SPACE.groups:
        for kind, bits in (("weight", group.weight), ("act", group.act)):
            if len(bits) > 1:
                ordered = IntDistribution(0, len(bits) - 1)
                named = CategoricalDistribution(bits)
                distributions[f"{kind}:{group.name}"] = ordered if places else named
    numbers: list[int] = []
    for _ in range(most):
        trial = study.ask(distributions)
        params = dict(trial.params)
        if places:
            for group in SPACE.groups:
                for kind, bits in (("weight", group.weight), ("act", group.act)):
                    if len(bits) > 1:
                        params[f"{kind}:{group.name}"] = bits[params[f"{kind}:{group.name}"]]
        numbers.append(here.number(here.lattice.encode(SPACE.decode(params))))
        study.tell(trial, [here.metric[numbers[-1]], here.cost[numbers[-1]]])
    return numbers


def random_search(here: Ground, seed: int, most: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(len(POINTS)).tolist()
    return order[:most]


def uniform(here: Ground) -> list[int]:
    """The same bits everywhere, or the nearest that a layer may have."""
    widths = [(w, a) for w in SPACE.weight_choices for a in (2, 4)]
    return [
        here.number(
            here.lattice.encode(
                [min(g.options, key=lambda o: (abs(o[0] - w), abs(o[1] - a))) for g in SPACE.groups]
            )
        )
        for w, a in widths
    ]


def knapsack(here: Ground, scores: Sequence[np.ndarray]) -> list[int]:
    """Exact solutions at SWEEP budgets, the largest first."""
    smallest, largest = cost_range(SPACE, here.costs)
    terms = option_terms(SPACE, here.costs)
    top = {COST: largest[COST]}
    found = sweep(scores, terms, [top, *budgets(top, top, smallest, SWEEP)])
    return [here.number(np.array(point)) for point in found]


def greedy(here: Ground, scores: Sequence[np.ndarray]) -> list[int]:
    """From the most bits everywhere, one step down in the least sensitive layer at a time."""
    point = here.lattice.sizes - 1
    numbers = [here.number(point)]
    while True:
        steps = []
        for g, group in enumerate(SPACE.groups):
            w, a = divmod(int(point[g]), len(group.act))
            for lower in ([point[g] - len(group.act)] if w else []) + ([point[g] - 1] if a else []):
                steps.append((scores[g][lower] - scores[g][point[g]], g, int(lower)))
        if not steps:
            return numbers
        _, g, lower = min(steps)
        point = point.copy()
        point[g] = lower
        numbers.append(here.number(point))


def replay(job: tuple[Path, str, int]) -> tuple[str, list[float]]:
    """One method under one seed: the share of the hypervolume after each evaluation."""
    folder, name, seed = job
    here, most = ground(folder), MOST.get(name, OTHERS)
    if name in STOCK:
        numbers = stock(here, name, seed, most)
    elif name == "random":
        numbers = random_search(here, seed, most)
    elif name == "adq, ladder":
        numbers = adq_ladder(here, proposals(here, seed), most)
    else:
        seeds = 0 if name == "adq, no seeds" else STUDY_SEEDS
        numbers = adq(here, proposals(here, seed, seeds), most)
    return name, here.shares(numbers, most).tolist()


def start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)


METHODS = ("random", "adq", "adq, no seeds", "adq, ladder", *STOCK)


def replay_all(folder: Path, names: Sequence[str], repeats: int, workers: int) -> Curves:
    """Those of METHODS that `names` says, and all that know no chance, put into results.json."""
    start()
    here = ground(folder)
    alone = {s.proxy: option_scores(SPACE, s.weight, s.act) for s in aligned(here.found)}
    default = combined_scores(SPACE, here.found)
    fixed = {"uniform bits": uniform(here), "greedy": greedy(here, default)}
    fixed["knapsack only, default proxies"] = knapsack(here, default)
    fixed |= {f"knapsack only, {name}": knapsack(here, own) for name, own in alone.items()}
    found = {name: [here.shares(numbers, len(numbers)).tolist()] for name, numbers in fixed.items()}
    jobs = [(folder, name, seed) for name in names for seed in range(repeats)]
    with multiprocessing.get_context("spawn").Pool(workers, start) as pool:
        for done, (name, curve) in enumerate(pool.imap(replay, jobs), 1):
            found.setdefault(name, []).append(curve)
            if done % repeats == 0:
                print(f"{name}: {np.mean(found[name], axis=0)[-1]:.4f}", flush=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, rows in found.items():
        curves = np.array(rows)
        kept[name] = {
            "repeats": len(rows),
            "mean": curves.mean(axis=0).round(5).tolist(),
            "std": curves.std(axis=0, ddof=min(1, len(rows) - 1)).round(5).tolist(),
        }
    ordered = {name: kept[name] for name in (*fixed, *METHODS) if name in kept}
    write_json(RESULTS, ordered)
    return ordered


def evaluations_to(share: float, mean: Sequence[float]) -> int | None:
    """After how many evaluations the mean over the seeds has this share; None if it never has."""
    reached = np.flatnonzero(np.array(mean) >= share)
    return int(reached[0]) + 1 if len(reached) else None


def report(here: Ground, curves: Curves) -> None:
    means = {name: found["mean"] for name, found in curves.items()}
    to = {s: {name: evaluations_to(s, mean) for name, mean in means.items()} for s in SHARES}
    shown = (12, 24, 48, 104, 400)
    rows = []
    for name, found in curves.items():
        pairs = [f"{m:.3f} ± {s:.3f}" for m, s in zip(found["mean"], found["std"], strict=True)]
        rows.append(
            [
                name,
                *(pairs[n - 1] if n <= len(pairs) else "" for n in shown),
                f"{means[name][-1]:.4f} ({len(pairs)})",
                *(str(to[share][name] or "not reached") for share in SHARES),
            ]
        )
    header = ["method", *map(str, shown), "last (of)", "to 98 %", "to 99 %"]
    reached = {name: n for name, n in to[0.98].items() if name in STOCK and n is not None}
    best = min(reached, key=lambda name: reached[name])
    knapsacks = [mean[-1] for name, mean in means.items() if name.startswith("knapsack only")]
    ours = {share: to[share]["adq"] for share in SHARES}
    values = {
        "space_size": len(POINTS),
        "true_front_points": len(here.front),
        "adq_evaluations_to_98": ours[0.98],
        "adq_evaluations_to_99": ours[0.99],
        "adq_fraction_to_99": None if ours[0.99] is None else ours[0.99] / len(POINTS),
        "best_stock_evaluations_to_98": reached[best],
        "best_stock_over_adq_evals_to_98": ours[0.98] and reached[best] / ours[0.98],
        "knapsack_only_hypervolume_fraction": max(knapsacks),
        "knapsack_only_default_proxies_hypervolume_fraction": means[
            "knapsack only, default proxies"
        ][-1],
        "spearman_between_seeds": spearmanr(*here.of_seed).statistic,
        "spearman_untrained_to_trained": spearmanr(here.untrained, here.metric).statistic,
        "spearman_default_proxies": -spearmanr(
            here.lattice.expected(np.array([here.lattice.encode(p) for p in POINTS])), here.metric
        ).statistic,
    }
    if WARM.exists():
        won, error = gain(json.loads(WARM.read_text()), "warm", "accuracy")
        values |= {"warm_start_points": 100 * won, "warm_start_points_stderr": 100 * error}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        print(f"not reached, left out of summary.json: {', '.join(missing)}")
    summary = {n: round(float(v), 5) for n, v in values.items() if v is not None}
    write_json(HERE / "summary.json", summary)
    tables = {"methods": table(header, rows), "summary": table(["", ""], named(summary))}
    write_between(HERE / "README.md", tables)
    draw(here, means)


def named(summary: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:g}"] for name, value in summary.items()]


def draw(here: Ground, means: dict[str, list[float]]) -> None:
    """curves.png: hypervolume against evaluations; front.png: the whole table and its front."""
    curves = [
        {"method": name, "evaluations": n + 1, "share": share}
        for name, mean in means.items()
        for n, share in enumerate(mean)
        if len(mean) > 20 and share >= 0.7
    ]
    scale = alt.Scale(type="log", domain=[1, OTHERS], nice=False)
    x = alt.X("evaluations:Q", scale=scale, title="models trained")
    y = alt.Y("share:Q", scale=alt.Scale(domain=[0.7, 1]), title="share of the hypervolume")
    lines = alt.Chart(alt.Data(values=curves)).mark_line().encode(x, y, alt.Color("method:N"))
    save(lines.properties(width=620, height=360), "curves.png")
    order = sorted(range(len(POINTS)), key=lambda i: i in here.front)  # the front on top
    points = [
        {
            "cost": here.cost[i] / 1e6,
            "metric": here.metric[i],
            "kind": "the true front" if i in here.front else "all other models",
        }
        for i in order
    ]
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(range=["#9ab", "#e4572e"]))
    size = alt.Size("kind:N", legend=None, scale=alt.Scale(range=[12, 60]))
    scale = alt.Scale(zero=False)
    cloud = (
        alt.Chart(alt.Data(values=points))
        .mark_circle(opacity=1)
        .encode(
            alt.X("cost:Q", scale=scale, title="million bit operations an image"),
            alt.Y("metric:Q", scale=scale, title="validation accuracy"),
            colour,
            size,
        )
    )
    save(cloud.properties(width=620, height=360), "front.png")


def save(chart: alt.Chart, name: str) -> None:
    with atomic_path(HERE / name) as temporary:
        chart.save(str(temporary), format="png", scale_factor=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fashion", type=Path, default=FOLDER, help="folder of Fashion-MNIST")
    parser.add_argument(
        "--methods", nargs="*", default=METHODS, choices=METHODS, help="replay these alone"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help="seeds of each method")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")
    given = parser.parse_args()
    curves = replay_all(given.fashion, given.methods, given.repeats, given.workers)
    report(ground(given.fashion), curves)


if __name__ == "__main__":
    main()
