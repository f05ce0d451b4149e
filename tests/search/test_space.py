"""The search space: what is pinned, what is free, and both ways of writing a point."""

import pytest
from toy_space import all_points, toy_layers, toy_space

from adq.quant.spec import BitVector
from adq.search.space import Space, act_order, make_space, option_terms

FOUR = [(2, 3, 1), (4, 2, 5), (3, 4, 2), (2, 3, 1)]


def space_of(bits: tuple[int, ...], act: tuple[int, ...], first_last: int) -> Space:
    return make_space(toy_layers(FOUR), bits, act, first_last)


def test_first_and_last_layer_are_pinned_and_the_others_are_free() -> None:
    space = space_of((4, 2), (8,), 8)
    assert [la.name for la in space.layers] == ["l0", "l1", "l2", "l3"]
    assert [la.weight for la in space.layers] == [(8,), (2, 4), (2, 4), (8,)]
    assert [la.act for la in space.layers] == [(8,)] * 4
    assert space.searched == ("l1", "l2")
    assert space.size == 4


def test_zero_pins_nothing() -> None:
    space = space_of((2, 4, 3), (4, 8), 0)
    assert all(la.weight == (2, 3, 4) and la.act == (4, 8) for la in space.layers)
    assert space.size == 6**4


def test_a_pinned_layers_input_follows_unless_all_inputs_stay_in_fp32() -> None:
    assert [la.act for la in space_of((2, 4), (4, 8), 6).layers] == [(6,), (4, 8), (4, 8), (6,)]
    assert [la.act for la in space_of((2, 4), (0,), 6).layers] == [(0,)] * 4
    assert [la.act for la in space_of((2, 4), (0, 4), 6).layers] == [(6,), (4, 0), (4, 0), (6,)]


def test_fp32_is_the_most_input_bits() -> None:
    assert sorted([0, 8, 2, 4], key=act_order) == [2, 4, 8, 0]
    space = space_of((3, 2), (0, 4, 8), 0)
    assert space.smallest() == [(2, 4)] * 4
    assert space.largest() == [(3, 0)] * 4


def test_parameters_are_the_choices_and_nothing_else() -> None:
    distributions = space_of((2, 4), (4, 8), 8).distributions()
    assert {k: d.choices for k, d in distributions.items()} == {
        "weight:l1": (2, 4),
        "act:l1": (4, 8),
        "weight:l2": (2, 4),
        "act:l2": (4, 8),
    }


@pytest.mark.parametrize(
    ("bits", "act", "first_last"), [((2, 4), (8,), 8), ((3,), (0, 4), 6), ((2, 3), (4, 8), 0)]
)
def test_every_point_survives_encoding_and_no_two_share_a_bit_vector(
    bits: tuple[int, ...], act: tuple[int, ...], first_last: int
) -> None:
    space = space_of(bits, act, first_last)
    points = list(all_points(space))
    assert len(points) == space.size
    keys = set()
    for point in points:
        params = space.encode(point)
        assert params.keys() == space.distributions().keys()
        assert space.decode(params) == point
        keys.add(space.bit_vector(point).key)
    assert len(keys) == space.size


def test_a_bit_vector_leaves_fp32_inputs_out() -> None:
    space = space_of((2, 4), (0, 8), 0)
    vector = space.bit_vector([(2, 0), (4, 8), (2, 8), (4, 0)])
    assert vector == BitVector({"l0": 2, "l1": 4, "l2": 2, "l3": 4}, {"l1": 8, "l2": 8})


def test_a_uniform_point_keeps_pins_and_takes_the_most_input_bits() -> None:
    assert space_of((2, 4), (4, 8), 6).uniform(2) == [(6, 6), (2, 8), (2, 8), (6, 6)]
    assert space_of((2, 4), (4, 0), 0).uniform(4) == [(4, 0)] * 4


@pytest.mark.parametrize(
    ("bits", "act", "first_last", "choices"),
    [
        ((2, 4), (8,), 8, (2, 4)),
        ((6, 4), (8,), 2, (4, 6)),
        ((2, 4), (8,), 0, (2, 4)),
        ((3,), (4, 8), 8, (3,)),
    ],
)
def test_the_choices_of_weight_bits_leave_the_pins_out(
    bits: tuple[int, ...], act: tuple[int, ...], first_last: int, choices: tuple[int, ...]
) -> None:
    assert space_of(bits, act, first_last).weight_choices == choices


def test_option_terms_add_up_to_the_costs_of_a_bit_vector() -> None:
    space, costs = toy_space(FOUR, (2, 3), (0, 4), 8)
    terms = option_terms(space, costs)
    for point in all_points(space):
        picked = [
            row[layer.options.index(option)]
            for row, layer, option in zip(terms, space.layers, point, strict=True)
        ]
        summed = {name: sum(term[name] for term in picked) for name in picked[0]}
        assert summed == costs.totals(space.bit_vector(point))
