"""Triton kernels of the weight quantizer; `weights_reference` says what they compute.

One launch forward and one backward for all layers of a model, whatever their sizes and bits. A
table in the device's memory says which layer a program works for, and another what it is like.

Forward: a program takes one part, PART weights, of a layer. The code of x is found by halving the
levels: two loads a bit from a table that fits the first cache. For the statistics each thread keeps
n, m and e for each of 16 levels and adds a weight to the one that it belongs to; above 4 bits the
program walks over its part once more for each 16 levels, and reads w and the codes out of a cache.
By count of the compiled instructions an H100 takes as long for a pass without statistics at 4 bits
as its memory does, twice as long with them, and above 4 bits as much again for each 16 levels.

Backward: a program takes one row of more than 256 weights, or several shorter ones, TILE weights at
a time, and writes ∂L/∂s of its rows itself.

No two threads add to one number and nothing is summed by atomics, so that two runs on one kind of
card are equal to the last bit. Offsets into the flat tensors are int64. Numbers are worked with in
float32, or in float64 where w is; the division is correctly rounded, as PyTorch's is, so that
kernel and reference give one weight the same code.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from adq.quant.kernels import weights_reference as reference
from adq.quant.kernels.weights_reference import PART, Ints

LANES = 128  # partial sums of a level
FORWARD_WARPS = 2 if torch.version.hip else 4  # so that each thread has one lane
TILE = 512  # weights that a program of the backward pass holds at a time


@triton.jit
def _work_dtype(w_ptr):
    work: tl.constexpr = tl.float64 if w_ptr.dtype.element_ty == tl.float64 else tl.float32
    return work


@triton.jit
def _divide(a, b):
    """a/b, correctly rounded, as `/` is in float64 but not in float32."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _layer_of(layers_ptr, owners_ptr):
    """The columns of `Tables.layers` for the layer that this program works for."""
    at = layers_ptr + tl.load(owners_ptr + tl.program_id(0)) * 9
    weights = tl.load(at), tl.load(at + 1)
    rows = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    levels = tl.load(at + 5), tl.load(at + 6).to(tl.int32)
    return weights, rows, levels, tl.load(at + 7), tl.load(at + 8)


@triton.jit
def _x_of(w_ptr, scale_ptr, i, count, rest, size, work: tl.constexpr):
    """(x, s) of the weights i of a part that begins `rest` weights after the start of a row."""
    inside = i < count
    # exact below 2^14: the quotient lies 1/(2·size) or more off a whole number, its error is less
    row = ((i + rest).to(tl.float32) + 0.5) / size
    s = tl.load(scale_ptr + row.to(tl.int32), mask=inside, other=1.0).to(work)
    w = tl.load(w_ptr + i, mask=inside, other=0.0).to(work)
    return _divide(w, s), s


@triton.jit
def _quarters(values, LANES: tl.constexpr):
    """Four tensors of LANES values, each thread's own."""
    left, right = tl.split(tl.permute(tl.reshape(values, [2, 2, LANES]), [2, 0, 1]))
    first, third = tl.split(left)
    second, fourth = tl.split(right)
    return first, second, third, fourth


@triton.jit
def _add(n, m, e, code, x, c, level, inside, LANES: tl.constexpr):
    """The sums with a tile of finite x added to those of its levels."""
    known = inside & (tl.abs(x) < float("inf"))  # false for NaN
    codes = _quarters(tl.where(known, code, -1), LANES)
    values = _quarters(x, LANES)
    errors = _quarters((x - c) * (x - c), LANES)
    for k in tl.static_range(4):
        # adding a zero elsewhere would cost one more instruction than adding nothing
        mine = codes[k][None, :] == level[:, None]
        n = tl.where(mine, n + 1.0, n)
        m = tl.where(mine, m + values[k][None, :], m)
        e = tl.where(mine, e + errors[k][None, :], e)
    return n, m, e


@triton.jit
def _store(partials_ptr, stride, n, m, e, level, count):
    """One line of n, one of m and one of e."""
    work = partials_ptr.dtype.element_ty
    there = level < count
    tl.store(partials_ptr + level, tl.sum(n, axis=1).to(work), mask=there)
    tl.store(partials_ptr + stride + level, tl.sum(m, axis=1).to(work), mask=there)
    tl.store(partials_ptr + stride + stride + level, tl.sum(e, axis=1).to(work), mask=there)


