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
from adq.quant.kernels import counting


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
    return counting.count_dtype(2 * n + 1)


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
    edges = edges_of(start, widths, work_dtype(x, widths))
    out, place = counting.quantize_and_count(x, edges, scale, zero_point, shift=1)
    return out, place, edges


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
    n = widths.numel()
    rate = widths.to(edges.dtype).reciprocal()
    # places 2i − 1 and 2i are those of segment i
    slopes = torch.constant_pad_nd((rate * scale).repeat_interleave(2), (1, 1))
    grad_x = torch.empty_like(x)
    pieces = list(zip(*map(counting.parts, (grad, x, place, grad_x)), strict=True))
    found = []
    count = max(1, min(4, 256 // (2 * n + 2)))
    size = count * (2 * n + 2)
    lanes = _lanes(pieces[0][2].numel(), 2 * n + 2, count, place)
    for g, v, p, out in pieces:
        torch.mul(slopes.index_select(0, p.int()), g, out=out)
        # cast before the product: operations on two dtypes are many times slower on a CPU
        g, places = g.double(), p + lanes[: p.numel()]
        weights = g, v.double() * g
        found.append(torch.stack([torch.bincount(places, w, minlength=size) for w in weights]))
    # an empty bincount is one of integers
    totals = torch.stack(found).sum(0, dtype=torch.float64).unflatten(1, (count, -1)).sum(1)
    sums, moments = totals[:, 1:-1].unflatten(1, (n, 2)).sum(2)
    # H_i = Σ g·x − b_{i−1}·G_i: in float64 the difference costs no digits that count
    offset_sums = moments - edges[:-1:2] * sums
    curve_sums = sums * rate
    # Σ_{j>=i}: summed from above, so that what nothing lies above stays an exact zero
    upward, minus_scale = curve_sums.flip(0).cumsum(0).flip(0), -scale
    grad_start = upward[:1] * minus_scale
    grad_widths = (upward - curve_sums).addcmul_(offset_sums, rate.square()).mul_(minus_scale)
    codes = torch.arange(2 * n + 2, device=x.device) >> 1
    grad_scale = torch.dot(totals[0], codes.double().sub_(zero_point))
    return (
        grad_x,
        grad_start.to(widths.dtype),
        grad_widths.to(widths.dtype),
        grad_scale.to(scale.dtype).reshape(1),
    )


def _lanes(size: int, places: int, count: int, like: Tensor) -> Tensor:
    """What is added to the places of up to `size` neighbours so that they are counted apart.

    A sum that waits for the one before it takes up to four times as long, and after a ReLU half of
    all values have one place: as many sums of each place as its dtype can tell apart, up to four.
    """
    lanes = like.new_zeros(size)
    for i in range(1, count):
        lanes[i::count] = i * places
    return lanes
