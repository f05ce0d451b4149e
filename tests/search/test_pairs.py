"""Pairs over options, against a loop over all pairs of layers."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from toy_space import all_points

from adq.proxies.base import Interactions
from adq.search.pairs import option_pairs
from adq.search.space import Choices, Space

BITS = (8, 2, 4)  # in no order


def interactions(layers: Sequence[str], seed: int = 0) -> Interactions:
    count = len(layers) * len(BITS)
    half = np.triu(np.random.default_rng(seed).normal(size=(count, count)))
    value = (half + half.T).reshape(len(layers), len(BITS), len(layers), len(BITS))
    for i in range(len(layers)):
        value[i, :, i, :] = 0
    return Interactions(tuple(layers), BITS, value, np.zeros_like(value))


def total_by_hand(found: Interactions, bits: dict[str, int]) -> float:
    return sum(
        found.value[i, BITS.index(bits[one]), j, BITS.index(bits[other])]
        for (i, one), (j, other) in combinations(enumerate(found.layers), 2)
    )


@pytest.mark.parametrize("measured", ["abcdef", "fbd", "ad"])
def test_the_parts_of_a_point_sum_to_the_pairs_of_its_layers(measured: str) -> None:
    """Groups of one, two and three layers, pinned or not, of inputs with and without a choice."""
    space = Space(
        tuple("abcdef"),
        (
            Choices(("a",), (8,), (8,)),
            Choices(("b", "d"), (2, 4, 8), (0,)),
            Choices(("c", "e", "f"), (2, 4), (8, 0)),
        ),
    )
    found = interactions(measured)
    own, pairs = option_pairs(space, found)
    assert all(i < j for i, j in pairs)
    for point in all_points(space):
        at = [g.options.index(option) for g, option in zip(space.groups, point, strict=True)]
        total = sum(own[g][o] for g, o in enumerate(at))
        total += sum(q[at[g], at[h]] for (g, h), q in pairs.items())
        bits = dict(space.bit_vector(point).weight)
        assert total == pytest.approx(total_by_hand(found, bits), abs=1e-12)


def test_groups_that_do_not_interact_form_no_pair() -> None:
    groups = tuple(Choices((name,), (2, 4, 8), (0,)) for name in "abc")
    own, pairs = option_pairs(Space(("a", "b", "c"), groups), interactions("ac"))
    assert list(pairs) == [(0, 2)]
    assert not np.any(own)


def test_bits_that_were_not_measured_are_refused() -> None:
    space = Space(("a",), (Choices(("a",), (3, 4), (0,)),))
    with pytest.raises(ValueError, match="not in tuple"):
        option_pairs(space, interactions("a"))