@triton.jit(do_not_specialize=["stride"])
def forward_kernel(
    w_ptr,
    scale_ptr,
    levels_ptr,
    out_ptr,
    codes_ptr,
    partials_ptr,
    stride,
    layers_ptr,
    owners_ptr,
    GATHER: tl.constexpr,
    PART: tl.constexpr,
    LANES: tl.constexpr,
):
    """ŵ and codes of one part of a layer, and its statistics."""
    WORK: tl.constexpr = _work_dtype(w_ptr)
    BLOCK: tl.constexpr = 4 * LANES
    (
        (first_weight, weights),
        (first_row, _, size),
        (first_level, bits),
        first_partial,
        first_part,
    ) = _layer_of(layers_ptr, owners_ptr)
    levels = 1 << bits
    part = tl.program_id(0) - first_part
    begin = part * PART
    count = tl.minimum(weights - begin, PART).to(tl.int32)
    w_ptr += first_weight + begin
    out_ptr += first_weight + begin
    codes_ptr += first_weight + begin
    levels_ptr += first_level
    partials_ptr += first_partial + part * levels
    row = begin // size
    scale_ptr += first_row + row
    # a part of longer rows meets the end of one at most, and of rows of PART weights as well
    rest = tl.maximum(begin - row * size - tl.maximum(size - PART, 0), 0).to(tl.int32)
    size = tl.minimum(size, PART).to(tl.float32)

    level = tl.arange(0, 16)
    n = tl.zeros([16, LANES], tl.float32)  # exact up to 2^24
    m = tl.zeros([16, LANES], WORK)
    e = tl.zeros([16, LANES], WORK)
    for base in range(0, count, BLOCK):
        i = base + tl.arange(0, BLOCK)
        inside = i < count
        x, s = _x_of(w_ptr, scale_ptr, i, count, rest, size, WORK)
        code = tl.zeros([BLOCK], tl.int32)
        for k in range(bits):
            upper = code + (levels >> (k + 1))
            below = tl.load(levels_ptr + upper - 1).to(WORK)
            above = tl.load(levels_ptr + upper).to(WORK)
            code = tl.where((below + above) * 0.5 > x, code, upper)  # false for NaN, which goes up
        c = tl.load(levels_ptr + code).to(WORK)
        out = tl.where(x != x, x, c * s)
        tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(codes_ptr + i, code.to(codes_ptr.dtype.element_ty), mask=inside)
        if GATHER:
            n, m, e = _add(n, m, e, code, x, c, level, inside, LANES)
    if GATHER:
        _store(partials_ptr, stride, n, m, e, level, levels)
        tl.debug_barrier()  # each thread now sees the codes that the others have stored
        for chunk in range(16, levels, 16):
            level = chunk + tl.arange(0, 16)
            n = tl.zeros([16, LANES], tl.float32)
            m = tl.zeros([16, LANES], WORK)
            e = tl.zeros([16, LANES], WORK)
            for base in range(0, count, BLOCK):
                i = base + tl.arange(0, BLOCK)
                inside = i < count
                x, s = _x_of(w_ptr, scale_ptr, i, count, rest, size, WORK)
                code = tl.load(codes_ptr + i, mask=inside, other=0).to(tl.int32)
                c = tl.load(levels_ptr + code).to(WORK)
                n, m, e = _add(n, m, e, code, x, c, level, inside, LANES)
            _store(partials_ptr, stride, n, m, e, level, levels)


@triton.jit
def _backward_rows(
    grad_ptr,
    w_ptr,
    codes_ptr,
    scale_ptr,
    levels_ptr,
    grad_w_ptr,
    grad_scale_ptr,
    block,
    rows,
    size,
    levels,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORK: tl.constexpr,
):
    """The gradients of ROWS rows, the block-th of a layer; its tensors begin at the pointers."""
    row = block * ROWS + tl.arange(0, ROWS)
    there = row < rows
    s = tl.load(scale_ptr + row, mask=there, other=1.0).to(WORK)[:, None]
    lowest = tl.load(levels_ptr).to(WORK)
    highest = tl.load(levels_ptr + (levels - 1)).to(WORK)
    sums = tl.zeros([ROWS, COLUMNS], WORK)
    for base in range(0, size, COLUMNS):
        column = base + tl.arange(0, COLUMNS)[None, :]
        inside = there[:, None] & (column < size)
        i = row[:, None] * size + column
        g = tl.load(grad_ptr + i, mask=inside, other=0.0).to(WORK)
        w = tl.load(w_ptr + i, mask=inside, other=0.0).to(WORK)
        code = tl.load(codes_ptr + i, mask=inside, other=0).to(tl.int32)
        value = tl.load(levels_ptr + code).to(WORK)
        x = _divide(w, s)
        slope = value - x
        grad_w = g
        if RULE > 0:
            between = (x > lowest) & (x < highest)
            slope = tl.where(between, slope if RULE == 1 else 0.0, value)
            grad_w = tl.where(between, g, 0.0)
        tl.store(grad_w_ptr + i, grad_w.to(grad_w_ptr.dtype.element_ty), mask=inside)
        sums += tl.where(inside, g * slope, 0.0)
    grad_scale = tl.sum(sums, axis=1).to(grad_scale_ptr.dtype.element_ty)
    tl.store(grad_scale_ptr + row, grad_scale, mask=there)


