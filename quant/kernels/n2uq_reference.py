"""N2UQ activation quantization in plain PyTorch: the meaning of the kernels, and the CPU's way.

Notation as in `adq.quant.activation`: n = 2^bits − 1 segments of widths a_1..a_n from s on, knots
b_0 = s, b_i = b_{i−1} + a_i, thresholds T_i halfway between b_{i−1} and b_i, output scale σ, zero
point z.

The edges b_0, T_1, b_1, T_2, ..., T_n, b_n ascend. The *place* p of x, an integer in 0..2n + 1, is
how many of them are <= x (NaN counts as +∞), and says both things there are to know:

    code     q = p >> 1          in 0..n
    segment  i = p − q           0 below the first knot, n + 1 from the last one on

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
from torch import Tensor

from adq.quant.errors import InputError

HALVING_FROM = 2**13  # values; measured on an x86 core, see `places_of`


def bits_of(widths: Tensor) -> int:
    """The bits of a quantizer with these widths; raises InputError if they are not 2^bits − 1."""
    n = widths.numel()
    if n & (n + 1) or not 1 <= n <= 255:
        raise InputError(f"widths: expected 2^bits − 1 of them, bits from 1 to 8, got {n}")
    return n.bit_length()


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


def places_of(x: Tensor, edges: Tensor) -> Tensor:
    """How many of the 2^(bits + 1) − 1 edges are <= x; NaN counts as +∞.

    A processor mispredicts the branches of a search, which costs more than to halve the edges for
    all values at once: from some 8,000 values on, the second way is up to four times as fast.
    """
    total = edges.numel()
    dtype = place_dtype(total // 2)
    if x.numel() < HALVING_FROM:
        return torch.bucketize(x, edges, right=True, out_int32=True).to(dtype)
    # counts the edges above x: NaN compares as false, and so has none above it
    descending, step = edges.flip(0), (total + 1) // 2
    above = (descending[step - 1] > x).int().mul_(step)
    while step := step // 2:
        probe = descending[step - 1 :].index_select(0, above)
        above.add_((probe > x).int(), alpha=step)
    return (total - above).to(dtype)


def forward(
    x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂, place, edges)."""
    dtype = work_dtype(x, widths)
    edges = edges_of(start, widths, dtype)
    place = places_of(x.to(dtype), edges)
    out = torch.sub(place >> 1, zero_point).mul_(scale)
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
    code = place >> 1
    segment = place.int() - code
    rate = widths.to(edges.dtype).reciprocal()
    slopes = torch.constant_pad_nd(rate * scale, (1, 1))
    grad_x = slopes.index_select(0, segment).mul_(grad).to(x.dtype)

    grad, places = grad.double(), slopes.numel()
    sums = torch.bincount(segment, grad, minlength=places)[1:-1]
    moments = torch.bincount(segment, grad * x, minlength=places)[1:-1]
    # H_i = Σ g·x − b_{i−1}·G_i: in float64 the difference costs no digits that count
    offset_sums = moments - edges[:-1:2] * sums
    curve_sums = sums * rate
    # Σ_{j>=i}: summed from above, so that what nothing lies above stays an exact zero
    upward, minus_scale = curve_sums.flip(0).cumsum(0).flip(0), -scale
    grad_start = upward[:1] * minus_scale
    grad_widths = (upward - curve_sums).addcmul_(offset_sums, rate.square()).mul_(minus_scale)
    grad_scale = torch.dot(grad, code.double().sub_(zero_point))
    return (
        grad_x,
        grad_start.to(widths.dtype),
        grad_widths.to(widths.dtype),
        grad_scale.to(scale.dtype).reshape(1),
    )
