"""Budgets: hard limits on what a bit vector may cost, one or several at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from adq.quant.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Upper limits; None sets none.

    bits     average bits a weight, over all weights of all quantized layers
    size_mb  size of the packed model in megabytes (10⁶ bytes)
    gbops    bit operations per sample in units of 10⁹: Σ MACs · weight bits · input bits
    latency_ms  milliseconds per sample by the study's latency model

    Raises InputError when a limit is not a positive finite number or when none is set.
    """

    bits: float | None = None
    size_mb: float | None = None
    gbops: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value > 0):
                name = field.name.replace("_", "-")
                raise InputError(f"budget-{name}: expected a positive number, got {value}")
        if not self.limits():
            raise InputError(
                "no budget: give at least one of --budget-bits, --budget-size-mb, --budget-gbops, "
                "--budget-latency-ms (for example --budget-bits 2.8)"
            )

    def limits(self) -> dict[str, float]:
        """Cost name (as in `adq.proxies.costs.Costs`) -> limit in that cost's unit."""
        limits = {
            "average_bits": self.bits,
            "size_bytes": None if self.size_mb is None else self.size_mb * 1e6,
            "bops": None if self.gbops is None else self.gbops * 1e9,
            "latency_s": None if self.latency_ms is None else self.latency_ms * 1e-3,
        }
        return {name: value for name, value in limits.items() if value is not None}


OPTION_OF = {
    "average_bits": ("budget-bits", 1.0),
    "size_bytes": ("budget-size-mb", 1e6),
    "bops": ("budget-gbops", 1e9),
    "latency_s": ("budget-latency-ms", 1e-3),
}
"""Cost name -> (the option that limits it, how many of the cost's units one of the option's is)."""


ROUNDING = 1e-12
"""What binary fractions may add: 0.01569 MB are 15689.999999999998 bytes."""


def check_reachable(
    limits: Mapping[str, float], smallest: Mapping[str, float], largest: Mapping[str, float]
) -> None:
    """Raise InputError for a limit that nothing meets, and where every limit is met by everything:
    there is then nothing to give up. Beside one that binds, another may be out of reach.

    `smallest` and `largest` are the ends of each cost alone, whatever bits give them.
    """
    below = [n for n, limit in limits.items() if limit < smallest[n] * (1 - ROUNDING)]
    above = [n for n, limit in limits.items() if limit > largest[n] * (1 + ROUNDING)]
    if len(above) < len(limits):
        above = []
    for name in below + above:
        option, unit = OPTION_OF[name]
        side = "below the smallest" if name in below else "above the largest"
        raise InputError(
            f"{option} {limits[name] / unit:g} is {side} reachable: this model with these bit "
            f"choices reaches {_range(smallest[name] / unit, largest[name] / unit)}"
        )


def _range(low: float, high: float) -> str:
    """Both ends in four digits, or as many more as it takes, rounded into the range, so that the
    printed numbers are themselves reachable."""

    def rounded(value: float, digits: int, rounding: str) -> str:
        exact = Decimal(repr(value))
        last = Decimal((0, (1,), exact.adjusted() + 1 - digits))
        return f"{float(exact.quantize(last, rounding)):.{digits}g}"

    digits = 4
    while True:
        ends = rounded(low, digits, ROUND_CEILING), rounded(high, digits, ROUND_FLOOR)
        if float(ends[0]) <= float(ends[1]):
            return " to ".join(ends)
        digits += 1
