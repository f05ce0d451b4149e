"""A sensitivity table: the expected loss increase of each layer at each bit-width.

Every proxy estimates the same quantity, the increase of the mean loss when one layer alone is
quantized, by the second-order term of its Taylor series, ½ δᵀ H δ with δ = Q_b(w) − w. They differ
in what they put for H. The first-order term is left out: at a trained minimum it vanishes on
average, and its sign says nothing about sensitivity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from adq.quant.baselines import weight_quantizer_for
from adq.quant.rows import Rows, rows_of
from adq.quant.scheme import Scheme

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """`score[i, j]`: expected loss increase of `layers[i]` at `bits[j]`; `stderr`: its error."""

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    score: Array
    stderr: Array

    def monotone(self) -> Array:
        """The scores, made non-increasing in bits and never negative.

        Each score becomes the largest of itself and those of more bits: an estimate that says
        "more bits hurt" is noise, and an allocator would act on it.
        """
        order = np.argsort(self.bits)[::-1]
        raised = np.maximum.accumulate(np.maximum(self.score[:, order], 0.0), axis=1)
        return raised[:, np.argsort(order)]

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "bits": list(self.bits),
            "score": self.score.tolist(),
            "stderr": self.stderr.tolist(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Table":
        return Table(
            tuple(data["layers"]),
            tuple(data["bits"]),
            np.array(data["score"], dtype=np.float64).reshape(len(data["layers"]), -1),
            np.array(data["stderr"], dtype=np.float64).reshape(len(data["layers"]), -1),
        )


@dataclass(frozen=True)
class Sensitivity:
    """What one proxy says: a table for weights, one for layer inputs where it has one.

    `samples` counts what the standard errors average over (probes, or data samples).
    """

    proxy: str
    weight: Table
    act: Table | None
    samples: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "proxy": self.proxy,
            "unit": "expected loss increase",
            "samples": self.samples,
            "seconds": self.seconds,
            "weight": self.weight.to_json(),
            "act": None if self.act is None else self.act.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Sensitivity":
        return Sensitivity(
            data["proxy"],
            Table.from_json(data["weight"]),
            None if data["act"] is None else Table.from_json(data["act"]),
            data["samples"],
            data["seconds"],
        )


def quantization_errors(
    weight: Tensor,
    bits: Sequence[int],
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
    rows: Rows | None = None,
) -> Tensor:
    """δ_b = Q_b(w) − w for each bit-width, before any training; shape (len(bits), *w.shape).

    Rows are the weight's first dimension if not given.
    """
    weight = weight.detach()
    rows = rows or Rows(tuple(weight.shape), weight[0].numel())
    quantizers = (weight_quantizer_for(weight, rows, b, scheme) for b in bits)
    with torch.no_grad():
        return torch.stack([quantizer(weight) - weight for quantizer in quantizers])


def layer_errors(
    model: nn.Module, layers: Sequence[str], bits: Sequence[int], scheme: Scheme
) -> list[Tensor]:
    """`quantization_errors` of each named layer of an FP32 model."""
    return [
        quantization_errors(
            layer.get_parameter("weight"), bits, scheme, rows_of(layer, scheme.group_size)
        )
        for layer in map(model.get_submodule, layers)
    ]
