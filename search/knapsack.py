"""Seeds: exact solutions of the multiple-choice knapsack along the budget range.

    min Σ_l S[l, o_l]   such that   Σ_l cost_c[l, o_l] <= limit_c for every limited cost c,

one option o_l a layer. Solved as an integer program by HiGHS (scipy), exactly: no relative gap is
left, and since a solver's feasibility tolerance is not a budget, limits are checked in integers.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

Scores = Sequence[npt.NDArray[np.float64]]
Terms = Sequence[Sequence[Mapping[str, int]]]


def solve(scores: Scores, terms: Terms, limits: Mapping[str, int]) -> list[int] | None:
    """The option index of each layer that minimises the summed score within the limits.

    `scores[l][o]` and `terms[l][o][cost]` belong to option o of layer l. Scores are taken relative
    to each layer's best and scaled to the largest, so that their unit does not matter. None when
    no choice meets the limits.
    """
    sizes = [len(s) for s in scores]
    starts = np.cumsum([0, *sizes])
    relative = np.concatenate([np.asarray(s, dtype=np.float64) - np.min(s) for s in scores])
    largest = relative.max()
    objective = relative / largest * 1e4 if largest > 0 else relative
    one_each = np.zeros((len(sizes), starts[-1]))
    for layer, (a, b) in enumerate(pairwise(starts)):
        one_each[layer, a:b] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        # relative to each layer's cheapest option: the solver then sees the differences alone
        cheapest = [min(term[name] for term in layer) for layer in terms]
        row = np.array(
            [term[name] - c for layer, c in zip(terms, cheapest, strict=True) for term in layer],
            dtype=np.float64,
        )
        unit = max(row.max(), 1.0)
        constraints.append(
            LinearConstraint(row[None] / unit, -np.inf, (limit - sum(cheapest)) / unit)
        )
    while True:
        result = milp(
            objective,
            integrality=np.ones(starts[-1]),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if result.x is None:
            return None
        chosen = [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]
        over = [
            name
            for name, limit in limits.items()
            if sum(terms[layer][o][name] for layer, o in enumerate(chosen)) > limit
        ]
        if not over:
            return chosen
        # The tolerance let it slip. Whatever costs as much in every layer is over the limit too:
        # at least one layer has to take something cheaper. No point within the limits is cut off.
        for name in over:
            as_dear = [
                float(term[name] >= layer[o][name])
                for layer, o in zip(terms, chosen, strict=True)
                for term in layer
            ]
            constraints.append(LinearConstraint(np.array([as_dear]), -np.inf, len(sizes) - 1))


def sweep(
    scores: Scores,
    terms: Terms,
    limits: Mapping[str, int],
    smallest: Mapping[str, int],
    points: int,
) -> list[list[int]]:
    """Solutions at `points` evenly spaced budgets, from the full limits down towards `smallest`.

    Each limited cost is swept together: at fraction t its limit is smallest + t·(limit −
    smallest). Distinct solutions only, the largest budget first. An ε-constraint sweep finds the
    points in non-convex parts of the front too, which a weighted sum never does.
    """
    found: list[list[int]] = []
    for i in range(points, 0, -1):
        at = {
            name: smallest[name] + int((limit - smallest[name]) * i / points)
            for name, limit in limits.items()
        }
        solution = solve(scores, terms, at)
        if solution is not None and solution not in found:
            found.append(solution)
    return found
