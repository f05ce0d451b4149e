"""Quantization of a layer's input for inference, in plain PyTorch: the meaning of the kernels.

A quantizer that is not trained any more is its thresholds T_1 <= ... <= T_n, a scale σ and a zero
point z:

    code  q = #{i : T_i <= x}    in 0..n; NaN counts as +∞
    x̂ = σ·(q − z)

Shapes: x any, thresholds (n,) with n from 1 to 255, scale and zero point (1,). x and thresholds are
compared, and x̂ is computed, in float32, or in float64 where an argument is float64; x̂ has the dtype
of x.

Bytes moved per element, with w = the bytes of x: 2w for x̂, w + 1 for the code.
"""

import torch
from torch import Tensor

from adq.quant.errors import InputError
from adq.quant.kernels import counting

MAX_THRESHOLDS = 255


def check(thresholds: Tensor) -> None:
    """Raises InputError for another shape than (n,) with n from 1 to 255."""
    if thresholds.ndim != 1 or not 1 <= thresholds.numel() <= MAX_THRESHOLDS:
        raise InputError(
            f"thresholds: expected from 1 to {MAX_THRESHOLDS} of them in a row, "
            f"got shape {tuple(thresholds.shape)}"
        )


def work_dtype(x: Tensor, thresholds: Tensor) -> torch.dtype:
    """The dtype that x and thresholds are compared in."""
    return torch.promote_types(torch.promote_types(x.dtype, thresholds.dtype), torch.float32)


def codes(x: Tensor, thresholds: Tensor) -> Tensor:
    """q, uint8, for a contiguous x."""
    return counting.count(x, _in_full(thresholds, x))


def quantize(x: Tensor, thresholds: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x̂ for a contiguous x."""
    return counting.quantize(x, _in_full(thresholds, x), scale, zero_point)


def _in_full(thresholds: Tensor, x: Tensor) -> Tensor:
    dtype = work_dtype(x, thresholds)
    return thresholds if thresholds.dtype == dtype else thresholds.to(dtype)
