"""The search space: for each group of tied layers the bits its weights and inputs may get."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from math import prod

from optuna.distributions import CategoricalDistribution

from adq.proxies.costs import CostModel
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.spec import BitVector
from adq.search.config import LayerBits

FP32 = 0  # the choice "keep this input in FP32"
Option = tuple[int, int]
"""(weight bits, input bits) of the layers of one group; input bits 0 stand for FP32."""


@dataclass(frozen=True)
class Choices:
    """What one group may get: layers that share their bits, mostly a single one."""

    names: tuple[str, ...]
    weight: tuple[int, ...]
    act: tuple[int, ...]

    @property
    def name(self) -> str:
        """The first layer's, which stands for the group."""
        return self.names[0]

    @property
    def options(self) -> list[Option]:
        """All pairs, fewest bits first."""
        return list(product(self.weight, self.act))


@dataclass(frozen=True)
class Space:
    """Choices of every quantized layer.

    `layers` are in the order in which the model runs them, and so are `groups`, by their first
    layers. A point of the space is a list of options, one a group. As Optuna parameters it reads
    `weight:LAYER` and `act:LAYER`, LAYER being the group's first, with the bits themselves as
    values; groups without a choice have no parameter.
    """

    layers: tuple[str, ...]
    groups: tuple[Choices, ...]

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the layers whose weight bits are free."""
        free = {name for group in self.groups if len(group.weight) > 1 for name in group.names}
        return tuple(name for name in self.layers if name in free)

    @property
    def weight_choices(self) -> tuple[int, ...]:
        """The weight bits that a layer which is not pinned may get, fewest first."""
        free = (group for group in self.groups if len(group.weight) * len(group.act) > 1)
        return tuple(sorted({bits for group in free for bits in group.weight}))

    @property
    def size(self) -> int:
        return prod(len(group.weight) * len(group.act) for group in self.groups)

    @property
    def bit_options(self) -> dict[str, list[tuple[int, int | None]]]:
        """Layer name -> its (weight bits, input bits), with None for FP32."""
        return {
            name: [(w, None if a == FP32 else a) for w, a in group.options]
            for group in self.groups
            for name in group.names
        }

    def distributions(self) -> dict[str, CategoricalDistribution]:
        found: dict[str, CategoricalDistribution] = {}
        for group in self.groups:
            for kind, choices in (("weight", group.weight), ("act", group.act)):
                if len(choices) > 1:
                    found[f"{kind}:{group.name}"] = CategoricalDistribution(choices)
        return found

    def encode(self, point: Sequence[Option]) -> dict[str, int]:
        """The Optuna parameters of a point."""
        names = self.distributions()
        values: dict[str, int] = {}
        for group, (weight, act) in zip(self.groups, point, strict=True):
            values |= {f"weight:{group.name}": weight, f"act:{group.name}": act}
        return {name: values[name] for name in names}

    def decode(self, params: Mapping[str, int]) -> list[Option]:
        """The inverse of `encode`."""
        return [
            (
                params.get(f"weight:{group.name}", group.weight[0]),
                params.get(f"act:{group.name}", group.act[0]),
            )
            for group in self.groups
        ]

    def bit_vector(self, point: Sequence[Option]) -> BitVector:
        """The bits of every layer, in the model's order."""
        bits = {
            name: option
            for group, option in zip(self.groups, point, strict=True)
            for name in group.names
        }
        return BitVector(
            {name: bits[name][0] for name in self.layers},
            {name: bits[name][1] for name in self.layers if bits[name][1] != FP32},
        )

    def uniform(self, weight: int) -> list[Option]:
        """The most of each layer's choices that are no more than `weight` bits, else the fewest,
        and the most input bits."""
        return [
            (
                max((w for w in group.weight if w <= weight), default=group.weight[0]),
                max(group.act, key=act_order),
            )
            for group in self.groups
        ]


def act_order(bits: int) -> float:
    """Input bits from fewest to most; FP32 is the most."""
    return float("inf") if bits == FP32 else bits


