"""Seeds: exact solutions of the multiple-choice knapsack along the budget range.

    min Σ_l S[l, o_l] + Σ_{i<j} Q_ij[o_i, o_j]
    such that Σ_l cost_c[l, o_l] <= limit_c for every limited cost c,

one option o_l a layer; Q, what pairs of layers add (CLADO, arXiv 2307.05657), may be left out.
Solved as an integer program by HiGHS (scipy), exactly: no relative gap is left, and since a
solver's feasibility tolerance is not a budget, limits are checked in integers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array, eye_array, hstack, kron, vstack

Array = npt.NDArray[np.float64]
Scores = Sequence[Array]
Terms = Sequence[Sequence[Mapping[str, int]]]
Pairs = Mapping[tuple[int, int], Array]
"""(i, j), i < j -> Q_ij of shape (options of i, options of j)."""


def solve(
    scores: Scores, terms: Terms, limits: Mapping[str, int], pairs: Pairs | None = None
) -> list[int] | None:
    """The option index of each layer that minimises the summed score within the limits.

    `scores[l][o]` and `terms[l][o][cost]` belong to option o of layer l. The unit of scores and
    pairs does not matter (`unitless`). None when no choice meets the limits.

    A product z_ia z_jb of two layers' binary choices becomes a variable y_ia,jb in [0, 1] with
    Σ_b y_ia,jb = z_ia and Σ_a y_ia,jb = z_jb; with binary z it can be nothing but the product.
    Options whose pairs are equal (the same weight bits, other input bits) share a variable.
    """
    sizes = [len(s) for s in scores]
    starts = np.cumsum([0, *sizes])
    choices = starts[-1]
    pairs = {} if pairs is None else pairs
    # a constant array prefers nothing; options that all others meet alike are one class
    coupled = {pair: (_classes(q), _classes(q.T)) for pair, q in pairs.items() if np.ptp(q) > 0}
    reduced = [
        pairs[pair][np.ix_(rows.first, columns.first)] for pair, (rows, columns) in coupled.items()
    ]
    objective = unitless([*scores, *reduced])

    def over_choices(rows: npt.ArrayLike) -> csr_array:
        z = csr_array(rows)
        return hstack([z, csr_array((z.shape[0], len(objective) - choices))])

    one_each = block_diag([np.ones((1, size)) for size in sizes])
    constraints = [LinearConstraint(over_choices(one_each), 1, 1)]
    if coupled:
        members = [
            csr_array(
                (np.ones(sizes[i]), (classes.of, starts[i] + np.arange(sizes[i]))),
                shape=(len(classes.first), choices),
            )
            for pair, both in coupled.items()
            for i, classes in zip(pair, both, strict=True)
        ]
        marginals = [
            vstack([kron(eye_array(a), np.ones((1, b))), kron(np.ones((1, a)), eye_array(b))])
            for a, b in (q.shape for q in reduced)
        ]
        of_y = hstack([-vstack(members), block_diag(marginals)])
        constraints.append(LinearConstraint(of_y, 0, 0))
    for name, limit in limits.items():
        # relative to each layer's cheapest option: the solver then sees the differences alone
        cheapest = [min(term[name] for term in layer) for layer in terms]
        row = np.array(
            [term[name] - c for layer, c in zip(terms, cheapest, strict=True) for term in layer],
            dtype=np.float64,
        )
        unit = max(row.max(), 1.0)
        room = (limit - sum(cheapest)) / unit
        constraints.append(LinearConstraint(over_choices(row[None] / unit), -np.inf, room))
    while True:
        result = milp(
            objective,
            integrality=np.arange(len(objective)) < choices,
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
            constraints.append(
                LinearConstraint(over_choices(np.array([as_dear])), -np.inf, len(sizes) - 1)
            )


@dataclass(frozen=True)
class _Classes:
    """Equal rows of an array: the class `of` each row, and the `first` row of each class."""

    of: npt.NDArray[np.intp]
    first: npt.NDArray[np.intp]


def _classes(rows: Array) -> _Classes:
    _, first, of = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return _Classes(of.reshape(-1), first)


def unitless(arrays: Sequence[Array]) -> Array:
    """All entries in one row, each array relative to its least, on a grid from 0 to 2¹³.

    The steps, 2⁻³³ of the largest entry, are as fine as the solver's absolute gap (10⁻⁶), and
    coarse enough that another unit, which moves last bits, gives the same numbers. Not decimal:
    scores that are short decimals would lie half-way between two of its steps.
    """
    row = np.concatenate([np.ravel(a).astype(np.float64) - np.min(a) for a in arrays])
    largest = row.max()
    return np.rint(row / largest * 2**33) / 2**20 if largest > 0 else row


def sweep(
    scores: Scores,
    terms: Terms,
    limits: Mapping[str, int],
    smallest: Mapping[str, int],
    points: int,
    pairs: Pairs | None = None,
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
        solution = solve(scores, terms, at, pairs)
        if solution is not None and solution not in found:
            found.append(solution)
    return found
