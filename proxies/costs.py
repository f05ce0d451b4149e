"""What a bit vector costs: bytes, average bits, bit operations. All exact, all before training.

Costs add up over layers, which is what lets a knapsack solver handle them. Whole numbers are kept
as Python integers, so that a budget is met or not without rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from adq.proxies.latency import LatencyModel
from adq.quant.errors import InputError
from adq.quant.export.packed import packed_size
from adq.quant.layers import LayerInfo
from adq.quant.spec import FP32_BITS, BitVector

COST_NAMES = ("average_bits", "size_bytes", "bops")
"""Every model has these; `latency_s` comes last where there is a latency model."""

PER_SECOND = 10**12
"""Latencies are added in whole picoseconds: a layer's share of a large batch is nanoseconds."""


@dataclass(frozen=True)
class Costs:
    """The costs of one bit vector.

    average_bits           Σ n_l·b_l / Σ n_l over the weights of all quantized layers
    average_bits_searched  the same over the layers whose bits were free, the pinned ones left out
    average_act_bits       input bits weighted by MACs, over all quantized layers (FP32 counts 32)
    size_bytes             bytes of the packed file on the disk, header included (`PackedSize`)
    bops                   Σ MACs_l · b_l · a_l per sample (an FP32 input counts 32 bits)
    latency_s              seconds per sample on a device; None where no latency model was given
    """

    average_bits: float
    average_bits_searched: float
    average_act_bits: float
    size_bytes: int
    bops: int
    latency_s: float | None = None


class CostModel:
    """Costs of bit vectors over a traced model.

    `searched` names the layers whose bits are free; it matters for one of the averages only.
    `group_size` weights share a scale, see `adq.quant.rows.rows_of`. `latency` must never say that
    more bits take less time (see `adq.proxies.latency.RunWider`).

    Raises InputError for a `group_size` that divides no layer's rows.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerInfo],
        searched: Sequence[str],
        group_size: int | None = None,
        latency: LatencyModel | None = None,
    ) -> None:
        self.group_size, self.latency = group_size, latency
        self.names = COST_NAMES + (() if latency is None else ("latency_s",))
        self.layers = {layer.name: layer for layer in layers}
        self.searched = frozenset(searched)
        _check_group_size(group_size, layers)
        weights = {layer.name: (layer.weight_numel, layer.scales(group_size)) for layer in layers}
        self.size = packed_size(model, weights)
        self.fixed = dict.fromkeys(self.names, 0) | {"size_bytes": self.size.fixed_bytes}
        """What every bit vector costs beside Σ layer_terms, in their units."""
        if latency is not None:
            self.fixed["latency_s"] = round(latency.rest_seconds * PER_SECOND)
        self.weight_numel = sum(layer.weight_numel for layer in layers)
        self.macs = sum(layer.macs for layer in layers)
        """Multiply-accumulates per sample, the same for every bit vector."""

    def layer_terms(self, name: str, weight: int, act: int | None) -> dict[str, int]:
        """One layer's share of each cost, as integers: `average_bits` in total bits of weights,
        `latency_s` in picoseconds."""
        layer = self.layers[name]
        terms = {
            "average_bits": layer.weight_numel * weight,
            "size_bytes": self.size.layer_bytes(name, weight, act),
            "bops": layer.macs * weight * (FP32_BITS if act is None else act),
        }
        if self.latency is not None:
            terms["latency_s"] = round(self.latency.seconds(layer, weight, act) * PER_SECOND)
        return terms

    def limits(self, budget: Mapping[str, float]) -> dict[str, int]:
        """Limits on Σ layer_terms that say the same as `budget`, cost name -> limit.

        A limit is the largest whole number that keeps the cost at or below the budget; one part
        in 10⁹ is allowed for, so that 2.8 bits of 1000 weights are 2800 in binary as well.
        """
        out = {}
        for name, value in budget.items():
            total = value * self.weight_numel if name == "average_bits" else value
            if name == "latency_s":
                total *= PER_SECOND
            total -= self.fixed[name]
            out[name] = math.floor(total + 1e-9 * max(1.0, abs(total)))
        return out

    def in_units(self, totals: Mapping[str, int]) -> dict[str, float]:
        """Costs in the units of `Costs` from sums of terms: the inverse of `limits`."""
        found: dict[str, float] = {}
        for name, total in totals.items():
            found[name] = total + self.fixed[name]
            if name == "average_bits":
                found[name] /= self.weight_numel
            if name == "latency_s":
                found[name] /= PER_SECOND
        return found

    def totals(self, bits: BitVector) -> dict[str, int]:
        """Σ layer_terms of a bit vector that names every layer."""
        totals = dict.fromkeys(self.names, 0)
        for name in self.layers:
            for cost, term in self.layer_terms(name, bits.weight[name], bits.act.get(name)).items():
                totals[cost] += term
        return totals

    def costs(self, bits: BitVector) -> Costs:
        found = self.in_units(self.totals(bits))
        searched = [self.layers[name] for name in self.layers if name in self.searched]
        searched_bits = sum(layer.weight_numel * bits.weight[layer.name] for layer in searched)
        searched_numel = sum(layer.weight_numel for layer in searched)
        act_bits = sum(
            layer.macs * bits.act.get(layer.name, FP32_BITS) for layer in self.layers.values()
        )
        return Costs(
            average_bits=found["average_bits"],
            average_bits_searched=searched_bits / searched_numel,
            average_act_bits=act_bits / self.macs,
            size_bytes=int(found["size_bytes"]),
            bops=int(found["bops"]),
            latency_s=found.get("latency_s"),
        )


def _check_group_size(group_size: int | None, layers: Sequence[LayerInfo]) -> None:
    rows = sorted({layer.weight_numel // layer.out_channels for layer in layers})
    if group_size is not None and all(row % group_size for row in rows):
        raise InputError(
            f"group-size {group_size} divides no layer's rows, which have "
            f"{', '.join(map(str, rows))} weights: give a divisor of one of them"
        )