def make_space(
    layers: Sequence[LayerInfo],
    weight_bits: Sequence[int],
    act_bits: Sequence[int],
    first_last_bits: int,
    ties: Sequence[Sequence[str]] = (),
    given: Sequence[LayerBits] = (),
) -> Space:
    """Every group of layers gets all choices, but the first and last layer, which are pinned.

    `first_last_bits` pins both (weights; their inputs too, unless `act_bits` is FP32 alone);
    0 pins nothing. `ties` are disjoint groups of layer names; a pinned layer leaves its group.

    What is `given` for layers takes the place of all this. A first or last layer that is given
    weight bits is like any other; a layer named with a single number of them is pinned. A name
    goes before patterns (case-sensitive, `*`, `?`, `[...]`), a later pattern before an earlier one.
    What is given for a layer holds for its group.

    Raises InputError for a pattern that matches no layer, and where the layers of a group are
    given different choices.
    """
    weight = tuple(sorted(set(weight_bits)))
    act = _act_choices(act_bits)
    pinned_act = (FP32,) if act == (FP32,) else (first_last_bits,)
    names = tuple(layer.name for layer in layers)
    given_weight, given_act = given_choices(given, names)
    ends = {names[0], names[-1]} - given_weight.keys() if first_last_bits else set()
    pinned = ends | {one.pattern for one in given if one.weight and len(one.weight) == 1}
    group_of: dict[str, tuple[str, ...]] = {}
    for tie in ties:
        free = tuple(name for name in names if name in set(tie) - pinned)
        group_of |= dict.fromkeys(free, free)
    groups = []
    for name in names:
        group = group_of.get(name, (name,))
        if name == group[0]:
            end = name in ends
            groups.append(
                Choices(
                    group,
                    _shared(group, given_weight) or ((first_last_bits,) if end else weight),
                    _shared(group, given_act) or (pinned_act if end else act),
                )
            )
    return Space(names, tuple(groups))


Given = dict[str, tuple[int, ...]]


def given_choices(given: Sequence[LayerBits], names: Sequence[str]) -> tuple[Given, Given]:
    """Layer name -> the weight bits, and the input bits, that it is given."""
    weight: Given = {}
    act: Given = {}
    for one in sorted(given, key=lambda one: one.pattern in names):  # exact names last
        exact = one.pattern in names
        matched = [
            n for n in names if n == one.pattern or (not exact and fnmatchcase(n, one.pattern))
        ]
        if not matched:
            near = difflib.get_close_matches(one.pattern.strip("*?."), names, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise InputError(
                f"layers: {one.pattern!r} matches no layer that can be quantized{hint}"
            )
        if one.weight is not None:
            weight |= dict.fromkeys(matched, tuple(sorted(one.weight)))
        if one.act is not None:
            act |= dict.fromkeys(matched, _act_choices(one.act))
    return weight, act


def _act_choices(bits: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(bits), key=act_order))


def _shared(group: Sequence[str], given: Given) -> tuple[int, ...] | None:
    """What is given for the layers of a group; None where nothing is."""
    by_choice = {given[name]: name for name in group if name in given}
    if len(by_choice) > 1:
        (a, first), (b, second) = list(by_choice.items())[:2]
        raise InputError(
            f"layers: {first!r} and {second!r} share their bits (see ties), but are given "
            f"{'+'.join(map(str, a))} and {'+'.join(map(str, b))}"
        )
    return next(iter(by_choice), None)


def objectives(space: Space, limits: Iterable[str]) -> tuple[str, ...]:
    """The costs that a study minimises: those with a limit, and bit operations where inputs have a
    choice, since nothing else would ever speak for fewer input bits."""
    names = tuple(limits)
    if "bops" not in names and any(len(group.act) > 1 for group in space.groups):
        names += ("bops",)
    return names


def cost_range(space: Space, costs: CostModel) -> tuple[dict[str, int], dict[str, int]]:
    """The least and the largest sum of each cost's terms, whatever bits give it: an input in FP32
    costs the most bit operations and the fewest bytes."""
    terms = option_terms(space, costs)
    least, largest = (
        {name: sum(end(term[name] for term in group) for group in terms) for name in costs.names}
        for end in (min, max)
    )
    return least, largest


def option_terms(space: Space, costs: CostModel) -> list[list[dict[str, int]]]:
    """For each group and each of its options (in `options` order), its share of each cost: the
    sum over its layers."""

    def terms(group: Choices, option: Option) -> dict[str, int]:
        w, a = option
        act = None if a == FP32 else a
        layers = [costs.layer_terms(name, w, act) for name in group.names]
        return {cost: sum(layer[cost] for layer in layers) for cost in costs.names}

    return [[terms(group, option) for option in group.options] for group in space.groups]
