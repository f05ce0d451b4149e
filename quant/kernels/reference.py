"""N2UQ activation quantization in plain PyTorch: the meaning of the kernels, and the CPU's way.

Notation as in `adq.quant.activation`: n = 2^bits − 1 segments of widths a_1..a_n from s on, knots
b_0 = s, b_i = b_{i−1} + a_i, thresholds T_i halfway between b_{i−1} and b_i, output scale σ, zero
point z.

The edges b_0, T_1, b_1, T_2, ..., T_n, b_n ascend. The *place* p of x, an integer in 0..2n + 1, is
how many of them are <= x (NaN counts as +∞), and says both things there are to know:

    code     q = p >> 1          in 0..n
    segment  i = (p + 1) >> 1    0 below the first knot, n + 1 from the last one on

Forward:   x̂ = σ·(q − z)
Backward, with g = ∂L/∂x̂ and per segment G_i = Σ g, H_i = Σ g·(x − b_{i−1}):

    ∂L/∂x   = σ·g/a_i inside segment i, 0 outside
    ∂L/∂a_i = −σ·(H_i/a_i² + Σ_{j>i} G_j/a_j)
    ∂L/∂s   = −σ·Σ_i G_i/a_i
    ∂L/∂σ   = Σ g·(q − z)

Shapes: x, g and the place (N,), start, scale and zero point (1,), widths (n,), edges (2n + 1,).
x̂ and ∂L/∂x have the dtype of x; in between all is float32, or float64 where an argument is; sums
are float64.

Bytes moved per element, with w = the bytes of x and 1 byte of place (2 at 8 bits): forward 2w + 1,
backward 3w + 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def work_dtype(x: Tensor, widths: Tensor) -> torch.dtype:
    """The dtype that x and thresholds are compared in."""
    return torch.promote_types(torch.promote_types(x.dtype, widths.dtype), torch.float32)


def place_dtype(n: int) -> torch.dtype:
    """The smallest dtype that holds 0..2n + 1: one byte up to 7 bits."""
    return torch.uint8 if 2 * n + 1 <= 255 else torch.int16


def edges_of(start: Tensor, widths: Tensor, dtype: torch.dtype) -> Tensor:
    """b_0, T_1, b_1, ..., T_n, b_n in `dtype`.

    They are summed in float64, so that the order of summation, which differs between devices,
    does not show in float32.
    """
    half = widths / 2
    steps = torch.cat([start, torch.stack([half, half], dim=1).flatten()])
    return steps.cumsum(0, dtype=torch.float64).to(dtype)


def forward(
    x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂, place, edges)."""
    dtype = work_dtype(x, widths)
    edges = edges_of(start, widths, dtype)
    place = torch.bucketize(x.to(dtype), edges, right=True, out_int32=True)
    place = place.to(place_dtype(widths.numel()))
    out = (place >> 1).to(dtype).sub_(zero_point).mul_(scale)
    return out.to(x.dtype), place, edges


def backward(
    grad: Tensor,
    x: Tensor,
    place: Tensor,
    edges: Tensor,
    widths: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(∂L/∂x, ∂L/∂s, ∂L/∂a, ∂L/∂σ)."""
    segment = place.int().add_(1).bitwise_right_shift_(1)
    slopes = F.pad((scale / widths).to(edges.dtype), (1, 1))
    grad_x = slopes.index_select(0, segment).mul_(grad).to(x.dtype)

    grad = grad.double()
    sums = torch.bincount(segment, grad, minlength=slopes.numel())[1:-1]
    moments = torch.bincount(segment, grad * x, minlength=slopes.numel())[1:-1]
    # H_i = Σ g·x − b_{i−1}·G_i: in float64 the difference costs no digits that count
    offset_sums = moments - edges[:-1:2] * sums
    curve_sums = sums / widths
    total = curve_sums.sum()
    above = total - curve_sums.cumsum(0)
    grad_widths = (offset_sums / widths.square() + above) * -scale
    grad_scale = torch.dot(grad, (place >> 1).double().sub_(zero_point))
    return (
        grad_x,
        (total * -scale).to(widths.dtype),
        grad_widths.to(widths.dtype),
        grad_scale.to(scale.dtype).reshape(1),
    )
