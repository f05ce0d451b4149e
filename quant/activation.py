"""Activation quantization with learned, non-uniform thresholds and uniform output levels (N2UQ).

Notation: `n = 2^bits − 1` segments with widths `a_1..a_n`, start `s`, zero point `z`, output scale
`σ`. Knots `b_0 = s`, `b_i = b_{i−1} + a_i`; thresholds in the middle of the segments,
`T_i = (b_{i−1} + b_i)/2`, that is `T_1 = s + a_1/2` and `T_i = T_{i−1} + (a_{i−1} + a_i)/2`.
The code of x is `q = i` for `T_i <= x < T_{i+1}`, an integer in 0..n, and `x̂ = σ·(q − z)`.

Source: Liu et al., Nonuniform-to-Uniform Quantization, CVPR 2022 (arXiv 2111.14826), eq. 3 to 9.
There the output interval is Δ = 2/n; here Δ is folded into the scales, so that a code is a plain
integer and a width of 1 means "as wide as the output step" at every bit-width.
"""

from torch import Tensor

from adq.quant.kernels import n2uq_ops as ops
from adq.quant.kernels.n2uq_reference import edges_of


def thresholds(start: Tensor, widths: Tensor) -> Tensor:
    """T_1..T_n, shape (n,)."""
    return edges_of(start, widths, widths.dtype)[1::2]


def fake_quantize(
    x: Tensor, start: Tensor, widths: Tensor, output_scale: Tensor, zero_point: Tensor
) -> Tensor:
    """x̂ = σ·(q(x) − z); gradients to x, start, widths and the output scale.

    q is differentiated as g, the piecewise linear curve through the knots (b_i, i): inside segment
    i it is g(x) = i − 1 + (x − b_{i−1})/a_i, with b_{i−1} = s + Σ_{j<i} a_j, so that
        ∂g/∂x = 1/a_i,   ∂g/∂s = −1/a_i,   ∂g/∂a_i = −(x − b_{i−1})/a_i²,   ∂g/∂a_j = −1/a_i (j < i)
    and outside the knots every derivative is 0 (N2UQ eq. 9, the generalised straight-through
    estimator).

    Shapes: x any, start (1,), widths (2^bits − 1,) all positive, output_scale (1,),
    zero_point (1,), a whole number. x̂ has the shape, dtype and memory format of x.
    """
    return ops.fake_quantize(x, start, widths, output_scale, zero_point)


def full_range(values: Tensor, bits: int) -> tuple[float, int]:
    """(step, zero_point) of the grid step·(q − z), q in 0..2^bits−1, over [min, max] and zero."""
    n = 2**bits - 1
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    if low == high:  # all are zero
        return 1.0, 0
    step = (high - low) / n
    return step, round(-low / step)


def fit_range(values: Tensor, bits: int, candidates: int = 50) -> tuple[float, int]:
    """(step, zero_point) of the grid step·(q − z), q in 0..2^bits−1, of least squared error.

    The range of `full_range` is shrunk in `candidates` equal steps; the best fraction wins. Values
    that are never negative get zero_point 0 (unsigned).
    """
    n = 2**bits - 1
    values = values.detach().flatten().float()
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    if low == high:
        return full_range(values, bits)
    best = (float("inf"), 1.0, 0)
    for i in range(candidates, 0, -1):
        step = (high - low) * i / candidates / n
        zero_point = round(-low * i / candidates / step)
        grid = (values / step + zero_point).round().clamp(0, n)
        error = ((grid - zero_point) * step - values).square().mean().item()
        best = min(best, (error, step, zero_point))
    return best[1], best[2]