@triton.jit
def backward_kernel(
    grad_ptr,
    w_ptr,
    codes_ptr,
    scale_ptr,
    levels_ptr,
    grad_w_ptr,
    grad_scale_ptr,
    layers_ptr,
    owners_ptr,
    RULE: tl.constexpr,
    TILE: tl.constexpr,
):
    """∂L/∂w and ∂L/∂s of some rows of one layer."""
    WORK: tl.constexpr = _work_dtype(w_ptr)
    (first_weight, _), (first_row, rows, size), (first_level, bits), _, first_block = _layer_of(
        layers_ptr, owners_ptr
    )
    block = tl.program_id(0) - first_block
    grad_ptr += first_weight
    w_ptr += first_weight
    codes_ptr += first_weight
    scale_ptr += first_row
    levels_ptr += first_level
    grad_w_ptr += first_weight
    grad_scale_ptr += first_row
    # fmt: off
    if size <= 16:
        _backward_rows(
            grad_ptr, w_ptr, codes_ptr, scale_ptr, levels_ptr, grad_w_ptr, grad_scale_ptr,
            block, rows, size, 1 << bits, RULE, TILE // 16, 16, WORK,
        )
    elif size <= 64:
        _backward_rows(
            grad_ptr, w_ptr, codes_ptr, scale_ptr, levels_ptr, grad_w_ptr, grad_scale_ptr,
            block, rows, size, 1 << bits, RULE, TILE // 64, 64, WORK,
        )
    elif size <= 256:
        _backward_rows(
            grad_ptr, w_ptr, codes_ptr, scale_ptr, levels_ptr, grad_w_ptr, grad_scale_ptr,
            block, rows, size, 1 << bits, RULE, TILE // 256, 256, WORK,
        )
    else:
        _backward_rows(
            grad_ptr, w_ptr, codes_ptr, scale_ptr, levels_ptr, grad_w_ptr, grad_scale_ptr,
            block, rows, size, 1 << bits, RULE, 1, TILE, WORK,
        )
    # fmt: on


def rows_at_once(size: int) -> int:
    """How many rows of `size` weights one program of the backward pass takes."""
    columns = next((c for c in (16, 64, 256) if size <= c), TILE)
    return TILE // columns


@dataclass(frozen=True)
class Tables:
    """What the programs of one pass read about layers."""

    layers: Tensor
    """(L, 9) int64: first weight, weights, first row, rows, weights of a row, first level, bits,
    first partial statistic, first program."""

    owners: Tensor
    """(programs,) int32: the layer that each works for."""


@lru_cache(maxsize=256)
def _tables(
    rows: tuple[int, ...],
    sizes: tuple[int, ...],
    bits: tuple[int, ...],
    device: torch.device,
    backward: bool,
) -> Tables:
    lines: list[tuple[int, ...]] = []
    owners: list[int] = []
    for i, (layer, b) in enumerate(zip(reference.layers(rows, sizes, bits), bits, strict=True)):
        if backward:
            programs = triton.cdiv(layer.rows, rows_at_once(layer.size))
        else:
            programs = reference.parts(layer.rows * layer.size)
        starts = layer.weights.start, layer.rows * layer.size, layer.scales.start
        line = (*starts, layer.rows, layer.size, layer.levels.start, b, layer.partials.start)
        lines.append((*line, len(owners)))
        owners += [i] * programs
    return Tables(
        torch.tensor(lines, dtype=torch.int64, device=device),
        torch.tensor(owners, dtype=torch.int32, device=device),
    )


def forward(
    w: Tensor, scale: Tensor, levels: Tensor, rows: Ints, sizes: Ints, bits: Ints, gather: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.forward`; every tensor is contiguous."""
    out = torch.empty_like(w)
    codes = torch.empty_like(w, dtype=torch.uint8)
    statistics = reference.partials_size(rows, sizes, bits) if gather else 0
    partials = w.new_empty(3, statistics, dtype=torch.float64)
    tables = _tables(tuple(rows), tuple(sizes), tuple(bits), w.device, False)
    if programs := tables.owners.numel():
        with torch.cuda.device_of(w):
            forward_kernel[(programs,)](
                *(w, scale, levels, out, codes, partials, statistics),
                *(tables.layers, tables.owners),
                GATHER=gather,
                PART=PART,
                LANES=LANES,
                num_warps=FORWARD_WARPS,
            )
    return out, codes, partials


def backward(
    grad: Tensor,
    w: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Ints,
    sizes: Ints,
    bits: Ints,
    rule: int,
) -> tuple[Tensor, Tensor]:
    """`reference.backward`; every tensor is contiguous."""
    grad_w, grad_scale = torch.empty_like(w), torch.empty_like(scale)
    tables = _tables(tuple(rows), tuple(sizes), tuple(bits), w.device, True)
    if programs := tables.owners.numel():
        with torch.cuda.device_of(w):
            backward_kernel[(programs,)](
                *(grad, w, codes, scale, levels, grad_w, grad_scale),
                *(tables.layers, tables.owners),
                RULE=rule,
                TILE=TILE,
            )
    return grad_w, grad_scale
