"""Triton kernels of the activation quantizer; `reference` says what they compute.

Four kernels: the edges (one program), the forward pass, the backward pass with its sums over
segments, and the finish, which turns those sums into the parameters' gradients (one program).

The forward pass finds the place of x by halving the edges, bits + 1 loads from a table that fits
the first cache. In the backward pass each thread keeps a sum for each of up to 16 segments and adds
a value to the one it belongs to. That takes some 5·2^bits instructions a value, by count of the
compiled ones; at 4 bits they should take as long as the memory does, and above they dominate. No
two threads add to one number: a program walks over its blocks in order and writes one row of sums,
and the finish adds the rows in a fixed order in float64. There are no atomics, and so two runs on
one kind of card are equal to the last bit.

Tensors are dense and of one memory order, offsets int64. x, x̂ and their gradients have the dtype of
x, thresholds and sums that of the edges, float32 as a rule.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adq.quant.kernels.n2uq_reference import bits_of, place_dtype, work_dtype

FORWARD_BLOCK = 1024
WARPS_IN_FLIGHT = 2048  # of the backward pass, and so the number of rows: 16 for each of 128 cores
FINISH_TILE = 4096  # rows times columns


@triton.jit
def edges_kernel(start_ptr, widths_ptr, edges_ptr, BITS: tl.constexpr):
    """b_0, T_1, b_1, ..., T_n, b_n: one step of half a width after the other, from s on."""
    EDGES: tl.constexpr = (2 << BITS) - 1
    k = tl.arange(0, EDGES + 1)
    inner = (k > 0) & (k < EDGES)
    half = tl.load(widths_ptr + ((k - 1) >> 1), mask=inner, other=0.0).to(tl.float64) * 0.5
    steps = tl.where(k == 0, tl.load(start_ptr).to(tl.float64), half)
    edges = tl.cumsum(steps)
    tl.store(edges_ptr + k, edges.to(edges_ptr.dtype.element_ty), mask=k < EDGES)


@triton.jit
def forward_kernel(
    x_ptr,
    edges_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    place_ptr,
    numel,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x̂ and the place of x."""
    work = edges_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(work)
    place = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(BITS + 1):
        step = 1 << (BITS - k)
        edge = tl.load(edges_ptr + place + (step - 1))
        place += tl.where(edge > x, 0, step)  # false for NaN, which goes up as +∞ does
    code = (place >> 1).to(work)
    out = (code - tl.load(zero_point_ptr).to(work)) * tl.load(scale_ptr).to(work)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(place_ptr + offsets, place.to(place_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quarters(values, LANES: tl.constexpr):
    """Four tensors of LANES values: a thread that has loaded four neighbours keeps all four."""
    even, odd = tl.split(tl.reshape(values, [LANES, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    place_ptr,
    edges_ptr,
    slopes_ptr,
    zero_point_ptr,
    grad_x_ptr,
    rows_ptr,
    numel,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """∂L/∂x, and for each program a row: G_1..G_n and Σ g·(q − z), then H_1..H_n and 0."""
    work = edges_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = 1 << BITS  # one more than there are segments
    BLOCK: tl.constexpr = 4 * LANES
    column = tl.arange(0, COLUMNS)
    zero_point = tl.load(zero_point_ptr).to(work)
    sums = tl.zeros([COLUMNS, LANES], work)
    offset_sums = tl.zeros([COLUMNS, LANES], work)
    code_sums = tl.zeros([BLOCK], work)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for base in range(first, numel, tl.num_programs(0) * BLOCK):
        offsets = base + tl.arange(0, BLOCK)
        inside = offsets < numel
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(work)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(work)
        place = tl.load(place_ptr + offsets, mask=inside, other=0).to(tl.int32)
        code = place >> 1
        segment = place - code - 1  # counted from 0; -1 below the knots, n above them
        known = (segment >= 0) & (segment < COLUMNS - 1)
        slope = tl.load(slopes_ptr + segment, mask=known, other=0.0)
        left = tl.load(edges_ptr + 2 * segment, mask=known, other=0.0)
        grad_x = grad * slope
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)

        code_sums += grad * (code.to(work) - zero_point)
        segments = _quarters(segment, LANES)
        grads = _quarters(grad, LANES)
        moments = _quarters(grad * (x - left), LANES)
        for k in tl.static_range(4):
            # adding a zero elsewhere would cost one more instruction than adding nothing
            mine = segments[k][None, :] == column[:, None]
            sums = tl.where(mine, sums + grads[k][None, :], sums)
            offset_sums = tl.where(mine, offset_sums + moments[k][None, :], offset_sums)
    last = column == COLUMNS - 1  # has summed what lies above the knots, which nobody needs
    row_ptr = rows_ptr + tl.program_id(0) * (2 * COLUMNS) + column
    tl.store(row_ptr, tl.where(last, tl.sum(code_sums), tl.sum(sums, axis=1)))
    tl.store(row_ptr + COLUMNS, tl.where(last, 0.0, tl.sum(offset_sums, axis=1)))


@triton.jit
def finish_kernel(
    rows_ptr,
    widths_ptr,
    scale_ptr,
    grad_start_ptr,
    grad_widths_ptr,
    grad_scale_ptr,
    programs,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """∂L/∂s, ∂L/∂a and ∂L/∂σ from the rows."""
    COLUMNS: tl.constexpr = 1 << BITS
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float64)
    offset_sums = tl.zeros([COLUMNS], tl.float64)
    for base in range(0, programs, BLOCK):
        row = base + tl.arange(0, BLOCK)
        there = (row < programs)[:, None]
        at = rows_ptr + row[:, None] * (2 * COLUMNS) + column[None, :]
        sums += tl.sum(tl.load(at, mask=there, other=0.0).to(tl.float64), axis=0)
        offset_sums += tl.sum(tl.load(at + COLUMNS, mask=there, other=0.0).to(tl.float64), axis=0)
    known = column < COLUMNS - 1
    grad_scale = tl.sum(tl.where(known, 0.0, sums))
    widths = tl.load(widths_ptr + column, mask=known, other=1.0).to(tl.float64)
    minus_scale = -tl.load(scale_ptr).to(tl.float64)
    curve_sums = tl.where(known, sums / widths, 0.0)
    upward = tl.cumsum(curve_sums, reverse=True)
    grad_widths = minus_scale * (offset_sums / (widths * widths) + (upward - curve_sums))
    tl.store(grad_widths_ptr + column, grad_widths.to(grad_widths_ptr.dtype.element_ty), mask=known)
    tl.store(grad_start_ptr, (minus_scale * tl.sum(curve_sums)).to(grad_start_ptr.dtype.element_ty))
    tl.store(grad_scale_ptr, grad_scale.to(grad_scale_ptr.dtype.element_ty))


def backward_shape(bits: int) -> tuple[int, int]:
    """(lanes, warps) of the backward pass: no thread keeps more than 16 sums of each kind."""
    warps = 4 if bits <= 4 else 8
    return min(128, 512 * warps >> bits), warps


def forward(
    x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.forward` for a dense x of any shape."""
    bits = bits_of(widths)
    out = torch.empty_like(x)
    place = torch.empty_like(x, dtype=place_dtype(widths.numel()))
    edges = widths.new_empty(2 * widths.numel() + 1, dtype=work_dtype(x, widths))
    with torch.cuda.device_of(x):
        edges_kernel[(1,)](start, widths, edges, BITS=bits)
        if x.numel():
            forward_kernel[(triton.cdiv(x.numel(), FORWARD_BLOCK),)](
                *(x, edges, scale, zero_point, out, place, x.numel()),
                BITS=bits,
                BLOCK=FORWARD_BLOCK,
            )
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
    """`reference.backward` for a dense x of any shape; gradient and place are laid out like x."""
    bits = bits_of(widths)
    lanes, warps = backward_shape(bits)
    programs = min(WARPS_IN_FLIGHT // warps, triton.cdiv(x.numel(), 4 * lanes))
    grad_x, grad_widths, grad_scale = map(torch.empty_like, (x, widths, scale))
    grad_start = widths.new_empty(1)
    rows = edges.new_empty(programs, 2 << bits)
    slopes = widths.to(edges.dtype).reciprocal() * scale
    with torch.cuda.device_of(x):
        if programs:
            backward_kernel[(programs,)](
                *(grad, x, place, edges, slopes, zero_point, grad_x, rows, x.numel()),
                BITS=bits,
                LANES=lanes,
                num_warps=warps,
            )
        finish_kernel[(1,)](
            *(rows, widths, scale, grad_start, grad_widths, grad_scale, programs),
            BITS=bits,
            BLOCK=FINISH_TILE >> bits,
        )
    return grad_x, grad_start, grad_widths, grad_scale
