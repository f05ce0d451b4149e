"""From sensitivities to the points that a study starts from."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from adq.proxies.base import Sensitivity, Table, aligned, combined
from adq.proxies.costs import CostModel
from adq.search.knapsack import sweep
from adq.search.pairs import option_pairs
from adq.search.space import FP32, Option, Space, cost_range, option_terms

Point = list[Option]

INPUT_WEIGHT = 8.0
"""How much more an input's expected loss increase counts than a weight's. Proxies foretell the loss
before fine-tuning, which then repairs weights far better than inputs: in studies/proxy_fidelity the
rank correlation with the loss after it is best around 8, whatever the proxy."""


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
    """At most `count` distinct points within the limits, those nearest to the budget first.

    One sweep of exact knapsack solutions per proxy (quadratic ones where it knows what pairs of
    layers add), taken in turns, and the uniform vectors.
    """
    terms = option_terms(space, costs)
    smallest, _ = cost_range(space, costs)
    proxies = aligned(sensitivities)
    per_proxy = max(1, count // len(proxies))
    sweeps: list[list[Point]] = []
    for s in proxies:
        scores, pairs = option_scores(space, s.weight, s.act), None
        if s.pairs is not None:
            own, pairs = option_pairs(space, s.pairs.significant())
            scores = [score + more for score, more in zip(scores, own, strict=True)]
        found = sweep(scores, terms, limits, smallest, per_proxy, pairs)
        sweeps.append(
            [[g.options[o] for g, o in zip(space.groups, choice, strict=True)] for choice in found]
        )
    uniform = [space.uniform(b) for b in space.weight_choices]
    seeds: list[Point] = []
    for points in zip_longest(*sweeps, uniform[::-1]):
        for point in points:
            if point is not None and point not in seeds and fits(space, costs, limits, point):
                seeds.append(point)
    return seeds[:count]


def fits(space: Space, costs: CostModel, limits: dict[str, int], point: Point) -> bool:
    totals = costs.totals(space.bit_vector(point))
    return all(totals[name] <= limit for name, limit in limits.items())
