"""The search space: what is pinned, what is free, and both ways of writing a point."""

from collections.abc import Sequence

import pytest
from toy_space import all_points, largest, smallest, spread, totals_by_hand, toy_layers, toy_space

from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.spec import BitVector
from adq.search.config import layer_bits
from adq.search.space import Choices, Space, act_order, make_space, objectives, option_terms

FOUR = [(2, 3, 1), (4, 2, 5), (3, 4, 2), (2, 3, 1)]


def space_of(bits: tuple[int, ...], act: tuple[int, ...], first_last: int) -> Space:
    return make_space(toy_layers(FOUR), bits, act, first_last)


def test_first_and_last_layer_are_pinned_and_the_others_are_free() -> None:
    space = space_of((4, 2), (8,), 8)
    assert [la.name for la in space.groups] == ["l0", "l1", "l2", "l3"]
    assert [la.weight for la in space.groups] == [(8,), (2, 4), (2, 4), (8,)]
    assert [la.act for la in space.groups] == [(8,)] * 4
    assert space.searched == ("l1", "l2")
    assert space.size == 4


def test_zero_pins_nothing() -> None:
    space = space_of((2, 4, 3), (4, 8), 0)
    assert all(la.weight == (2, 3, 4) and la.act == (4, 8) for la in space.groups)
    assert space.size == 6**4


def test_a_pinned_layers_input_follows_unless_all_inputs_stay_in_fp32() -> None:
    assert [la.act for la in space_of((2, 4), (4, 8), 6).groups] == [(6,), (4, 8), (4, 8), (6,)]
    assert [la.act for la in space_of((2, 4), (0,), 6).groups] == [(0,)] * 4
    assert [la.act for la in space_of((2, 4), (0, 4), 6).groups] == [(6,), (4, 0), (4, 0), (6,)]


def test_fp32_is_the_most_input_bits() -> None:
    assert sorted([0, 8, 2, 4], key=act_order) == [2, 4, 8, 0]
    space = space_of((3, 2), (0, 4, 8), 0)
    assert smallest(space) == [(2, 4)] * 4
    assert largest(space) == [(3, 0)] * 4


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
            row[group.options.index(option)]
            for row, group, option in zip(terms, space.groups, point, strict=True)
        ]
        summed = {name: sum(term[name] for term in picked) for name in picked[0]}
        assert summed == costs.totals(space.bit_vector(point))


def given(text: str, first_last: int = 8, ties: Sequence[Sequence[str]] = ()) -> Space:
    return make_space(toy_layers(FIVE), (2, 4), (4, 8), first_last, ties, layer_bits(text))


def test_layers_are_given_choices_by_name_and_pattern() -> None:
    space = given("l1=3,l[23]=2+6/8,l4=/0+4")
    assert [g.weight for g in space.groups] == [(8,), (3,), (2, 6), (2, 6), (8,)]
    assert [g.act for g in space.groups] == [(8,), (4, 8), (8,), (8,), (4, 0)]
    assert space.searched == ("l2", "l3")
    assert space.weight_choices == (2, 3, 6, 8)  # l1 and l4 have a choice of input bits
    assert space.uniform(4) == [(8, 8), (3, 8), (2, 8), (2, 8), (8, 0)]
    free_ends = given("l0=4+8,l4=2+3/8")
    assert [g.weight for g in free_ends.groups] == [(4, 8), (2, 4), (2, 4), (2, 4), (2, 3)]
    assert [g.act for g in free_ends.groups] == [(4, 8), (4, 8), (4, 8), (4, 8), (8,)]


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("l2=3,l*=6", [6, 6, 3, 6, 6]),  # a name before a pattern, wherever it stands
        ("l*=6,l2=3", [6, 6, 3, 6, 6]),
        ("l*=6,l[12]=3", [6, 3, 3, 6, 6]),  # of patterns the later
        ("l[12]=3,l*=6", [6] * 5),
        ("l?=6,l[12]=3,l*=/8", [6, 3, 3, 6, 6]),  # which says nothing of weights
    ],
)
def test_of_several_entries_the_name_or_the_later_pattern_holds(
    text: str, weight: list[int]
) -> None:
    assert [g.weight for g in given(text).groups] == [(w,) for w in weight]


def test_a_layer_that_is_not_there_is_refused_with_those_like_it() -> None:
    layers = [LayerInfo(n, "Linear", (2, 2), (2,), 4, 2) for n in ("conv1", "conv2", "a.fc", "b")]
    for text, hint in (
        ("conv1=3,convv2=3", "'convv2' matches .*; did you mean 'conv2' or 'conv1'"),
        ("Conv*=3", r"'Conv\*' matches no layer that can be quantized; did you mean 'conv"),
        ("a.fcc.*=3", r"'a.fcc.\*' matches .*; did you mean 'a.fc'\?$"),
        ("zzzzz=3", "'zzzzz' matches no layer that can be quantized$"),
    ):
        with pytest.raises(InputError, match=f"^layers: {hint}"):
            make_space(layers, (2, 4), (8,), 8, (), layer_bits(text))


def test_what_is_given_for_one_layer_holds_for_those_tied_to_it() -> None:
    ties = [("l1", "l2", "l3")]
    space = given("l2=3+6", ties=ties)
    assert [(g.names, g.weight) for g in space.groups][1] == (("l1", "l2", "l3"), (3, 6))
    both = given("l1=3+6,l[23]=6+3/8", ties=ties).groups[1]
    assert (both.weight, both.act) == ((3, 6), (8,))
    with pytest.raises(InputError, match=r"'l1' and 'l3' share .* are given 3\+6 and 2\+3"):
        given("l1=3+6,l3=2+3", ties=ties)
    with pytest.raises(InputError, match=r"'l1' and 'l3' share .* are given 4 and 8"):
        given("l1=/4,l[23]=/8", ties=ties)


