"""How numbers are shown: units of the costs, decimals of the metric, ranges of the axes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SIGNIFICANT = 4


@dataclass(frozen=True)
class Unit:
    """One unit is `factor` of the cost's own; `decimals` None shows four significant digits.

    `title` names an axis or a column, `short` follows a number.
    """

    title: str
    short: str
    factor: float
    decimals: int | None

    def value(self, cost: float) -> float:
        return cost / self.factor

    def number(self, cost: float) -> str:
        """The cost in this unit, like `22.1`."""
        value = self.value(cost)
        decimals = self.decimals
        if decimals is None:
            digits = math.floor(math.log10(abs(value))) if value else 0
            decimals = max(0, SIGNIFICANT - 1 - digits)
        return f"{value:,.{decimals}f}"

    def text(self, cost: float) -> str:
        """The cost with its unit, like `22.1 kB`."""
        return f"{self.number(cost)} {self.short}"

    def limit(self, cost: float) -> str:
        """A budget with its unit, in the digits that it was given in, like `2.8 bits a weight`."""
        return f"{self.value(cost):,.10g} {self.short}"


UNITS = {
    "average_bits": Unit("average bits a weight", "bits a weight", 1.0, 3),
    "average_bits_searched": Unit("the same, searched layers", "bits a searched weight", 1.0, 3),
    "size_bytes": Unit("size in kB", "kB", 1e3, 1),
    "bops": Unit("GBOPs a sample", "GBOPs a sample", 1e9, None),
    "average_act_bits": Unit("average input bits", "bits an input", 1.0, 3),
    "latency_s": Unit("latency in ms a sample", "ms a sample", 1e-3, None),
}
"""Cost name (a field of Point) -> its unit. kB are 10³ bytes, GBOPs 10⁹ bit operations."""


def reference_text(metric_name: str, reference: Mapping[str, float]) -> str:
    """The reference point of a hypervolume, like `accuracy 0 and 3.08 bits a weight`."""
    costs = [unit.limit(reference[name]) for name, unit in UNITS.items() if name in reference]
    return " and ".join([f"{metric_name} {reference['metric']:.4g}", *costs])


def metric_format(stderrs: Iterable[float]) -> str:
    """Decimals that show two digits of the smallest standard error, six at most.

    Where no standard error is known (a single sample, or all alike), four significant digits.
    """
    positive = [s for s in stderrs if s > 0]
    if not positive:
        return f".{SIGNIFICANT}g"
    decimals = 1 - math.floor(math.log10(min(positive)))
    return f".{min(max(decimals, 0), 6)}f"


def padded(values: Iterable[float], share: float = 0.08) -> list[float]:
    """[low, high] of an axis that shows all values, with `share` of their range free on each side.

    A range of nothing (one value) becomes a tenth of the value, or 1 around zero.
    """
    found = list(values)
    low, high = min(found), max(found)
    span = (high - low) or 0.1 * abs(high) or 1.0
    return [low - share * span, high + share * span]
