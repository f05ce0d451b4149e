"""Seeds: exact solutions of the multiple-choice knapsack along the budget range.

    min Σ_l S[l, o_l] + Σ_{i<j} Q_ij[o_i, o_j]
    such that floor_c <= Σ_l cost_c[l, o_l] <= limit_c for every limited cost c,

one option o_l a layer; Q, what pairs of layers add (CLADO, arXiv 2307.05657), and floors may be
left out. One limit alone is a dynamic programme (`_by_states`), anything else an integer program
for HiGHS (scipy). Both leave no more than 2⁻³³ of the largest score between a solution and the
optimum, and check limits in integers.
"""

import math
import time
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

GAP = 2.0**-20
"""The optimality gap, of scores that `unitless` puts between 0 and 2¹³."""
STATES = 2**22  # a few hundred megabytes; hard instances of 200 layers get to a quarter of it


def solve(
    scores: Scores,
    terms: Terms,
    limits: Mapping[str, int],
    pairs: Pairs | None = None,
    *,
    floors: Mapping[str, int] | None = None,
    seconds: float = math.inf,
) -> list[int] | None:
    """The option index of each layer that minimises the summed score within the limits.

    `scores[l][o]` and `terms[l][o][cost]` belong to option o of layer l. The unit of scores and
    pairs does not matter (`unitless`). `floors` are costs to be reached at least.

    None when no choice meets limits and floors. After `seconds` it is the best choice found so
    far, or None if there is none; with pairs, never one worse than the optimum without.
    """
    # a constant array prefers nothing
    coupled = {pair: q for pair, q in (pairs or {}).items() if np.ptp(q) > 0}
    if coupled:
        found = _by_program(scores, terms, limits, coupled, floors or {}, seconds)
        if math.isinf(seconds):
            return found
        linear = solve(scores, terms, limits, floors=floors, seconds=seconds)
        both = [choice for choice in (found, linear) if choice is not None]
        return min(both, key=lambda choice: value(scores, choice, coupled), default=None)
    if len(limits) == 1 and not floors:
        (name,) = limits
        costs = [np.array([term[name] for term in layer], dtype=np.int64) for layer in terms]
        return _by_states(scores, costs, limits[name], seconds)
    return _by_program(scores, terms, limits, {}, floors or {}, seconds)


def value(scores: Scores, choice: Sequence[int], pairs: Pairs | None = None) -> float:
    """What is minimised."""
    own = sum(float(row[o]) for row, o in zip(scores, choice, strict=True))
    return own + sum(float(q[choice[i], choice[j]]) for (i, j), q in (pairs or {}).items())