def test_a_layer_pinned_by_name_leaves_its_group_and_one_pinned_by_a_pattern_pins_it() -> None:
    ties = [("l1", "l2", "l3")]
    alone = given("l2=3", ties=ties)
    assert [g.names for g in alone.groups] == [("l0",), ("l1", "l3"), ("l2",), ("l4",)]
    assert [g.weight for g in alone.groups] == [(8,), (2, 4), (3,), (8,)]
    whole = given("l[2]=3", ties=ties)
    assert [g.names for g in whole.groups] == [("l0",), ("l1", "l2", "l3"), ("l4",)]
    assert [g.weight for g in whole.groups] == [(8,), (3,), (8,)]
    freed = given("l0=2+4", ties=[("l0", "l1")])  # the first layer is no longer pinned
    assert freed.groups[0] == Choices(("l0", "l1"), (2, 4), (4, 8))


@pytest.mark.parametrize(
    ("limits", "act", "expected"),
    [
        (["size_bytes"], (8,), ("size_bytes",)),
        (["size_bytes"], (4, 8), ("size_bytes", "bops")),
        (["bops", "latency_s"], (4, 8), ("bops", "latency_s")),
    ],
)
def test_a_choice_of_input_bits_makes_bit_operations_an_objective(
    limits: list[str], act: tuple[int, ...], expected: tuple[str, ...]
) -> None:
    assert objectives(space_of((2, 4), act, 8), limits) == expected


TIED = [("l0", "l3"), ("l1", "l4")]
FIVE = [*FOUR, (3, 3, 4)]


def test_tied_layers_are_one_group_where_the_first_of_them_runs() -> None:
    space, _ = toy_space(FIVE, (4, 2), (8, 4), 0, TIED)
    assert space.layers == ("l0", "l1", "l2", "l3", "l4")
    names = [("l0", "l3"), ("l1", "l4"), ("l2",)]
    assert list(space.groups) == [Choices(group, (2, 4), (4, 8)) for group in names]
    assert [group.name for group in space.groups] == ["l0", "l1", "l2"]
    assert space.size == 4**3
    assert space.searched == space.layers
    assert space.weight_choices == (2, 4)
    assert space.uniform(4) == largest(space) == [(4, 8)] * 3
    assert smallest(space) == [(2, 4)] * 3
    assert list(space.distributions()) == [f"{k}:l{i}" for i in range(3) for k in ("weight", "act")]
    assert space.bit_options == {name: [(2, 4), (2, 8), (4, 4), (4, 8)] for name in space.layers}


def test_the_order_of_ties_and_of_their_names_makes_no_difference() -> None:
    space = toy_space(FIVE, ties=TIED)[0]
    assert toy_space(FIVE, ties=[("l4", "l1"), ("l3", "l0")])[0] == space
    assert repr(toy_space(FIVE, ties=TIED[:1])[0]) != repr(space)  # what the cache's key is made of


@pytest.mark.parametrize(
    ("tie", "left"),
    [
        (("l0", "l2"), [("l0",), ("l1",), ("l2",), ("l3",), ("l4",)]),
        (("l1", "l4"), [("l0",), ("l1",), ("l2",), ("l3",), ("l4",)]),
        (("l0", "l1", "l3"), [("l0",), ("l1", "l3"), ("l2",), ("l4",)]),
        (("l0", "l4"), [("l0",), ("l1",), ("l2",), ("l3",), ("l4",)]),
    ],
)
def test_a_pinned_layer_leaves_its_group(tie: tuple[str, ...], left: list[tuple[str, ...]]) -> None:
    space, _ = toy_space(FIVE, (2, 4), (8,), 6, [tie])
    assert [group.names for group in space.groups] == left
    pins = [(6,), *[(2, 4)] * (len(left) - 2), (6,)]
    assert [group.weight for group in space.groups] == pins
    assert space.searched == ("l1", "l2", "l3")


@pytest.mark.parametrize("first_last", [0, 8])
@pytest.mark.parametrize("act", [(8,), (0, 4)])
def test_every_point_of_a_tied_space_is_encoded_and_costs_what_its_layers_do(
    first_last: int, act: tuple[int, ...]
) -> None:
    ties = TIED if first_last == 0 else [("l1", "l3")]
    space, costs = toy_space(FIVE, (2, 3), act, first_last, ties)
    terms = option_terms(space, costs)
    points = list(all_points(space))
    assert len(points) == space.size == (2 * len(act)) ** (3 if first_last == 0 else 2)
    keys = set()
    for point in points:
        params = space.encode(point)
        assert params.keys() == space.distributions().keys()
        assert space.decode(params) == point
        options = spread(space, point)
        vector = space.bit_vector(point)
        assert list(vector.weight) == ["l0", "l1", "l2", "l3", "l4"]
        assert list(vector.weight.values()) == [w for w, _ in options]
        assert dict(vector.act) == {f"l{i}": a for i, (_, a) in enumerate(options) if a}
        for tie in ties:
            assert len({(vector.weight[name], vector.act.get(name)) for name in tie}) == 1
        keys.add(vector.key)
        summed = dict.fromkeys(costs.names, 0)
        for row, group, option in zip(terms, space.groups, point, strict=True):
            for name, term in row[group.options.index(option)].items():
                summed[name] += term
        assert summed == costs.totals(vector) == totals_by_hand(FIVE, options)
    assert len(keys) == space.size
