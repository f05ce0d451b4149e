"""Search spaces over made-up layers, and slow truths about them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
from oracles import header_bytes
from torch import nn

from adq.proxies.base import Sensitivity, Table
from adq.proxies.costs import CostModel
from adq.quant.layers import LayerInfo
from adq.search.config import layer_bits
from adq.search.space import Option, Space, act_order, make_space

Sizes = Sequence[tuple[int, int, int]]
"""(outputs, inputs, positions) of each layer: weights outputs·inputs, MACs weights·positions."""


def toy_layers(sizes: Sizes) -> tuple[LayerInfo, ...]:
    return tuple(
        LayerInfo(f"l{i}", "Linear", (out, into), (into,), out * into * positions, out)
        for i, (out, into, positions) in enumerate(sizes)
    )


def toy_space(
    sizes: Sizes,
    weight_bits: Sequence[int] = (2, 3, 4),
    act_bits: Sequence[int] = (8,),
    first_last_bits: int = 0,
    ties: Sequence[Sequence[str]] = (),
    given: str = "",
) -> tuple[Space, CostModel]:
    layers = toy_layers(sizes)
    space = make_space(
        layers, weight_bits, act_bits, first_last_bits, ties, layer_bits(given) if given else ()
    )
    model = nn.Module()
    for layer in layers:
        model.add_module(layer.name, nn.Linear(layer.weight_shape[1], layer.out_channels))
    return space, CostModel(model, layers, space.searched or tuple(la.name for la in layers))


def smallest(space: Space) -> list[Option]:
    """The fewest bits everywhere; FP32 are the most."""
    return [(min(g.weight), min(g.act, key=act_order)) for g in space.groups]


def largest(space: Space) -> list[Option]:
    return [(max(g.weight), max(g.act, key=act_order)) for g in space.groups]


def spread(space: Space, point: Sequence[Option]) -> list[Option]:
    """The option of each layer l0, l1, ..., where those of one group have the same."""
    found: dict[int, Option] = {}
    for group, option in zip(space.groups, point, strict=True):
        for name in group.names:
            found[int(name.removeprefix("l"))] = option
    return [found[i] for i in range(len(found))]


def totals_by_hand(sizes: Sizes, point: Sequence[Option]) -> dict[str, int]:
    """Bits of all weights, bytes of all quantized layers, bit operations a sample."""
    total = {"average_bits": 0, "size_bytes": 0, "bops": 0}
    # the largest file has 8 bits everywhere; one bias an output
    largest = sum(out * into + 4 * (256 + out) + 4 * 257 + 4 * out for out, into, _ in sizes)
    for i, ((out, into, positions), (w, a)) in enumerate(zip(sizes, point, strict=True)):
        count = out * into
        codes = -(-count * w // 8)
        input_floats = 2**a - 1 + 2 if a else 0  # thresholds, scale, zero point
        total["average_bits"] += count * w
        total["size_bytes"] += codes + 4 * (2**w + out) + 4 * input_floats
        total["size_bytes"] += header_bytes(f"l{i}", count, out, len(str(largest)), a != 0)
        total["bops"] += count * positions * w * (a or 32)
    return total


def fits_by_hand(sizes: Sizes, limits: Mapping[str, int], point: Sequence[Option]) -> bool:
    totals = totals_by_hand(sizes, point)
    return all(totals[name] <= limit for name, limit in limits.items())


def all_points(space: Space) -> Iterator[list[Option]]:
    for point in product(*(product(group.weight, group.act) for group in space.groups)):
        yield list(point)


def toy_sensitivity(
    space: Space, rng: np.random.Generator, proxy: str = "toy", act_bits: Sequence[int] = ()
) -> Sensitivity:
    """Scores of no order at all: more bits may seem to hurt, and some are negative."""
    names = tuple(sorted(name for group in space.groups for name in group.names))
    bits = tuple(sorted({b for group in space.groups for b in group.weight}))

    def table(widths: Sequence[int]) -> Table:
        shape = (len(names), len(widths))
        return Table(names, tuple(widths), rng.normal(0.3, 1, shape), np.ones(shape))

    return Sensitivity(proxy, table(bits), table(act_bits) if act_bits else None, 2, 0.0)
