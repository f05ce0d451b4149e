"""From sensitivities to the points that a study starts from."""

import heapq
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from adq.proxies.base import Sensitivity, Table, aligned, combined
from adq.proxies.costs import CostModel
from adq.search.knapsack import budgets, solve, sweep, topped_up, totals, value
from adq.search.pairs import option_pairs
from adq.search.pareto import hypervolume
from adq.search.space import FP32, Option, Space, cost_range, objectives, option_terms

Point = list[Option]

INPUT_WEIGHT = 8.0
"""How much more an input's expected loss increase counts than a weight's. Proxies foretell the loss
before fine-tuning, which then repairs weights far better than inputs: in studies/proxy_fidelity the
rank correlation with the loss after it is best around 8, whatever the proxy."""

SECONDS = 20.0  # for all seeds together
BITS_TOLERANCE, TOLERANCE = 0.01, 0.002
DENSE = 5  # budgets of the first sweep for each seed: most of its solutions are not taken


def option_scores(space: Space, weight: Table, act: Table | None) -> list[npt.NDArray[np.float64]]:
    """For each group the score of each option, in `Choices.options` order.

    The expected loss increases of weights and of inputs add up, the latter INPUT_WEIGHT times, and
    so do those of tied layers; an input in FP32 adds none, and neither does any input where no
    table for inputs is given.
    """
    weight_score, act_score = weight.monotone(), None if act is None else act.monotone()

    def score(name: str, w: int, a: int) -> float:
        value = float(weight_score[weight.layers.index(name), weight.bits.index(w)])
        if act is not None and act_score is not None and a != FP32:
            value += INPUT_WEIGHT * float(act_score[act.layers.index(name), act.bits.index(a)])
        return value

    return [
        np.array([sum(score(name, w, a) for name in group.names) for w, a in group.options])
        for group in space.groups
    ]


def combined_scores(
    space: Space, sensitivities: Sequence[Sensitivity]
) -> list[npt.NDArray[np.float64]]:
    """The mean over the proxies, each scaled to their common size."""
    mean = combined(sensitivities)
    return option_scores(space, mean.weight, mean.act)


def make_seeds(
    space: Space,
    costs: CostModel,
    limits: dict[str, int],
    sensitivities: Sequence[Sensitivity],
    count: int,
) -> list[Point]:
    """At most `count` distinct points within the limits: the best one, then a front.

    First comes the point of the least expected loss increase, by the mean over the proxies, and,
    for each limit that it does not use up, the best one that does, where there is one: within 0.01
    average bit of the limit (BITS_TOLERANCE), for other costs within 0.2 % of their range over the
    space (TOLERANCE). Then those that add most to the expected front, see `by_hypervolume`, out of
    sweeps of exact knapsack solutions by each proxy and by their mean (quadratic ones where a
    proxy knows what pairs of layers add), the uniform vectors and the fewest bits. A sweep lowers
    each of the study's `objectives` alone, then all together; one without a limit from where the
    best point is.

    Solutions are optimal unless they take more than SECONDS together; what is found by then
    depends on how fast the machine is.
    """
    end = time.monotonic() + SECONDS
    terms = option_terms(space, costs)
    smallest, largest = cost_range(space, costs)
    margins = {name: TOLERANCE * (largest[name] - smallest[name]) for name in limits}
    if "average_bits" in limits:
        margins["average_bits"] = BITS_TOLERANCE * costs.weight_numel
    floors = {name: limit - math.floor(margins[name]) for name, limit in limits.items()}
    swept = objectives(space, limits)
    sweeps_each = len(swept) + (len(swept) > 1)
    mean = combined(sensitivities)
    proxies = [mean, *aligned(sensitivities)] if len(sensitivities) > 1 else [*sensitivities]
    first: list[list[int]] = []
    pool: list[list[int]] = [
        [g.options.index(o) for g, o in zip(space.groups, space.uniform(b), strict=True)]
        for b in space.weight_choices
    ]
    pool.append([0] * len(space.groups))  # the other end of the front
    for i, s in enumerate(proxies):
        scores, pairs = option_scores(space, s.weight, s.act), None
        if s.pairs is not None:
            own, pairs = option_pairs(space, s.pairs.significant())
            scores = [score + more for score, more in zip(scores, own, strict=True)]
        seconds = (end - time.monotonic()) / (len(proxies) - i)
        # a half for the full budget, the other for what is below
        share = seconds / 2 / (1 + len(limits))
        best = sweep(scores, terms, [limits], pairs, share)
        used = totals(terms, best[0], swept) if best else {}
        for name, floor in floors.items():
            if used and used[name] < floor:
                full = solve(scores, terms, limits, pairs, floors={name: floor}, seconds=share)
                if full is not None:
                    best.append(topped_up(scores, terms, limits, full, pairs))
        first = first or best
        tops = {name: limits.get(name, used.get(name, largest[name])) for name in swept}
        points = max(2, math.ceil(count * (1 if i else DENSE) / sweeps_each))
        below = budgets(limits, tops, smallest, points)
        pool += best + sweep(scores, terms, below, pairs, seconds / 2)
    pool = first + [choice for choice in pool if within(totals(terms, choice, [*limits]), limits)]
    scores = option_scores(space, mean.weight, mean.act)
    lost = [value(scores, choice) for choice in pool]
    spent = [[*totals(terms, choice, swept).values()] for choice in pool]
    order = by_hypervolume(np.column_stack([lost, spent]), len(first))
    seeds: list[Point] = []
    for i in order:
        point = [g.options[o] for g, o in zip(space.groups, pool[i], strict=True)]
        if point not in seeds:
            seeds.append(point)
    return seeds[:count]


def by_hypervolume(values: npt.NDArray[np.float64], first: int = 0) -> list[int]:
    """Rows of `values` (expected loss increase, costs) in an order in which a front takes shape.

    The `first` ones stay where they are; then always comes the row that adds most hypervolume to
    those before it (greedy, which is within 1 − 1/e of the best choice of as many: the
    hypervolume is submodular, Ulrich and Thiele, GECCO 2012). The root of the loss increase stands
    for the metric, which falls steeply at first and ever less; in studies/benchmarks/tabular a
    front takes shape sooner with it than with the loss increase itself or its logarithm.
    """
    shape = np.column_stack([np.sqrt(np.maximum(values[:, 0], 0.0)), values[:, 1:]])
    shape = shape - shape.min(axis=0)
    shape = shape / np.where(shape.max(axis=0) > 0, shape.max(axis=0), 1.0)
    corner = [1.05] * shape.shape[1]  # so that ends of the front count as well
    order = list(range(min(first, len(shape))))
    reached = hypervolume(shape[order], corner)
    # gains only shrink as rows are added: one that is up to date and on top is the largest
    heap = [(-hypervolume(shape[[i]], corner), i, 0) for i in range(len(order), len(shape))]
    heapq.heapify(heap)
    while heap:
        gain, i, at = heapq.heappop(heap)
        if at == len(order):
            order.append(i)
            reached -= gain
        else:
            gain = reached - hypervolume(shape[[*order, i]], corner)
            heapq.heappush(heap, (gain, i, len(order)))
    return order


def fits(space: Space, costs: CostModel, limits: Mapping[str, int], point: Point) -> bool:
    return within(costs.totals(space.bit_vector(point)), limits)


def within(used: Mapping[str, int], limits: Mapping[str, int]) -> bool:
    return all(used[name] <= limit for name, limit in limits.items())
