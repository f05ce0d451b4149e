"""The search space: for each layer the bits its weights and its input may get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from optuna.distributions import CategoricalDistribution

from adq.proxies.costs import CostModel
from adq.quant.layers import LayerInfo
from adq.quant.spec import BitVector

FP32 = 0  # the choice "keep this input in FP32"
Option = tuple[int, int]
"""(weight bits, input bits) of one layer; input bits 0 stand for FP32."""


@dataclass(frozen=True)
class LayerChoices:
    name: str
    weight: tuple[int, ...]
    act: tuple[int, ...]

    @property
    def options(self) -> list[Option]:
        """All pairs, fewest bits first."""
        return list(product(self.weight, self.act))


@dataclass(frozen=True)
class Space:
    """Choices of every quantized layer, in the order in which the model runs them.

    A point of the space is a list of options, one a layer. As Optuna parameters it reads
    `weight:LAYER` and `act:LAYER` with the bits themselves as values; layers without a choice
    have no parameter.
    """

    layers: tuple[LayerChoices, ...]

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the layers whose weight bits are free."""
        return tuple(layer.name for layer in self.layers if len(layer.weight) > 1)

    @property
    def weight_choices(self) -> tuple[int, ...]:
        """The weight bits that a layer which is not pinned may get, fewest first."""
        free = (layer for layer in self.layers if len(layer.weight) * len(layer.act) > 1)
        return tuple(sorted({bits for layer in free for bits in layer.weight}))

    @property
    def size(self) -> int:
        return prod(len(layer.weight) * len(layer.act) for layer in self.layers)

    @property
    def bit_options(self) -> dict[str, list[tuple[int, int | None]]]:
        """Layer name -> its (weight bits, input bits), with None for FP32."""
        return {
            layer.name: [(w, None if a == FP32 else a) for w, a in layer.options]
            for layer in self.layers
        }

    def distributions(self) -> dict[str, CategoricalDistribution]:
        found: dict[str, CategoricalDistribution] = {}
        for layer in self.layers:
            for kind, choices in (("weight", layer.weight), ("act", layer.act)):
                if len(choices) > 1:
                    found[f"{kind}:{layer.name}"] = CategoricalDistribution(choices)
        return found

    def encode(self, point: Sequence[Option]) -> dict[str, int]:
        """The Optuna parameters of a point."""
        names = self.distributions()
        values: dict[str, int] = {}
        for layer, (weight, act) in zip(self.layers, point, strict=True):
            values |= {f"weight:{layer.name}": weight, f"act:{layer.name}": act}
        return {name: values[name] for name in names}

    def decode(self, params: Mapping[str, int]) -> list[Option]:
        """The inverse of `encode`."""
        return [
            (
                params.get(f"weight:{layer.name}", layer.weight[0]),
                params.get(f"act:{layer.name}", layer.act[0]),
            )
            for layer in self.layers
        ]

    def bit_vector(self, point: Sequence[Option]) -> BitVector:
        names = [layer.name for layer in self.layers]
        return BitVector(
            {name: weight for name, (weight, _) in zip(names, point, strict=True)},
            {name: act for name, (_, act) in zip(names, point, strict=True) if act != FP32},
        )

    def uniform(self, weight: int) -> list[Option]:
        """`weight` bits wherever they are free, and the most input bits of each layer."""
        return [
            (
                weight if len(layer.weight) > 1 else layer.weight[0],
                max(layer.act, key=act_order),
            )
            for layer in self.layers
        ]

    def smallest(self) -> list[Option]:
        return [(min(layer.weight), min(layer.act, key=act_order)) for layer in self.layers]

    def largest(self) -> list[Option]:
        return [(max(layer.weight), max(layer.act, key=act_order)) for layer in self.layers]


def act_order(bits: int) -> float:
    """Input bits from fewest to most; FP32 is the most."""
    return float("inf") if bits == FP32 else bits


def make_space(
    layers: Sequence[LayerInfo],
    weight_bits: Sequence[int],
    act_bits: Sequence[int],
    first_last_bits: int,
) -> Space:
    """Every layer gets all choices, but the first and last, which are pinned.

    `first_last_bits` pins both (weights; their inputs too, unless `act_bits` is FP32 alone);
    0 pins nothing.
    """
    weight = tuple(sorted(set(weight_bits)))
    act = tuple(sorted(set(act_bits), key=act_order))
    choices = []
    for index, layer in enumerate(layers):
        if first_last_bits and index in (0, len(layers) - 1):
            pinned_act = (FP32,) if act == (FP32,) else (first_last_bits,)
            choices.append(LayerChoices(layer.name, (first_last_bits,), pinned_act))
        else:
            choices.append(LayerChoices(layer.name, weight, act))
    return Space(tuple(choices))


def option_terms(space: Space, costs: CostModel) -> list[list[dict[str, int]]]:
    """For each layer and each of its options (in `options` order), its share of each cost."""
    return [
        [costs.layer_terms(layer.name, w, None if a == FP32 else a) for w, a in layer.options]
        for layer in space.layers
    ]