def totals(terms: Terms, choice: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    """The summed costs of a choice."""
    return {
        name: sum(layer[o][name] for layer, o in zip(terms, choice, strict=True)) for name in names
    }


def _by_states(
    scores: Scores, costs: Sequence[npt.NDArray[np.int64]], limit: int, seconds: float
) -> list[int] | None:
    """One limit, by dynamic programming over the layers with bounds (Dyer, Riha and Walker 1995;
    Pisinger, EJOR 83, 1995).

    A state is the (cost, score) of options for the layers so far. It goes when another one is no
    dearer and no worse, or when the linear relaxation of the layers to come cannot bring it below
    the best choice so far. The relaxation takes the steps of the layers' lower convex hulls, the
    most efficient first; the whole steps among those are a choice, too. Layers whose costs differ
    most come first, so that those to come fill the room well.

    Stops with the best choice so far after `seconds`, and at STATES states, which takes scores
    that are proportional to costs.
    """
    end = time.monotonic() + seconds
    entries = unitless(scores, 46)
    rows = np.split(entries, np.cumsum([len(s) for s in scores])[:-1])
    order = sorted(range(len(scores)), key=lambda layer: int(-np.ptp(costs[layer])))
    layers = [_Layer.of(rows[i], costs[i]) for i in order]
    tails = _tails(layers)
    if tails[0].cost[0] > limit:
        return None
    cost, score = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []  # (state before, option)
    best, found = math.inf, (0, 0, 0)  # layers that are set, their state, steps of those to come
    for depth, tail in enumerate(tails):
        whole = np.searchsorted(tail.cost, limit - cost, side="right") - 1
        reached = score + tail.score[whole]
        first = int(reached.argmin())
        if reached[first] < best:
            best, found = float(reached[first]), (depth, first, int(whole[first]))
        bound = score + np.interp(limit - cost, tail.cost, tail.score)
        (kept,) = np.nonzero(bound < best - GAP)
        if depth == len(layers) or not 0 < len(kept) < STATES or time.monotonic() > end:
            break
        layer = layers[depth]
        before = np.repeat(kept, len(layer.cost))
        option = np.tile(np.arange(len(layer.cost)), len(kept))
        cost, score = cost[before] + layer.cost[option], score[before] + layer.score[option]
        (fits,) = np.nonzero(cost + tails[depth + 1].cost[0] <= limit)
        fits = fits[_undominated(cost[fits], score[fits])]
        cost, score = cost[fits], score[fits]
        trail.append((before[fits], option[fits]))
    depth, state, whole_steps = found
    at = [int(layer.hull[0]) for layer in layers]
    for step in range(whole_steps):  # a layer's own are in the order of their hull
        i = int(tails[depth].layer[step])
        at[i] = int(layers[i].hull[np.searchsorted(layers[i].hull, at[i]) + 1])
    for i in reversed(range(depth)):
        states, options = trail[i]
        at[i], state = int(options[state]), int(states[state])
    chosen = [0] * len(layers)
    for i, layer in enumerate(layers):
        chosen[order[i]] = int(layer.option[at[i]])
    return chosen


@dataclass(frozen=True)
class _Layer:
    """Options that no other one beats, cheapest first; `hull` are the places of those on the
    lower convex hull of score against cost."""

    option: npt.NDArray[np.intp]
    cost: npt.NDArray[np.int64]
    score: Array
    hull: npt.NDArray[np.intp]

    @staticmethod
    def of(score: Array, cost: npt.NDArray[np.int64]) -> "_Layer":
        option = _undominated(cost, score)
        cost, score = cost[option], score[option]
        hull: list[int] = []
        for i in range(len(option)):
            while len(hull) > 1:
                a, b = hull[-2:]
                if (score[i] - score[b]) * float(cost[b] - cost[a]) > (score[b] - score[a]) * float(
                    cost[i] - cost[b]
                ):
                    break
                hull.pop()
            hull.append(i)
        return _Layer(option, cost, score, np.array(hull))


@dataclass(frozen=True)
class _Tail:
    """The linear relaxation of the layers from some depth on: its (cost, score) after each number
    of steps, and the layer of each step."""

    cost: npt.NDArray[np.int64]
    score: Array
    layer: npt.NDArray[np.intp]


def _tails(layers: Sequence[_Layer]) -> list[_Tail]:
    """The relaxations of all layers, of all but the first, and so on to none."""
    lengths = [len(layer.hull) - 1 for layer in layers]
    owner = np.repeat(np.arange(len(layers)), lengths)
    cost = np.concatenate([np.diff(layer.cost[layer.hull]) for layer in layers])
    score = np.concatenate([np.diff(layer.score[layer.hull]) for layer in layers])
    order = np.argsort(score / cost, kind="stable")
    owner, cost, score = owner[order], cost[order], score[order]
    # of the cheapest options of the layers from each depth on
    least, most = (
        np.cumsum([0, *reversed(ends)])[::-1]
        for ends in ([la.cost[0] for la in layers], [la.score[0] for la in layers])
    )
    tails = []
    for depth in range(len(layers) + 1):
        steps = owner >= depth
        tails.append(
            _Tail(
                np.concatenate([least[depth : depth + 1], cost[steps]]).cumsum(),
                np.concatenate([most[depth : depth + 1], score[steps]]).cumsum(),
                owner[steps],
            )
        )
    return tails


def _undominated(cost: npt.NDArray[np.int64], score: Array) -> npt.NDArray[np.intp]:
    """Indices, cheapest first, of those that score better than all that cost no more."""
    order = np.lexsort((score, cost))
    least = np.minimum.accumulate(score[order])
    return order[np.concatenate([[True], score[order][1:] < least[:-1]])]


def _by_program(
    scores: Scores,
    terms: Terms,
    limits: Mapping[str, int],
    pairs: Pairs,
    floors: Mapping[str, int],
    seconds: float,
) -> list[int] | None:
    """Any limits and pairs, by integer programming.

    A product z_ia z_jb of two layers' binary choices becomes a variable y_ia,jb in [0, 1] with
    Σ_b y_ia,jb = z_ia and Σ_a y_ia,jb = z_jb; with binary z it can be nothing but the product.
    Options whose pairs are equal (the same weight bits, other input bits) share a variable.
    """
    sizes = [len(s) for s in scores]
    starts = np.cumsum([0, *sizes])
    choices = starts[-1]
    # options that all others meet alike are one class
    coupled = {pair: (_classes(q), _classes(q.T)) for pair, q in pairs.items()}
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
    for name in limits.keys() | floors.keys():
        # relative to each layer's cheapest option: the solver then sees the differences alone
        cheapest = [min(term[name] for term in layer) for layer in terms]
        row = np.array(
            [term[name] - c for layer, c in zip(terms, cheapest, strict=True) for term in layer],
            dtype=np.float64,
        )
        unit = max(row.max(), 1.0)
        low, high = (
            (end - sum(cheapest)) / unit
            for end in (floors.get(name, -math.inf), limits.get(name, math.inf))
        )
        constraints.append(LinearConstraint(over_choices(row[None] / unit), low, high))
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        result = milp(
            objective,
            integrality=np.arange(len(objective)) < choices,
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0} | ({} if math.isinf(left) else {"time_limit": left}),
        )
        if result.x is None:
            return None
        chosen = [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]
        cost = totals(terms, chosen, [*limits, *floors])
        # The tolerance let it slip. Whatever costs as much in every layer is over the limit too:
        # at least one layer has to take something cheaper. No point within the limits is cut off.
        # The same holds below a floor.
        wrong = [(name, 1) for name, limit in limits.items() if cost[name] > limit]
        wrong += [(name, -1) for name, floor in floors.items() if cost[name] < floor]
        if not wrong:
            return chosen
        for name, sign in wrong:
            as_far = [
                float(sign * (term[name] - layer[o][name]) >= 0)
                for layer, o in zip(terms, chosen, strict=True)
                for term in layer
            ]
            constraints.append(
                LinearConstraint(over_choices(np.array([as_far])), -np.inf, len(sizes) - 1)
            )
    return None


