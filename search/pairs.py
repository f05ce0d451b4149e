"""What pairs of layers add, over the options of a space."""

import numpy as np

from adq.proxies.base import Interactions
from adq.search.knapsack import Array, Pairs
from adq.search.space import Space


def option_pairs(space: Space, interactions: Interactions) -> tuple[list[Array], Pairs]:
    """What pairs of layers add within each group, and within each pair of groups.

    First, for each group g, an array over its options: Σ of the pairs of its own, tied layers, to
    be added to its scores. Then (g, h), g < h -> array (options of g, options of h): Σ over the
    layers m of g and n of h of `value[m, bits of g, n, bits of h]`, pairs that add nothing left
    out. Options are in `Choices.options` order; input bits make no difference, and layers that
    `interactions` has not add nothing. Raises ValueError for weight bits that it has not.
    """
    row = {name: i for i, name in enumerate(interactions.layers)}
    rows = [[row[name] for name in group.names if name in row] for group in space.groups]
    columns = [[interactions.bits.index(w) for w, _ in group.options] for group in space.groups]

    def between(g: int, h: int) -> Array:
        at = np.ix_(rows[g], columns[g], rows[h], columns[h])
        return np.asarray(interactions.value[at].sum(axis=(0, 2)))

    groups = range(len(space.groups))
    # each two layers of a group meet twice there
    own = [between(g, g).diagonal() / 2 for g in groups]
    pairs = {(g, h): between(g, h) for g in groups for h in groups if g < h}
    return own, {pair: q for pair, q in pairs.items() if q.any()}
