"""From sensitivities to the points that a study starts from."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from adq.proxies.base import Sensitivity, Table
from adq.proxies.costs import CostModel
from adq.search.knapsack import sweep
from adq.search.space import FP32, Option, Space, option_terms

Point = list[Option]


def option_scores(space: Space, weight: Table, act: Table | None) -> list[npt.NDArray[np.float64]]:
    """For each layer the score of each option, in `LayerChoices.options` order.

    The expected loss increases of weights and of inputs add up; an input in FP32 adds none, and
    neither does any input where no table for inputs is given.
    """
    weight_score, act_score = weight.monotone(), None if act is None else act.monotone()
    scores = []
    for layer in space.layers:
        row = weight.layers.index(layer.name)
        values = []
        for w, a in layer.options:
            value = weight_score[row, weight.bits.index(w)]
            if act is not None and act_score is not None and a != FP32:
                value += act_score[act.layers.index(layer.name), act.bits.index(a)]
            values.append(value)
        scores.append(np.array(values))
    return scores


def combined_scores(
    space: Space, sensitivities: Sequence[Sensitivity]
) -> list[npt.NDArray[np.float64]]:
    """The mean over the proxies, which share their unit: expected loss increase."""
    act = next((s.act for s in sensitivities if s.act is not None), None)
    tables = [option_scores(space, s.weight, act) for s in sensitivities]
    return [np.mean(rows, axis=0) for rows in zip(*tables, strict=True)]


def make_seeds(
    space: Space,
    costs: CostModel,
    limits: dict[str, int],
    sensitivities: Sequence[Sensitivity],
    count: int,
) -> list[Point]:
    """At most `count` distinct points within the limits, those nearest to the budget first.

    One sweep of exact knapsack solutions per proxy, taken in turns, and the uniform vectors.
    """
    terms = option_terms(space, costs)
    smallest = {
        name: sum(min(option[name] for option in layer) for layer in terms) for name in limits
    }
    act = next((s.act for s in sensitivities if s.act is not None), None)
    per_proxy = max(1, count // len(sensitivities))
    sweeps = [
        [
            [layer.options[o] for layer, o in zip(space.layers, solution, strict=True)]
            for solution in sweep(
                option_scores(space, s.weight, act), terms, limits, smallest, per_proxy
            )
        ]
        for s in sensitivities
    ]
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