@dataclass(frozen=True)
class _Classes:
    """Equal rows of an array: the class `of` each row, and the `first` row of each class."""

    of: npt.NDArray[np.intp]
    first: npt.NDArray[np.intp]


def _classes(rows: Array) -> _Classes:
    _, first, of = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return _Classes(of.reshape(-1), first)


def unitless(arrays: Sequence[Array], digits: int = 33) -> Array:
    """All entries in one row, each array relative to its least, on a grid from 0 to 2¹³.

    The steps are 2^−digits of the largest entry. With 33 they are as fine as HiGHS's absolute gap
    (10⁻⁶), and coarse enough that another unit, which moves last bits, gives the same numbers. Not
    decimal: scores that are short decimals would lie half-way between two of its steps.
    """
    row = np.concatenate([np.ravel(a).astype(np.float64) - np.min(a) for a in arrays])
    largest = row.max()
    return np.rint(row / largest * 2.0**digits) / 2.0 ** (digits - 13) if largest > 0 else row


def topped_up(
    scores: Scores,
    terms: Terms,
    limits: Mapping[str, int],
    choice: Sequence[int],
    pairs: Pairs | None = None,
) -> list[int]:
    """The choice after exchanging options, layer by layer, for ones that score no worse, fit, and
    use more of some limit and less of none, until there are none left."""
    chosen, names = list(choice), list(limits)
    beside: list[list[tuple[int, Array]]] = [[] for _ in terms]  # (other layer, own options first)
    for (i, j), q in (pairs or {}).items():
        beside[i].append((j, q))
        beside[j].append((i, q.T))
    room = {name: limits[name] - used for name, used in totals(terms, chosen, names).items()}
    exchanged = True
    while exchanged:
        exchanged = False
        for i, layer in enumerate(terms):
            now = chosen[i]
            row = scores[i] + sum(q[:, chosen[j]] for j, q in beside[i])
            for o in np.argsort(row, kind="stable"):
                more = {name: layer[o][name] - layer[now][name] for name in names}
                fits = all(0 <= more[name] <= room[name] for name in names)
                if row[o] <= row[now] and fits and any(more.values()):
                    chosen[i], exchanged = int(o), True
                    room = {name: room[name] - more[name] for name in names}
                    break
    return chosen


def sweep(
    scores: Scores,
    terms: Terms,
    wanted: Sequence[Mapping[str, int]],
    pairs: Pairs | None = None,
    seconds: float = math.inf,
) -> list[list[int]]:
    """Solutions within each of the limits, topped up to them, each solution once.

    All together take about `seconds` at most, see `solve`.
    """
    end = time.monotonic() + seconds
    found: list[list[int]] = []
    for i, limits in enumerate(wanted):
        share = max(0.0, end - time.monotonic()) / (len(wanted) - i)
        solution = solve(scores, terms, limits, pairs, seconds=share)
        if solution is not None:
            solution = topped_up(scores, terms, limits, solution, pairs)
            if solution not in found:
                found.append(solution)
    return found


def budgets(
    limits: Mapping[str, int], tops: Mapping[str, int], smallest: Mapping[str, int], points: int
) -> list[dict[str, int]]:
    """The limits of an ε-constraint sweep below the full ones, down towards `smallest`.

    At fractions t = 1 − 1/points, ..., 1/points, each of the costs `tops` alone is held to
    smallest + t·(top − smallest), with the others at their full limits; then all at once. Such a
    sweep finds the points in non-convex parts of the front too, which a weighted sum never does.
    """
    found: list[dict[str, int]] = []
    for i in range(points - 1, 0, -1):
        at = {n: smallest[n] + (top - smallest[n]) * i // points for n, top in tops.items()}
        found += [{**limits, name: limit} for name, limit in at.items()]
        if len(at) > 1:
            found.append(at)
    return found
