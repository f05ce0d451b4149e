"""Which quantizers a model gets and how they train: the words that a study can swap."""

from dataclasses import dataclass
from typing import Literal, get_args

from adq.quant.errors import InputError

WeightMethod = Literal["adq", "lsq", "n2uq", "apot", "minmax"]
WEIGHT_METHODS: tuple[WeightMethod, ...] = get_args(WeightMethod)
ActMethod = Literal["n2uq", "lsq", "pact", "minmax"]
ACT_METHODS: tuple[ActMethod, ...] = get_args(ActMethod)
Initialisation = Literal["quantile", "quantile-lloyd", "midpoint", "uniform"]
INITIALISATIONS: tuple[Initialisation, ...] = get_args(Initialisation)
Amp = Literal["bf16", "fp16"]
Optimizer = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)


@dataclass(frozen=True)
class Scheme:
    """How weights and inputs are quantized, at whatever bits.

    weight      `adq` (adaptive codebook), or a baseline: `lsq`, `n2uq`, `apot`, `minmax`
    act         `n2uq` (learned thresholds), or a baseline: `lsq`, `pact`, `minmax`
    init        where the codebooks of `adq` start, see `codebook.initial_levels`
    zero        whether the codebooks of `adq` keep an exact zero among their levels
    split_dead  whether dead levels of `adq` take over half of the worst cell
    group_size  weights that share a scale; an output channel if not given, see `rows.rows_of`

    Raises InputError for an unknown method or start, or a group size below 2.
    """

    weight: WeightMethod = "adq"
    act: ActMethod = "n2uq"
    init: Initialisation = "quantile-lloyd"
    zero: bool = False
    split_dead: bool = True
    group_size: int | None = None

    def __post_init__(self) -> None:
        choices = (
            ("weight quantizer", self.weight, WEIGHT_METHODS),
            ("act quantizer", self.act, ACT_METHODS),
            ("codebook start", self.init, INITIALISATIONS),
        )
        for what, value, allowed in choices:
            if value not in allowed:
                raise InputError(f"{what}: expected one of {', '.join(allowed)}, got {value!r}")
        size = self.group_size
        if size is not None and (type(size) is not int or size < 2):
            raise InputError(f"group size: expected at least 2 weights, got {size!r}")
